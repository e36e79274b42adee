"""Writes h264 videos in mp4 files."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from rynnvla_jax.storage import files

# Random access decodes at most so many frames: one of a clip costs 60 ms with 30 and 290 ms with 250.
KEY_FRAMES = 30


class Mp4Writer:
    """Encodes frames of one size, with even edges, as yuv420p; a context manager.

    Args:
      file: a path, or an open binary file.
      rate: frames per second.
      options: x264's: crf, preset, g (frames between key frames), ... ; its own defaults where not given.
      container: the mp4 format's options.
    """

    def __init__(
        self,
        file: Path | BinaryIO,
        rate: Fraction | int,
        options: Mapping[str, str] | None = None,
        container: Mapping[str, str] | None = None,
    ):
        target = str(file) if isinstance(file, Path) else file
        self._container = av.open(target, "w", format="mp4", options=dict(container or {}))
        self._stream = self._container.add_stream("libx264", rate=rate, options=dict(options or {}))
        self._stream.pix_fmt = "yuv420p"
        self._time_base = Fraction(1) / Fraction(rate)
        self._stream.codec_context.time_base = self._time_base
        self._count = 0

    def __enter__(self) -> "Mp4Writer":
        return self

    def add(self, frame: np.ndarray | av.VideoFrame) -> None:
        """uint8 RGB [H, W, 3], or a decoded frame of the right size."""
        if isinstance(frame, np.ndarray):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if not self._count:
            self._stream.height, self._stream.width = frame.height, frame.width
        frame.pts, frame.time_base = self._count, self._time_base
        self._container.mux(self._stream.encode(frame))
        self._count += 1

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:  # after an error of a write (a full disk) finishing the file ends the process
            return
        if self._count:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def write_video(
    path: Path, frames: Iterable[np.ndarray], rate: Fraction | int, options: Mapping[str, str] | None = None
) -> None:
    """uint8 RGB [H, W, 3] frames to an mp4 file, whole or not at all."""
    with files.replacing(path) as partial, Mp4Writer(partial, rate, options) as video:
        for frame in frames:
            video.add(frame)
