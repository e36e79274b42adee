"""Findings of a validation: how they are collected and printed, and the list of episodes to leave out."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rynnvla_jax.storage import bucket_cache

SHOWN = 5  # findings printed of each check


@dataclass(frozen=True)
class Finding:
    """One fault. `index` is the row, step or frame within `file`, counted from 0; None means the whole file.

    `episodes` are the names of the episodes to leave out to remove the fault; () when leaving out does not help.
    """

    severity: str  # "error": training would stop or learn something wrong; "warning": check it by eye
    check: str
    file: str
    index: int | None
    message: str
    episodes: tuple[str, ...] = ()

    def line(self) -> str:
        where = self.file if self.index is None else f"{self.file}[{self.index}]"
        return f"{self.severity:<7}  {where}: {self.message}"


class Enough(Exception):
    """Raised when the requested number of errors was found."""


@dataclass
class Findings:
    """Collects findings, figures of the whole data set, and counts what was checked.

    Raises `Enough` at error number `stop_after` (0: never).

    A finding that concerns only the episodes `left_out` is not kept.
    """

    stop_after: int = 0
    left_out: set[str] = field(default_factory=set)
    found: list[Finding] = field(default_factory=list)
    looked_at: Counter = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        return sum(f.severity == "error" for f in self.found)

    def error(self, check: str, file: Path | str, index: int | None, message: str, episodes=()) -> None:
        self._add("error", check, file, index, message, episodes)
        if self.stop_after and self.errors >= self.stop_after:
            raise Enough

    def warn(self, check: str, file: Path | str, index: int | None, message: str, episodes=()) -> None:
        self._add("warning", check, file, index, message, episodes)

    def _add(self, severity: str, check: str, file: Path | str, index: int | None, message: str, episodes) -> None:
        rest = tuple(name for name in episodes if name not in self.left_out)
        if rest or not episodes:
            file, message = bucket_cache.named(str(file)), bucket_cache.named(message)
            self.found.append(Finding(severity, check, file, _int(index), message, rest))

    def summary(self) -> dict:
        """Counts, for JSON."""
        checks: dict[str, dict[str, int]] = {}
        for f in self.found:
            counts = checks.setdefault(f.check, {"error": 0, "warning": 0})
            counts[f.severity] += 1
        errors = self.errors
        return {
            "errors": errors,
            "warnings": len(self.found) - errors,
            "checks": checks,
            "looked_at": dict(self.looked_at),
            "figures": dict(self.figures),
        }

    def lines_of_json(self) -> Iterator[str]:
        """One JSON object per finding."""
        for f in self.found:
            yield json.dumps(asdict(f))

    def table(self) -> Iterator[str]:
        """Lines for a terminal: checks with counts, then the first findings of each."""
        checks = self.summary()["checks"]
        if checks:
            yield f"{'check':<{_width(checks)}}  {'errors':>7}  {'warnings':>8}"
        order = sorted(checks, key=lambda c: (-checks[c]["error"], c))
        for check in order:
            yield f"{check:<{_width(checks)}}  {checks[check]['error']:>7}  {checks[check]['warning']:>8}"
        for check in order:
            these = sorted((f for f in self.found if f.check == check), key=lambda f: f.severity)
            yield f"\n{check}"
            yield from (f"  {f.line()}" for f in these[:SHOWN])
            if len(these) > SHOWN:
                yield f"  ... and {len(these) - SHOWN} more (--json lists all)"

    def exclude(self, source: str) -> tuple[dict, list[Finding]]:
        """(content of the exclude file, including `left_out`; errors that remain when these episodes are left out)."""
        errors = [f for f in self.found if f.severity == "error"]
        names = self.left_out.union(name for f in errors for name in f.episodes)
        return {"episodes": {source: sorted(names)}}, [f for f in errors if not f.episodes]


def _int(index) -> int | None:
    return None if index is None else int(index)


def _width(checks: dict) -> int:
    return max(map(len, (*checks, "check")))
