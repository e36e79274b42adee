"""Statistics of relative actions and states over a whole data set.

Rules (public code, section 6 of the method's reference): over all rows of all chunks of *every* start index, the
shortened ones at the end included; standard deviation with ddof 0; percentiles interpolate linearly. Departure:
means are accumulated in float64, and beyond `_PERCENTILE_ROWS` rows the percentiles use every k-th start.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from tqdm import tqdm

from data_pipelines.episode import Episodes
from rynnvla_jax.actions import Statistics
from rynnvla_jax.config import ConfigError

_PERCENTILE_ROWS = 20_000_000  # 0.5 GB of six numbers


def compute(sources: Sequence[Episodes], chunk: int, progress: bool = True) -> Statistics:
    """Statistics of all episodes, which are of one kind, for chunks of `chunk` steps; arrays in their unit.

    Raises ConfigError when `chunk` is no number of steps.
    """
    if chunk < 1:
        raise ConfigError(f"a chunk of {chunk} steps has no action; set data.chunk or --chunk to 1 or more")
    first = sources[0][0]
    steps = sum(int(source.lengths.sum(dtype=np.int64)) for source in sources)
    stride = -(-steps * chunk // _PERCENTILE_ROWS)
    count, total, squares = 0, np.zeros(first.action.shape[1]), np.zeros(first.action.shape[1])
    states, state_total = 0, np.zeros(first.state.shape[1])
    state_squares = np.zeros(first.state.shape[1])
    # Deviations are taken from a fixed row: sums of squares of large offsets would lose digits.
    shift, state_shift = first.chunk(0, 1)[0].astype(np.float64), first.state[0].astype(np.float64)
    sample = []
    with tqdm(total=steps, desc="statistics", unit="step", disable=None if progress else True) as bar:
        seen = 0
        for episode in chain.from_iterable(sources):
            rows = []
            for start in range(len(episode)):
                rows.append(episode.chunk(start, chunk))
                if seen % stride == 0:
                    sample.append(rows[-1])
                seen += 1
            flat = np.concatenate(rows) - shift
            count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
            state = episode.state - state_shift
            states, state_total = states + len(state), state_total + state.sum(0)
            state_squares = state_squares + (state**2).sum(0)
            bar.update(len(episode))
    low, high = np.percentile(np.concatenate(sample), [1, 99], axis=0)
    mean, state_mean = total / count, state_total / states
    return Statistics(
        rel_min_action=low.astype(np.float64),
        rel_max_action=high.astype(np.float64),
        rel_mean_action=mean + shift,
        rel_std_action=np.sqrt(np.maximum(squares / count - mean**2, 0)),
        mean_state=state_mean + state_shift,
        std_state=np.sqrt(np.maximum(state_squares / states - state_mean**2, 0)),
        unit=first.unit,
        absolute=first.absolute,
    )
