"""What the pictures of one camera in one episode look like, from small copies of frames that are decoded anyway.

Every frame is reduced to the mean brightness of a few cells. Compression noise averages out in a cell; an arm that
moves does not. Nothing else is kept but a few numbers and a few of these small copies.
"""

from dataclasses import dataclass, field

import numpy as np

from data_pipelines.thumbnails import CELLS, brightness, small_copy

_PIXELS = 128  # along the shorter edge that cells are averaged over
KEPT = 4  # small copies kept of each episode, evenly spaced
_BLACK = 24.0  # brightness below which a cell is black: video's black is 16, and compression adds some
_FLAT = 2.5  # deviation of the pixels of a picture that has a single colour
_SAME = 1.5  # brightness by which cells of the same picture differ after compression
_MOVES = 3.0  # change of the most changed cell that something moving in the picture causes
_ENOUGH = 8  # changes from which a rhythm is told


@dataclass
class Look:
    """Takes the `count` pictures of an episode one by one.

    `still` is (first, number) of the longest run of pictures without a change; `copies` uint8 [cells] are those of at
    most KEPT evenly spaced frames, the same ones for every camera of the episode.
    """

    count: int
    seen: int = 0
    black: int = 0
    flat: int = 0
    still: tuple[int, int] = (0, 0)
    total: np.ndarray = field(default_factory=lambda: np.zeros(CELLS * CELLS))
    copies: list[np.ndarray] = field(default_factory=list)
    _changes: list[float] = field(default_factory=list)
    _last: np.ndarray | None = None
    _anchor: np.ndarray | None = None
    _since: int = 0

    def add(self, step: int, picture: np.ndarray) -> None:
        """The picture of `step`: RGB uint8 [H, W, 3], or its brightness uint8 [H, W]."""
        every = max(1, min(picture.shape[:2]) // _PIXELS)
        pixels = picture[::every, ::every]
        pixels = brightness(pixels) if pixels.ndim == 3 else pixels
        cells = small_copy(pixels)
        deviation = float(pixels.std())
        dark = bool(cells.max() < _BLACK)
        self.black += dark
        self.flat += not dark and deviation < _FLAT
        self.seen += 1
        self.total += cells
        if len(self.copies) < KEPT and step >= len(self.copies) * self.count // KEPT:
            self.copies.append(cells.round().astype(np.uint8))
        if self._last is not None:
            self._changes.append(float(np.abs(cells - self._last).max()))
        if self._anchor is None or np.abs(cells - self._anchor).max() > _SAME:
            self._anchor, self._since = cells, step
        if step - self._since + 1 > self.still[1]:
            self.still = (self._since, step - self._since + 1)
        self._last = cells

    @property
    def mean(self) -> np.ndarray:
        """float64 [cells]."""
        return self.total / max(self.seen, 1)

    @property
    def empty(self) -> bool:
        """Whether nearly all pictures are black or of a single colour."""
        return self.black + self.flat >= 0.9 * self.seen

    def repeats(self) -> int:
        """How often every picture occurs in a row, as a slower camera in a faster recording gives it; 1 if it does not.

        Compression may leave out small motions in every second frame, so only those count that it cannot.
        """
        changes = np.array(self._changes)
        for times in (3, 2):
            phases = [changes[first::times] for first in range(times)]
            moving = max(phases, key=lambda phase: float(np.median(phase)) if len(phase) else 0.0)
            large = moving[moving > _MOVES]
            others = np.concatenate([phase for phase in phases if phase is not moving])
            if len(large) < max(_ENOUGH, len(moving) // 2):
                continue
            if np.percentile(others, 95) <= min(_MOVES, 0.1 * float(np.median(large))):
                return times
        return 1


def alike(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether the `copies` of two cameras of an episode show the same pictures, but for compression."""
    if not a or len(a) != len(b):
        return False
    return all(np.abs(x.astype(float) - y).mean() < _SAME for x, y in zip(a, b, strict=True))
