"""95 % confidence intervals of measured rates and means."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; `low` and `high` equal `value` if there is no interval."""

    value: float
    low: float
    high: float


def share(successes: int, count: int) -> Estimate:
    """successes / count, with Wilson's interval."""
    interval = stats.binomtest(int(successes), count).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(successes / count, float(interval.low), float(interval.high))


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with Student's t-interval; of one value, the value alone."""
    value = float(np.mean(values))
    if len(values) < 2:
        return Estimate(value, value, value)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Estimate(value, value - half, value + half)
