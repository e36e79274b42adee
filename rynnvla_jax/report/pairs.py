"""Which configuration is better: differences of runs that were paired by their seed.

Runs of one seed see the same examples in the same order with the same draws, so their difference varies less between
seeds than the runs do. The best configuration by mean is compared with each of the others; the interval is that of each
comparison alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rynnvla_jax import intervals
from rynnvla_jax.intervals import Estimate
from rynnvla_jax.metric import has_best, higher_is_better
from rynnvla_jax.report.compare import Group

FEWEST = 3  # runs: the 95 % interval of two is twelve times as wide as their difference


@dataclass(frozen=True)
class Pair:
    """The best group against another one: how much better it is in a metric, over the seeds that both have finished."""

    best: Group
    other: Group
    seeds: list[int]
    difference: Estimate | None  # positive: the best one is better; None below FEWEST seeds

    @property
    def separated(self) -> bool:
        """Whether the 95 % interval of the difference leaves zero out."""
        return self.difference is not None and self.difference.low > 0

    def __str__(self) -> str:
        if self.difference is None:
            few = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)} in common, fewer than {FEWEST}"
            return f"{self.best.label} and {self.other.label} are not separated: {few}"
        found = self.difference
        size = f"{found.value:.3g} ± {found.high - found.value:.2g} over {len(self.seeds)} seeds"
        if self.separated:
            return f"{self.best.label} beats {self.other.label} by {size}"
        return f"{self.best.label} and {self.other.label} are not separated: {size}"


def pairs(groups: Sequence[Group], metric: str) -> list[Pair]:
    """The group with the best mean against each of the others that have finished runs, the closest first."""
    means = {i: intervals.mean(found).value for i, group in enumerate(groups) if (found := group.finals(metric))}
    if len(means) < 2 or not has_best(metric):
        return []
    order = sorted(means, key=lambda i: means[i], reverse=higher_is_better(metric))
    return [_pair(groups[order[0]], groups[i], metric) for i in order[1:]]


def best(groups: Sequence[Group], metric: str) -> Group | None:
    """The group that is separated from every other one; None where there is none."""
    found = pairs(groups, metric)
    return found[0].best if found and all(pair.separated for pair in found) else None


def _pair(first: Group, other: Group, metric: str) -> Pair:
    ours, theirs = first.by_seed(metric), other.by_seed(metric)
    seeds = sorted(ours.keys() & theirs.keys())
    sign = 1 if higher_is_better(metric) else -1
    differences = [sign * (ours[seed] - theirs[seed]) for seed in seeds]
    return Pair(first, other, seeds, intervals.mean(differences) if len(seeds) >= FEWEST else None)
