"""Where the episodes of a LeRobot data set lie in a video file that they share.

The metadata say at what time each begins. Those times drift, and so do the time stamps of a file that was joined from
others: LeRobot's join leaves some milliseconds between two parts. Counting does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SAME = 0.75  # frames that a time may be off before it means another frame
_DRIFT = 0.1  # seconds that a file may lose or gain from one episode to the next


@dataclass(frozen=True)
class Segment:
    """An episode of `length` frames that is said to begin at `start` seconds; `trusted`: it is not left out."""

    start: float
    length: int
    trusted: bool


@dataclass(frozen=True)
class Placed:
    """The first frame of each segment; `in_order`: they are counted, and together they are all frames of the file."""

    firsts: list[int]
    in_order: bool


def placed(segments: Sequence[Segment], frames: int, fps: float) -> Placed:
    """The segments, in order of their episodes, in a file of `frames` frames.

    Where the file has as many frames as its episodes have rows, they are counted, and the times only confirm the order.
    Otherwise a time is rounded to a frame, unless the episode follows the one before. A segment that is not trusted is
    counted, but its time is not used.
    """
    lengths = np.array([s.length for s in segments], np.int64)
    counted = np.concatenate([[0], np.cumsum(lengths)])
    if counted[-1] == frames and _confirmed(segments, counted, fps):
        return Placed(counted[:-1].tolist(), True)
    firsts, end = [], 0
    for segment in segments:
        at = segment.start * fps
        first = end if abs(at - end) < _SAME else round(at)
        firsts.append(first)
        end = first + segment.length
    return Placed(firsts, False)


def _confirmed(segments: Sequence[Segment], counted: np.ndarray, fps: float) -> bool:
    """Whether the times of trusted segments are as far apart as their frames, up to a drift for each one between."""
    before, late = -1, 0.0
    for i, segment in enumerate(segments):
        if segment.trusted:
            now = segment.start - counted[i] / fps
            if abs(now - late) > _DRIFT * (i - before):
                return False
            before, late = i, now
    return True
