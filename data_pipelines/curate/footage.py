"""Raw videos from any place that Beam can open: reads frames at given times, cuts out clips and writes them as h264."""

import errno
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from data_pipelines.episode import DataError
from data_pipelines.video import LIMITS
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage.mp4 import KEY_FRAMES, Mp4Writer

_NO_INDEX = 2.0  # seconds that are decoded instead of skipped where a file has no index of key frames


@dataclass(frozen=True)
class Span:
    """Clip number `index` of a video: `seconds` from `start` on."""

    index: int
    start: float
    seconds: float


def cut(seconds: float, clip_seconds: float) -> list[Span]:
    """Equal parts of about `clip_seconds` (between two thirds and one and a half of it, for videos that long)."""
    count = max(1, round(seconds / clip_seconds))
    return [Span(i, i * seconds / count, seconds / count) for i in range(count)]


class Footage:
    """One open video, as a context manager. Frames are upright RGB, scaled down to `shortest_edge`."""

    def __init__(self, path: str, shortest_edge: int):
        """Raises DataError naming `path` when it is not a video, or its header lacks the frame rate or length."""
        self.path = path
        with _named(path):
            self._file = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
            try:
                self._open(shortest_edge)
            except BaseException:
                self._file.close()
                raise

    def _open(self, shortest_edge: int) -> None:
        self._container = av.open(self._file, "r", metadata_errors="replace")
        if not self._container.streams.video:
            raise DataError(f"{self.path} holds no video stream")
        stream = self._stream = self._container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f"{self.path} has a video stream without a known codec")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1  # Beam has its own workers
        stream.codec_context.options = LIMITS
        if not stream.average_rate or not stream.time_base:
            raise DataError(f"{self.path} does not state its frame rate")
        self.rate: Fraction = stream.average_rate
        self._tick: Fraction = stream.time_base  # seconds
        self._zero = (stream.start_time or 0) * self._tick
        if stream.duration:
            self.seconds = float(stream.duration * self._tick)
        elif self._container.duration:
            self.seconds = self._container.duration / av.time_base
        else:
            raise DataError(f"{self.path} does not state its length")
        context = stream.codec_context
        width, height = context.width * float(stream.sample_aspect_ratio or 1), context.height
        if not context.width or not height:
            raise DataError(f"{self.path} has frames of size zero")
        scale = min(1.0, shortest_edge / min(width, height))
        self._size = (
            max(2, 2 * round(width * scale / 2)),
            max(2, 2 * round(height * scale / 2)),
        )  # h264: even
        self._decoder: Iterator[av.VideoFrame] = self._container.decode(stream)
        self._shown: av.VideoFrame | None = None  # the last frame that was due,
        self._ahead: av.VideoFrame | None = next(self._decoder, None)  # and the one after it
        if self._ahead is None:
            raise DataError(f"{self.path} holds no frame")

    def __enter__(self) -> "Footage":
        return self

    def __exit__(self, *_) -> None:
        self._container.close()
        self._file.close()

    def at(self, times: Iterable[float]) -> Iterator[np.ndarray]:
        """The frame on screen at each of the ascending `times` (seconds): uint8 [H, W, 3].

        Raises DataError when the video cannot be decoded there or has ended long before.
        """
        with _named(self.path):
            for time in times:
                limit = time + 0.5 / float(self.rate)  # time stamps are rounded
                if self._should_jump(limit):
                    self._jump(limit)
                while self._ahead is not None and self._time(self._ahead) <= limit:
                    self._shown, self._ahead = self._ahead, next(self._decoder, None)
                frame = self._shown or self._ahead
                if frame is None or (self._ahead is None and self._time(frame) < time - max(1.0, 2 / float(self.rate))):
                    end = "before" if frame is None else f"at {self._time(frame):.1f} s, before"
                    raise DataError(f"{self.path} ends {end} {time:.1f} s, but its header states {self.seconds:.1f} s")
                yield self._picture(frame)

    def _time(self, frame: av.VideoFrame) -> float:
        if frame.pts is None or frame.time_base is None:
            raise DataError(f"{self.path}: a frame has no time stamp")
        return float(frame.pts * frame.time_base - self._zero)

    def _stamp(self, time: float) -> int:
        return int((Fraction(time) + self._zero) / self._tick)

    def _should_jump(self, time: float) -> bool:
        """Whether there is a key frame between the decoded frames and `time`, or `time` is in the past."""
        earliest, latest = self._shown or self._ahead, self._ahead or self._shown
        if earliest is None or latest is None or time < self._time(earliest):
            return True
        index = self._stream.index_entries
        entry = index.search_timestamp(self._stamp(time)) if len(index) else -1
        if entry < 0:
            return time - self._time(latest) > _NO_INDEX
        return float(index[entry].timestamp * self._tick - self._zero) > self._time(latest)

    def _jump(self, time: float) -> None:
        """Seeks by decoding time, which is earlier than display time; goes further back where that was too late."""
        for back in (0.0, 1.0, 10.0, time):
            self._container.seek(self._stamp(max(0.0, time - back)), stream=self._stream)
            self._decoder = self._container.decode(self._stream)
            self._shown, self._ahead = None, next(self._decoder, None)
            if self._ahead is not None and self._time(self._ahead) <= time:
                return

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._size
        # Via RGB: the video's colour metadata are applied here, so that the clips need not repeat them.
        # Area averaging takes half the time of bicubic scaling (which takes more than decoding) and does not alias.
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
        return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


def sample(footage: Footage, span: Span, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: the middle frames of `count` equal parts. Raises DataError."""
    return np.stack(list(footage.at(sample_times(span, count))))


def sample_times(span: Span, count: int) -> list[float]:
    """Seconds within the video."""
    return [span.start + (i + 0.5) * span.seconds / count for i in range(count)]


def encode(footage: Footage, span: Span, fps: float, quality: int) -> tuple[bytes, int, float]:
    """(mp4, frames, frames per second) of a clip at `fps`, at most the video's own rate; 0 keeps that rate.

    The same input gives the same bytes. Raises DataError when the video cannot be decoded.
    """
    rate = min(Fraction(fps).limit_denominator(1001), footage.rate) if fps else footage.rate
    count = max(1, round(span.seconds * rate))
    times = (span.start + i / float(rate) for i in range(count))
    return write_video(footage.at(times), rate, quality), count, float(rate)


def write_video(frames: Iterable[np.ndarray], rate: Fraction, quality: int) -> bytes:
    """An mp4 (h264, a key frame every `KEY_FRAMES`) of uint8 [H, W, 3] frames with even edges."""
    # With several threads the bytes depend on their number, and with macroblock trees on chance: up to thirteen files
    # in fifteen runs of one input.
    repeatable = {"threads": "1", "x264-params": "mbtree=0"}
    file = io.BytesIO()
    with Mp4Writer(
        file, rate, {"preset": "veryfast", "crf": str(quality), "g": str(KEY_FRAMES), **repeatable}
    ) as video:
        for pixels in frames:
            video.add(pixels)
    return file.getvalue()


class _named:
    """Turns errors that concern this video alone into a DataError; other errors of the file system pass through."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, _, error, __) -> None:
        # EINVAL: the search for a header went before the start of the file, as in an empty file.
        if isinstance(error, av.FFmpegError | FileNotFoundError | PermissionError | IsADirectoryError) or (
            isinstance(error, OSError) and error.errno == errno.EINVAL
        ):
            raise DataError(f"{self.path} cannot be read as a video ({shorten(error)})") from None
