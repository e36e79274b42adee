"""Frame-accurate reading of videos with PyAV. Decoding is single-threaded, because the loader has its own threads.

Frames are upright: the rotation that a telephone writes into the file is applied. They are numbered by their time
stamps at a constant rate; where a file's stamps drift but all of its frames are known to be wanted, by their order
(`FrameTimes`).
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipelines.cut_off import remedy
from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import MAX_PIXELS, check_pixels
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

_OPEN_FILES = 4  # per thread
_DECODE_AHEAD = 64  # frames: within this distance decoding is cheaper than seeking
# A frame that is shown before its key frame is decoded after it, and needs the key frame before (open GOP, as in hevc).
_BACK = (0.0, 1.0, 10.0, float("inf"))  # seconds
RATE, RATE_IN_ORDER = 0.01, 0.1  # relative difference of frame rates that is rounding, or a drift
FAULTS = (av.FFmpegError, OSError, ValueError, TypeError, ArithmeticError, MemoryError)  # PyAV's, for damaged bytes
LIMITS = {"max_pixels": str(MAX_PIXELS)}  # of a decoder: a frame may be larger than the file's header says
_local = threading.local()


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """Time stamps int64 [frames] of all frames of a file, in the order in which they are shown."""

    stamps: np.ndarray

    def number(self, stamp: int) -> int:
        """The number of the frame with this stamp, or -1."""
        at = int(np.searchsorted(self.stamps, stamp))
        return at if at < len(self.stamps) and self.stamps[at] == stamp else -1


@dataclass(frozen=True)
class VideoFrames:
    """`count` frames of `height` x `width` pixels of the video at `path`, starting with frame `first`.

    Frames are numbered by their order in `times`, or at the constant rate `fps`.
    """

    path: str
    first: int
    count: int
    fps: float
    height: int
    width: int
    times: FrameTimes | None = None

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB, in the order of `indices` (0 is the clip's first frame).

        Raises DataError naming the file and frame when it is missing or undecodable.
        """
        wanted = _inside(self.path, indices, self.count)
        found = _reader(self.path, self.fps, self.times).read(sorted({i + self.first for i in wanted}))
        return _stack(self.path, [found[i + self.first] for i in wanted], (self.height, self.width))


@dataclass(frozen=True, repr=False)
class InMemoryVideo:
    """A whole video in memory as `data`; error messages call it `name`."""

    name: str
    data: bytes
    count: int
    fps: float
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB, in the order of `indices`. Raises DataError naming the clip and frame."""
        wanted = _inside(self.name, indices, self.count)
        reader = _Reader(self.name, io.BytesIO(self.data), self.fps)
        try:
            found = reader.read(sorted(set(wanted)))
        finally:
            reader.close()
        return _stack(self.name, [found[i] for i in wanted], (self.height, self.width))


def probe(name: str, data: bytes) -> InMemoryVideo:
    """The video in `data`; reads its header and decodes nothing. Raises DataError naming `name` for other data."""
    header = _header(name, io.BytesIO(data))
    return InMemoryVideo(name, data, header.frames, header.fps, header.height, header.width)


def whole_clip(path: Path) -> VideoFrames:
    """All frames of the video at `path`, once its last one has been decoded. Raises DataError naming the file."""
    header = _header(str(path), str(path))
    if header.frames < 1:
        raise DataError(f"{path} contains no frame; record it again or remove it")
    height, width = _size_of(str(path), header.frames - 1, header.fps, None)
    return VideoFrames(str(path), 0, header.frames, header.fps, height, width)


def _inside(name: str, indices: Sequence[int], count: int) -> list[int]:
    wanted = [int(i) for i in indices]
    outside = [i for i in wanted if not 0 <= i < count]
    if outside:
        raise IndexError(f"{name}: frame {outside[0]} is outside the clip's {count} frames")
    return wanted


def _stack(name: str, frames: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    stacked = np.zeros((len(frames), *size, 3), np.uint8)
    for row, frame in zip(stacked, frames, strict=True):
        if frame.shape[:2] != size:
            raise DataError(f"{name}: the frame size changes to {list(frame.shape[:2])} within the video; re-encode it")
        row[:] = frame
    return stacked


@dataclass(frozen=True)
class Header:
    """What a file says of its video; the size is that before a rotation."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class ClipRequest:
    """A clip to open, of `count` frames at `fps`. `in_order`: all frames of the file are wanted, by some clip."""

    path: Path
    first: int
    count: int
    fps: float
    in_order: bool = False


