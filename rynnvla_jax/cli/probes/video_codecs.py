"""PyAV's FFmpeg has the codecs that data sets and recordings use. Answers the list of those that it lacks."""

import io
from typing import Literal

import av
import numpy as np

from rynnvla_jax.cli.probes import answer

CODECS: tuple[tuple[str, tuple[str, ...], Literal["r", "w"]], ...] = (
    ("AV1 decoder", ("libdav1d", "libaom-av1"), "r"),
    ("H.264 decoder", ("h264",), "r"),
    ("HEVC decoder", ("hevc",), "r"),
    ("H.264 encoder", ("libx264",), "w"),
)


def has(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        av.codec.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def write_and_read() -> None:
    """One frame through the encoder and back."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
        # The encoder holds frames back to look ahead; encode() without a frame makes it give them up.
        for packet in (*stream.encode(frame), *stream.encode()):
            out.mux(packet)
    file.seek(0)
    with av.open(file, "r") as back:
        assert len(list(back.decode(video=0))) == 1, "a frame that was encoded did not come back"


lacking = [f"{what} ({' or '.join(names)})" for what, names, mode in CODECS if not any(has(n, mode) for n in names)]
if not lacking:
    write_and_read()
answer(lacking)
