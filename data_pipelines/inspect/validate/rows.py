"""Checks of states and actions for every source: not finite, constant, outliers, duplicates, different units."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.inspect.validate.findings import Findings
from rynnvla_jax.columns import Column, Columns

# Far out: this many times the spread (the larger of the quartiles' distance and half that of the 1st and 99th
# percentile) from the median. For a uniform column that is twice the whole range away; for a normal one 9 sigma.
_FAR = 4.0
_UNIT_RATIO = 20.0  # degrees are 57 times radians
_SAMPLE_ROWS = 1_000_000
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Location:
    """The location of an episode's rows: row 0 of the episode is row `first` of `file`."""

    episode: str
    file: Path | str
    first: int = 0


@dataclass(frozen=True)
class _Extremes:
    """Of one column group of one episode, by column [A]; rows are those of the episode."""

    location: Location
    low: np.ndarray
    low_at: np.ndarray
    high: np.ndarray
    high_at: np.ndarray


class Rows:
    """Takes episodes one by one, holds a few numbers of each, and compares them with the whole set in `finish`."""

    def __init__(self, findings: Findings, columns: Columns):
        self._findings, self._columns = findings, columns
        self._extremes: dict[str, list[_Extremes]] = {}
        self._sample: dict[str, list[np.ndarray]] = {}
        self._sampled, self._stride = 0, 1
        self._digests: dict[bytes, Location] = {}

    def add(self, location: Location, state: np.ndarray, action: np.ndarray, origin: np.ndarray | None = None) -> None:
        """state [N, S], action [N, A] of one episode. `origin` [N, A]: actions are positions in a frame of the
        episode's own (EgoDex), so that only motions are compared between episodes."""
        for what, values in (("state", state), ("action", action)):
            if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
                self._findings.error(
                    "finite",
                    location.file,
                    location.first + bad[0],
                    f"{location.episode}: {what} is not finite at step {bad[0]} ({len(bad)} steps in total)",
                    [location.episode],
                )
                return
        if not len(action):
            return
        digest = hashlib.blake2b(state.tobytes() + action.tobytes(), digest_size=16).digest()
        first = self._digests.setdefault(digest, location)
        if first is not location:
            self._findings.error(
                "duplicate",
                location.file,
                location.first,
                f"{location.episode} has the same states and actions as {first.episode} ({first.file})",
                [location.episode],
            )
        groups = {"state": state} if state.shape[1] else {}
        if origin is None:
            groups["action"] = action
        relative = list(self._columns.relative)
        if relative:
            origin = self._columns.origin(state) if origin is None else origin
            steps = np.zeros_like(action)
            steps[:, relative] = (action - origin)[:, relative]
            groups["step to the target"] = steps
        for name, values in groups.items():
            self._extremes.setdefault(name, []).append(
                _Extremes(location, values.min(0), values.argmin(0), values.max(0), values.argmax(0))
            )
            self._sample.setdefault(name, []).append(values[:: self._stride].astype(np.float32))
        self._sampled += -(-len(action) // self._stride)
        if self._sampled > _SAMPLE_ROWS:  # from here on every second row is enough
            self._sample = {name: [v[::2] for v in parts] for name, parts in self._sample.items()}
            self._sampled, self._stride = self._sampled // 2, self._stride * 2

    def finish(self) -> None:
        """Compares every episode with the whole data set."""
        for name, episodes in self._extremes.items():
            values = np.concatenate(self._sample[name])
            self._constant(name, episodes)
            self._far(name, episodes, values)
        for name in ("state", "action"):
            self._units(name, self._extremes.get(name, []))

    def declared(self, name: str, low: np.ndarray, high: np.ndarray, where: Path | str) -> None:
        """Warns where "state" or "action" leaves the range that the metadata `where` declares."""
        slack = 1e-4 * np.maximum(high - low, 1e-3)
        for e in self._extremes.get(name, []):
            if low.shape == e.low.shape == high.shape:
                below, above = low - slack - e.low, e.high - high - slack
                self._out(name, e, below > 0, above > 0, f"outside {{low:.4g}} .. {{high:.4g}} of {where}", low, high)

    def _far(self, name: str, episodes: list[_Extremes], values: np.ndarray) -> None:
        p1, q1, middle, q3, p99 = np.percentile(values, [1, 25, 50, 75, 99], axis=0)
        spread = np.maximum(q3 - q1, (p99 - p1) / 2)
        low, high = middle - _FAR * spread, middle + _FAR * spread
        moves = spread > _CONSTANT  # a constant column has no scale for outliers
        text = "far from the data set's {low:.4g} .. {high:.4g} (1st to 99th percentile)"
        for e in episodes:
            self._out(name, e, moves & (e.low < low), moves & (e.high > high), text, p1, p99)

    def _out(self, name, e: _Extremes, below, above, text: str, low, high) -> None:
        for at, extreme, out in ((e.low_at, e.low, below), (e.high_at, e.high, above)):
            for column in np.flatnonzero(out).tolist():
                limits = text.format(low=low[column], high=high[column])
                self._findings.warn(
                    "range",
                    e.location.file,
                    e.location.first + at[column],
                    f"{e.location.episode}: {name} of {self._name(name, column)} is {extreme[column]:.4g} "
                    f"at step {at[column]}, {limits}",
                    [e.location.episode],
                )

    def _constant(self, name: str, episodes: list[_Extremes]) -> None:
        if name == "step to the target" and "action" in self._extremes:
            return  # adds no information
        still = np.stack([e.high - e.low <= _CONSTANT for e in episodes])
        everywhere = still.all(0) & (np.ptp([e.low for e in episodes], axis=0) <= _CONSTANT)
        if everywhere.any():
            message = f"{name} of {self._which(name, everywhere)} never changes in the whole data set"
            self._findings.warn("constant", episodes[0].location.file, None, message)
        for e, row in zip(episodes, still & ~everywhere, strict=True):
            if row.any():
                message = f"{e.location.episode}: {name} of {self._which(name, row)} never changes"
                self._findings.warn("constant", e.location.file, e.location.first, message, [e.location.episode])

    def _units(self, name: str, episodes: list[_Extremes]) -> None:
        """Finds wrong units (degrees among radians): most columns of an episode differ by a large factor."""
        if len(episodes) < 2:
            return
        sizes = np.stack([np.maximum(np.abs(e.low), np.abs(e.high)) for e in episodes]).astype(np.float64)
        usual = np.median(sizes, axis=0)
        used = usual > _CONSTANT
        if not used.any():
            return
        ratios = np.median(sizes[:, used] / usual[used], axis=1)
        for e, ratio in zip(episodes, ratios, strict=True):
            if ratio > _UNIT_RATIO or ratio < 1 / _UNIT_RATIO:
                self._findings.warn(
                    "units",
                    e.location.file,
                    e.location.first,
                    f"{e.location.episode}: {name} is {ratio:.3g} times as large as in other "
                    "episodes; is it in another unit?",
                    [e.location.episode],
                )

    def _which(self, group: str, mask: np.ndarray) -> str:
        return ", ".join(self._name(group, c) for c in np.flatnonzero(mask).tolist())

    def _name(self, group: str, column: int) -> str:
        columns: Sequence[Column] = self._columns.state if group == "state" else self._columns.action
        return columns[column].name.replace("_", " ") or f"column {column}"