def read_headers(paths: Iterable[Path], what: str, progress: bool = True) -> dict[Path, Header]:
    """Decodes nothing. Raises DataError for a file that is missing or no video."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda p: _header(str(p), str(p)), paths)
        bar = progress_bar(found, total=len(paths), desc=f"{what}: videos", show=progress)
        return dict(zip(paths, bar, strict=True))


def open_clips(
    requests: Sequence[ClipRequest], headers: Mapping[Path, Header], what: str, progress: bool = True
) -> list[VideoFrames]:
    """Checks that every requested clip exists and that the last needed frame of every file can be decoded.

    Raises DataError, before any training, for files that are missing, truncated, too short or have a wrong rate.
    """
    last: dict[Path, ClipRequest] = {}
    for request in requests:
        header, end = headers[request.path], request.first + request.count
        if abs(header.fps - request.fps) > (RATE_IN_ORDER if request.in_order else RATE) * request.fps:
            raise DataError(
                f"{request.path} runs at {header.fps:.3f} fps but the metadata states {request.fps}; if the time "
                "stamps of the rows are those of the video, correct fps in meta/info.json; else encode the video again "
                "at the rate of the rows, or leave its episodes out with data.exclude"
            )
        if request.count < 1 or end > header.frames:
            message = f"has {header.frames} frames but {max(end, 1)} are needed; copy the file again"
            raise DataError(f"{request.path} {message}, or leave its episode out with data.exclude")
        if request.path not in last or end > last[request.path].first + last[request.path].count:
            last[request.path] = request

    def look(request: ClipRequest) -> tuple[FrameTimes | None, tuple[int, int]]:
        path = str(request.path)
        times = frame_times(path, request.fps) if request.in_order else None
        if times is not None and request.first + request.count > len(times.stamps):  # the header counted others
            message = f"has {len(times.stamps)} frames but {request.first + request.count} are needed"
            raise DataError(f"{path} {message}; copy the file again, or leave its episode out with data.exclude")
        return times, _size_of(path, request.first + request.count - 1, request.fps, times)

    with ThreadPoolExecutor(8) as pool:
        bar = progress_bar(pool.map(look, last.values()), total=len(last), desc=f"{what}: last frames", show=progress)
        known = dict(zip(last, bar, strict=True))
    clips = []
    for r in requests:
        times, (height, width) = known[r.path]
        clips.append(VideoFrames(str(r.path), r.first, r.count, r.fps, height, width, times))
    return clips


def frame_times(path: str, fps: float) -> FrameTimes | None:
    """The time stamps of all frames; None where they are those of the constant rate `fps`, as nearly always.

    Reads the header, and only where that shows a drift all of the file; decodes nothing. LeRobot's join of videos lets
    a little time pass between one and the next. Raises DataError.
    """
    container, stream = _open(path, path)
    with container:
        # Decoding times: shifted against the presentation times, but as regular as they are.
        entries = np.array([entry.timestamp for entry in stream.index_entries], np.int64)
        if 0 < len(entries) == stream.frames and _regular(entries, stream.time_base, fps):
            return None
        try:
            stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        except FAULTS as error:
            raise DataError(f"{path} cannot be read ({shorten(error)}); copy it again") from None
    if None in stamps:
        raise DataError(f"{path}: a frame has no time stamp; re-encode it")
    ordered = np.unique(np.array(stamps, np.int64))
    if len(ordered) != len(stamps):
        raise DataError(f"{path}: two frames have the same time stamp; re-encode it")
    return None if _regular(ordered, stream.time_base, fps) else FrameTimes(ordered)


def _regular(stamps: np.ndarray, time_base: Fraction, fps: float) -> bool:
    numbers = np.round((stamps - stamps[:1]) * (float(time_base) * fps))
    return np.array_equal(numbers, np.arange(len(stamps)))


def _size_of(path: str, number: int, fps: float, times: FrameTimes | None) -> tuple[int, int]:
    """(height, width) of a frame, which is decoded for it."""
    try:
        height, width, _ = _reader(path, fps, times).read([number])[number].shape
        return height, width
    finally:
        close_files()


def close_files() -> None:
    """Closes the videos this thread holds open."""
    readers = getattr(_local, "readers", {})
    while readers:
        readers.popitem()[1].close()


def _header(name: str, source: str | io.BytesIO) -> Header:
    container, stream = _open(name, source)
    with container:
        if not stream.average_rate or not stream.time_base:
            raise DataError(f"{name} does not state its frame rate; re-encode it at a constant rate")
        context = stream.codec_context
        try:
            check_pixels(context.height, context.width, name)
        except ConfigError as error:
            raise DataError(str(error)) from None
        try:
            # 0 where the container does not say: then packets are counted, which decodes nothing.
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        except FAULTS as error:
            raise DataError(f"{name} cannot be read ({shorten(error)}); copy it again") from None
        return Header(frames, float(stream.average_rate), context.height, context.width)


def _open(name: str, source: str | io.BytesIO):
    try:
        container = av.open(source, metadata_errors="replace")
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; copy the data set again, videos included") from None
    except FAULTS as error:
        if isinstance(source, io.BytesIO) and files.is_lfs_pointer(source.getvalue()):
            raise DataError(f"{name} {files.LFS_POINTER}") from None
        message = f"cannot be opened as a video ({shorten(error)}); {remedy(name)}"
        raise DataError(files.damage(name, message)) from None
    if not container.streams.video:
        container.close()
        raise DataError(f"{name} contains no video stream; copy it again, or leave it out with data.exclude")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise DataError(f"{name} has a video stream without a known codec; copy it again")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = LIMITS
    return container, stream


class _Reader:
    """One open video. Frames are numbered by presentation time, so seeking never loses count."""

    def __init__(self, name: str, source: str | io.BytesIO, fps: float, times: FrameTimes | None = None):
        self.name, self.fps, self._times = name, fps, times
        self._container, self._stream = _open(name, source)
        self._decoder: Any = None
        self._next = -1  # number of the frame the decoder yields next

    def close(self) -> None:
        self._container.close()

    def read(self, wanted: Iterable[int]) -> dict[int, np.ndarray]:
        """Frames by number; `wanted` must ascend."""
        return {number: self._read(number) for number in wanted}

    def _read(self, number: int) -> np.ndarray:
        try:
            inside = self._decoder is not None and self._next <= number <= self._next + _DECODE_AHEAD
            for back in _BACK:
                if not (inside and not back):
                    self._seek(number, back)
                found, first = self._decode(number)
                if found is not None:
                    return found
                if first <= number:  # it would have come
                    break
        except DataError:
            raise
        except FAULTS as error:
            self._decoder = None
            raise DataError(
                f"{self.name}: frame {number} cannot be decoded ({shorten(error)}); copy it again"
            ) from None
        self._decoder = None
        raise DataError(
            f"{self.name}: frame {number} is missing: if the file is truncated, copy it again; if its frame rate is "
            "uneven, encode it again at a constant one"
        )

    def _decode(self, number: int) -> tuple[np.ndarray | None, int]:
        """(the frame, or None where it does not come; the number of the first frame that was decoded, or -1)."""
        first = -1
        for frame in self._decoder:
            at = self._number(frame)
            first = at if first < 0 else first
            self._next = at + 1
            if at == number:
                pixels = frame.to_ndarray(format="rgb24")
                return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))), first
            if at > number:
                break
        return None, first

    def _seek(self, number: int, back: float) -> None:
        """Goes to the last key frame that is decoded at most `back` seconds before frame `number` is shown."""
        stream = self._stream
        start = stream.start_time or 0
        if self._times is not None:
            stamp = int(self._times.stamps[number])
        else:
            # Half a frame late, so that rounding of the time base does not select an earlier key frame.
            stamp = start + int((number + 0.5) / self.fps / stream.time_base) if number else start
        stamp = max(start, stamp - int(min(back, 2**31) / stream.time_base)) if back else stamp
        self._container.seek(stamp, stream=stream, backward=True)
        self._decoder = self._container.decode(stream)
        self._next = 0

    def _number(self, frame) -> int:
        if frame.pts is None:
            raise DataError(f"{self.name}: a frame has no time stamp; re-encode it")
        if self._times is not None:
            return self._times.number(frame.pts)
        return round((frame.pts - (self._stream.start_time or 0)) * float(self._stream.time_base) * self.fps)


def _reader(path: str, fps: float, times: FrameTimes | None) -> _Reader:
    if not hasattr(_local, "readers"):
        _local.readers = OrderedDict()
    readers = _local.readers
    if path in readers:
        readers.move_to_end(path)
    else:
        readers[path] = _Reader(path, path, fps, times)
        if len(readers) > _OPEN_FILES:
            readers.popitem(last=False)[1].close()
    return readers[path]
