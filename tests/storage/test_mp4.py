"""The one writer of videos."""

import io
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from rynnvla_jax.storage.mp4 import Mp4Writer, write_video
from tests import ROOT


def frames(count: int) -> list[np.ndarray]:
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return [np.roll(picture, 2 * i, axis=1) for i in range(count)]


@pytest.mark.parametrize("rate", [10, Fraction(30000, 1001)])
def test_rate_size_and_key_frames_are_those_asked_for(rate, tmp_path):
    write_video(tmp_path / "a.mp4", frames(50), rate, {"g": "10"})
    with av.open(str(tmp_path / "a.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == rate and (stream.height, stream.width) == (48, 64)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        decoded = list(video.decode(stream))
    assert len(decoded) == 50 and max(np.diff([i for i, f in enumerate(decoded) if f.key_frame])) <= 10


def test_files_in_memory_and_clock_of_the_container():
    file = io.BytesIO()
    with Mp4Writer(file, 30, {"threads": "1"}, {"video_track_timescale": "15360"}) as video:
        for frame in frames(3):
            video.add(frame)
    with av.open(io.BytesIO(file.getvalue())) as video:
        assert video.streams.video[0].time_base == Fraction(1, 15360) and video.streams.video[0].frames == 3


def test_a_video_is_whole_or_absent(tmp_path):
    def broken():
        yield from frames(5)
        raise KeyError

    with pytest.raises(KeyError):
        write_video(tmp_path / "a.mp4", broken(), 10)
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from rynnvla_jax.storage.mp4 import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # as a full disk
frames = (np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8) for i in range(200))
try:
    write_video(Path(sys.argv[1]), frames, 30)
except OSError as error:
    sys.exit(f"{type(error).__module__} {error}")
"""


def test_a_write_that_fails_is_an_error_with_the_path_and_not_the_end_of_the_process(tmp_path):
    file = tmp_path / "video.mp4"
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"builtins [Errno 27] File too large: '{file}'\n")
    assert list(tmp_path.iterdir()) == []
