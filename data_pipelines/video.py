"""Frame-accurate reading of videos with PyAV. Decoding is single-threaded, because the loader has its own threads."""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import MAX_PIXELS, check_pixels
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

_OPEN_FILES = 4  # per thread
_DECODE_AHEAD = 64  # frames: within this distance decoding is cheaper than seeking
FAULTS = (av.FFmpegError, OSError, ValueError, TypeError, ArithmeticError, MemoryError)  # PyAV's, for damaged bytes
LIMITS = {"max_pixels": str(MAX_PIXELS)}  # of a decoder: a frame may be larger than the file's header says
_local = threading.local()


@dataclass(frozen=True)
class VideoFrames:
    """`count` frames of `height` x `width` pixels of the video at `path`, starting with frame `first`."""

    path: str
    first: int
    count: int
    fps: float
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB, in the order of `indices` (0 is the clip's first frame).

        Raises DataError naming the file and frame when it is missing or undecodable.
        """
        wanted = _inside(self.path, indices, self.count)
        found = _reader(self.path, self.fps).read(sorted({i + self.first for i in wanted}))
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
    frames, fps, height, width = _header(name, io.BytesIO(data))
    return InMemoryVideo(name, data, frames, fps, height, width)


def whole_clip(path: Path) -> VideoFrames:
    """All frames of the video at `path`, once its last one has been decoded. Raises DataError naming the file."""
    frames, fps, height, width = _header(str(path), str(path))
    if frames < 1:
        raise DataError(f"{path} contains no frame; record it again or remove it")
    _decodes(VideoFrames(str(path), frames - 1, 1, fps, height, width))
    return VideoFrames(str(path), 0, frames, fps, height, width)


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
class ClipRequest:
    """A clip to open; `count` -1 means the whole video, `fps` 0 the video's own rate."""

    path: Path
    first: int = 0
    count: int = -1
    fps: float = 0.0


def open_clips(requests: Sequence[ClipRequest], what: str, progress: bool = True) -> list[VideoFrames]:
    """Checks that every requested clip exists and that the last needed frame of every file can be decoded.

    Raises DataError, before any training, for files that are missing, truncated, too short or have a wrong rate.
    """
    last: dict[Path, int] = {}
    paths = list(dict.fromkeys(r.path for r in requests))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda p: _header(str(p), str(p)), paths)
        bar = progress_bar(found, total=len(paths), desc=f"{what}: videos", show=progress)
        headers = dict(zip(paths, bar, strict=True))
        clips = []
        for request in requests:
            frames, fps, height, width = headers[request.path]
            count = frames - request.first if request.count < 0 else request.count
            if request.fps and abs(fps - request.fps) > 0.01 * request.fps:
                raise DataError(
                    f"{request.path} runs at {fps:.3f} fps but the metadata states {request.fps}; correct the metadata"
                )
            end = request.first + count
            if count < 1 or end > frames:
                raise DataError(
                    f"{request.path} has {frames} frames but {max(end, 1)} are needed; copy or record the file again"
                )
            last[request.path] = max(last.get(request.path, 0), end - 1)
            clips.append(VideoFrames(str(request.path), request.first, count, request.fps or fps, height, width))
        by_path = {clip.path: clip for clip in clips}
        checks = [VideoFrames(str(p), n, 1, by_path[str(p)].fps, *headers[p][2:]) for p, n in last.items()]
        bar = progress_bar(pool.map(_decodes, checks), total=len(checks), desc=f"{what}: last frames", show=progress)
        for _ in bar:
            pass
    return clips


def _decodes(clip: VideoFrames) -> None:
    try:
        clip.frames([0])
    finally:
        close_files()


def close_files() -> None:
    """Closes the videos this thread holds open."""
    readers = getattr(_local, "readers", {})
    while readers:
        readers.popitem()[1].close()


def _header(name: str, source: str | io.BytesIO) -> tuple[int, float, int, int]:
    """(frames, fps, height, width) without decoding."""
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
        return frames, float(stream.average_rate), context.height, context.width


def _open(name: str, source: str | io.BytesIO):
    try:
        container = av.open(source, metadata_errors="replace")
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; copy the data set again, videos included") from None
    except FAULTS as error:
        if isinstance(source, io.BytesIO) and files.is_lfs_pointer(source.getvalue()):
            raise DataError(f"{name} {files.LFS_POINTER}") from None
        raise DataError(files.damage(name, f"cannot be opened as a video ({shorten(error)}); copy it again")) from None
    if not container.streams.video:
        container.close()
        raise DataError(f"{name} contains no video stream; copy it again")
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

    def __init__(self, name: str, source: str | io.BytesIO, fps: float):
        self.name, self.fps = name, fps
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
            if self._decoder is None or not self._next <= number <= self._next + _DECODE_AHEAD:
                self._seek(number)
            for frame in self._decoder:
                at = self._number(frame)
                self._next = at + 1
                if at == number:
                    return frame.to_ndarray(format="rgb24")
                if at > number:
                    break
        except DataError:
            raise
        except FAULTS as error:
            self._decoder = None
            raise DataError(
                f"{self.name}: frame {number} cannot be decoded ({shorten(error)}); copy it again"
            ) from None
        self._decoder = None
        raise DataError(f"{self.name}: frame {number} is missing (truncated or uneven frame rate); copy it again")

    def _seek(self, number: int) -> None:
        stream = self._stream
        start = stream.start_time or 0
        # Half a frame late, so that rounding of the time base does not select an earlier key frame.
        stamp = start + int((number + 0.5) / self.fps / stream.time_base) if number else start
        self._container.seek(stamp, stream=stream, backward=True)
        self._decoder = self._container.decode(stream)
        self._next = 0

    def _number(self, frame) -> int:
        if frame.pts is None:
            raise DataError(f"{self.name}: a frame has no time stamp; re-encode it")
        return round((frame.pts - (self._stream.start_time or 0)) * float(self._stream.time_base) * self.fps)


def _reader(path: str, fps: float) -> _Reader:
    if not hasattr(_local, "readers"):
        _local.readers = OrderedDict()
    readers = _local.readers
    if path in readers:
        readers.move_to_end(path)
    else:
        readers[path] = _Reader(path, path, fps)
        if len(readers) > _OPEN_FILES:
            readers.popitem(last=False)[1].close()
    return readers[path]
