"""Statistics of relative actions and states over a whole data set.

Rules (as in the public code): all rows of the chunks of *every* start index count, including the shortened chunks at
the end; standard deviation with ddof 0; percentiles interpolate linearly. Departure: means are accumulated in float64,
and with more than `_PERCENTILE_ROWS` rows the percentiles use every k-th start.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.episode import DataError, Episodes
from data_pipelines.rows import Rows
from rynnvla_jax.actions import Statistics
from rynnvla_jax.config import PERCENTILES, ConfigError
from rynnvla_jax.progress import progress_bar

_PERCENTILE_ROWS = 20_000_000  # 0.5 GB of six numbers


def compute(
    sources: Sequence[Episodes],
    chunk: int,
    progress: bool = True,
    percentiles: tuple[float, float] = PERCENTILES,
    rows: Sequence[Rows | None] | None = None,
) -> Statistics:
    """Statistics of all episodes, which must be of one kind, for chunks of `chunk` steps; arrays in their unit.

    `rows`, one per source, are read instead of its episodes.

    Raises ConfigError when `chunk` is less than 1, DataError for motions that float32 cannot hold.
    """
    if chunk < 1:
        raise ConfigError(
            f"a chunk of {chunk} steps contains no action; set data.chunk (in `data stats`: --chunk) to 1 or more"
        )
    first = sources[0][0]
    steps = sum(int(source.lengths.sum(dtype=np.int64)) for source in sources)
    stride = -(-steps * chunk // _PERCENTILE_ROWS)
    actions, states = RunningMoments(), RunningMoments()
    sample = []
    with progress_bar(total=steps, desc="statistics", unit="step", show=progress) as bar:
        seen = 0
        for source, kept, number in _every(sources, rows):
            episode = source[number] if kept is None else kept.episode(number)
            starts = np.arange(len(episode))
            relative = episode.chunks(starts, chunk)
            inside = starts[:, None] + np.arange(chunk) < len(episode)  # of the shortened chunks at the end
            moves = relative[inside]
            if not np.isfinite(moves).all():
                name = source[number].name
                raise DataError(f"{name}: a relative action is too large for float32; leave the episode out")
            sampled = slice(-seen % stride, None, stride)
            sample.append(relative[sampled][inside[sampled]])
            seen += len(episode)
            actions.add(moves)
            states.add(episode.state)
            bar.update(len(episode))
    low, high = np.percentile(np.concatenate(sample), percentiles, axis=0)
    return Statistics(
        rel_min_action=low.astype(np.float64),
        rel_max_action=high.astype(np.float64),
        rel_mean_action=actions.mean,
        rel_std_action=actions.std,
        mean_state=states.mean,
        std_state=states.std,
        columns=first.columns,
        percentiles=percentiles,
    )


def _every(
    sources: Sequence[Episodes], rows: Sequence[Rows | None] | None
) -> Iterator[tuple[Episodes, Rows | None, int]]:
    """(source, its rows, number) of each episode."""
    for source, kept in zip(sources, rows or [None] * len(sources), strict=True):
        for number in range(len(source)):
            yield source, kept, number


class RunningMoments:
    """Mean, standard deviation (ddof 0), minimum and maximum of rows [N, A] by column, float64 [A], added in parts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: np.ndarray) -> None:
        if not self.count:
            # Deviations are taken from a fixed row: sums of squares of large offsets would lose digits.
            self._shift = rows[0].astype(np.float64)
            self._total = self._squares = np.zeros(rows.shape[1])
            self._low = self._high = rows[0]
        moved = rows - self._shift
        self.count += len(rows)
        self._total, self._squares = self._total + moved.sum(0), self._squares + (moved**2).sum(0)
        self._low, self._high = np.minimum(self._low, rows.min(0)), np.maximum(self._high, rows.max(0))

    @property
    def mean(self) -> np.ndarray:
        return self._total / self.count + self._shift

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self._squares / self.count - (self._total / self.count) ** 2, 0))

    @property
    def low(self) -> np.ndarray:
        return self._low.astype(np.float64)

    @property
    def high(self) -> np.ndarray:
        return self._high.astype(np.float64)
