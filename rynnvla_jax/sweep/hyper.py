"""Functions that define a sweep; a config file's `get_hyper(h)` gets this module as `h`. Like big_vision's `hyper`.

    def get_hyper(h):
        rates = h.sweep("optimizer.peak_lr", [1e-5, 2e-5])
        starts = h.chainit([h.named("scratch", h.fixed("init_from.path", "")), h.fixed("init_from.path", "stage1")])
        return h.product([starts, rates, h.sweep("seed", [0, 1])])  # 8 points

A point is a dict {dotted key of the config: value}; all functions return lists of points. `named` gives points a name.
"""

from collections.abc import Iterable
from functools import reduce
from itertools import product as pairs
from typing import Any

from rynnvla_jax.config import ConfigError


class Named(dict):
    """A point with `names`, which replace the keys in `told` in the name of its work dir."""

    def __init__(self, values: dict[str, Any], names: tuple[str, ...], told: frozenset[str]):
        super().__init__(values)
        self.names, self.told = names, told


Points = list[dict[str, Any]]


def sweep(key: str, values: Iterable[Any]) -> Points:
    """One point per value."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any) -> Points:
    """A single point with this value."""
    return sweep(key, [value])


def product(parts: Iterable[Points]) -> Points:
    """Every combination of one point from each part; the last part varies fastest.

    Raises:
      ConfigError: two parts set the same key.
    """
    return reduce(lambda a, b: [_joined(x, y) for x, y in pairs(a, b)], parts, [{}])


def zipit(parts: Iterable[Points]) -> Points:
    """The first points of all parts together, then the second ones, and so on.

    Raises:
      ConfigError: parts of different lengths, or two set the same key.
    """
    parts = list(parts)
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipit: its parts have {', '.join(map(str, lengths))} points; give all the same number")
    return [reduce(_joined, points) for points in zip(*parts, strict=True)]


def chainit(parts: Iterable[Points]) -> Points:
    """The points of all parts, one part after the other."""
    return [point for part in parts for point in part]


def named(name: str, points: Points) -> Points:
    """The same points with a name, which replaces their common keys in the names of work dirs."""
    first = points[0] if points else {}
    common = {key for key in first if all(key in p and p[key] == first[key] for p in points)}
    return [_joined(Named({}, (name,), frozenset(common)), point) for point in points]


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    if both := sorted(a.keys() & b.keys()):
        raise ConfigError(f"two parts of the sweep set {', '.join(both)}; leave it out of one")
    names = (*getattr(a, "names", ()), *getattr(b, "names", ()))
    told = getattr(a, "told", frozenset()) | getattr(b, "told", frozenset())
    return Named({**a, **b}, names, told) if names else {**a, **b}
