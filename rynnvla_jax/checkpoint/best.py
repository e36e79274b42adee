"""The best step of a run by a metric of held-out data (`checkpoint.keep_best`): the lowest value, of accuracies the
highest; of equal values the first one.

Every checkpoint stores in its `data` item which step was the best when it was saved. So a run that continues knows it
from the checkpoint alone, and decides as if it had not been stopped.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rynnvla_jax.metric import EVAL, higher_is_better

ITEM = "best"  # in the `data` item of a checkpoint


@dataclass(frozen=True)
class Best:
    """A step that is saved, or about to be, and the value of the metric there."""

    metric: str  # eval/NAME
    step: int
    value: float

    def beats(self, other: "Best | None") -> bool:
        """Whether it is better than an earlier one. A value that is NaN or infinite never is."""
        if not math.isfinite(self.value) or other is None:
            return math.isfinite(self.value)
        return self.value > other.value if higher_is_better(self.metric) else self.value < other.value


def evaluated(metric: str, step: int, values: dict[str, float]) -> Best:
    """The candidate that the metrics of an evaluation make of a step; its value is NaN where the metric is missing."""
    return Best(metric, step, values.get(metric.removeprefix(EVAL), math.nan))


class Bests:
    """The best steps of a run that trains, oldest first: the last one whose save is known to be good, and later ones.

    All of them are kept: it is a preservation policy of Orbax.
    """

    def __init__(self) -> None:
        self._found: list[Best] = []

    @property
    def best(self) -> Best | None:
        return self._found[-1] if self._found else None

    def restart(self, best: Best | None) -> None:
        """The run continues where this is the best."""
        self._found = [best] if best else []

    def add(self, best: Best) -> None:
        self._found.append(best)

    def saved(self, step: int, good: bool) -> None:
        """The save of a step has ended: earlier bests are not needed any more, or this one is not there."""
        if not good:
            self._found = [best for best in self._found if best.step != step]
        elif sure := [best for best in self._found if best.step <= step]:
            self._found = self._found[self._found.index(sure[-1]) :]

    def limit(self, there: Collection[int]) -> None:
        """Only these steps are there."""
        self._found = [best for best in self._found if best.step in there]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of Orbax's checkpoints is one of them."""
        return [any(best.step == info.step for best in self._found) for info in checkpoints]


def stored(data: dict[str, Any] | None) -> Best | None:
    """The best step that the `data` item of a checkpoint names, if it names one."""
    return Best(**data[ITEM]) if data and data.get(ITEM) else None


def to_json(best: Best | None) -> dict[str, Any]:
    """For the `data` item of a checkpoint."""
    return {ITEM: asdict(best)} if best else {}
