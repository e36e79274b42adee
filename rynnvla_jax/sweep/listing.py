"""Lists the checked points of a sweep: all their faults in one message, or a table of the points."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rynnvla_jax import metric
from rynnvla_jax.config import ConfigError, to_dict
from rynnvla_jax.sweep import check, plan, run
from rynnvla_jax.sweep.plan import Definition, Point


def checked(
    definition: Definition,
    listed: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    parallel: int = 1,
    pod: check.Pod | None = None,
    files: bool = True,
    devices: int | None = None,
    some: bool = False,
) -> tuple[list[Point], check.Found]:
    """The points of a sweep and the results of their check; see `check.ask`.

    Args:
      some: not all points need to be valid: those of a search are samples. The others are said and left out.

    Raises:
      ConfigError: names every fault of every point.
    """
    points, faults = plan.resolve(definition, listed)
    if not points:
        raise ConfigError(describe(faults, len(listed)))
    workdirs = [out / p.name for p in points]
    found = check.ask([p.config for p in points], workdirs, parallel, pod, files, devices)
    faults += [(p.number, f) for p, v in zip(points, found.verdicts, strict=True) for f in v.faults]
    good = [(p, v) for p, v in zip(points, found.verdicts, strict=True) if not v.faults]
    if faults and not (some and good):
        raise ConfigError(describe(faults, len(listed)))
    if faults:
        print(describe(faults, len(listed), "such trials will count as failed"), file=sys.stderr, flush=True)
    return [p for p, _ in good], replace(found, verdicts=[v for _, v in good])


def describe(faults: Sequence[tuple[int, str]], total: int, follows: str = "nothing was started") -> str:
    """All faults in one message, each once, with the points that have it."""
    where: dict[str, list[int]] = {}
    for number, text in sorted(faults, key=lambda fault: fault[0]):
        where.setdefault(text, []).append(number)
    bad = {number for number, _ in faults}
    lines = [f"{len(bad)} of {total} points are invalid; {follows}"]
    for text, numbers in where.items():
        whose = "all" if len(numbers) == total > 1 else ", ".join(f"{n:03d}" for n in numbers)
        lines.append(f"  {whose}: {text}")
    return "\n".join(lines)


def chosen_metric(asked: str | None, found: check.Found) -> str:
    """The metric that decides: the one that is asked for, or else `metric.deciding`; says which on stderr, and why.

    Raises:
      ConfigError: not every run writes it.
    """
    known = sorted(set.intersection(*(set(verdict.metrics) for verdict in found.verdicts)))
    chosen = asked or metric.deciding(known)
    if chosen not in known:
        raise ConfigError(f"--metric {chosen} is not logged by all of these runs; choose one of {', '.join(known)}")
    print(metric.decides(chosen, "as --metric says" if asked else ""), file=sys.stderr, flush=True)
    return chosen


def table(points: Sequence[Point], verdicts: Sequence[check.Verdict], utilization: float, out: Path) -> str:
    """The points as a table: name, differing keys, memory and hours on a pod, and progress."""
    keys = plan.differing(points)
    flat = [plan.flattened(to_dict(p.config)) for p in points]
    columns = [["point", *(p.name for p in points)]]
    columns += [[plan.short(key), *(plan.brief(f[key]) for f in flat)] for key in keys]
    if any(v.hbm is not None for v in verdicts):
        columns.append(["GiB per chip", *(f"{v.hbm:.2f}" for v in verdicts)])
    if any(v.chip_hours for v in verdicts):
        hours = ["-" if v.chip_hours is None else " to ".join(f"{h:,.1f}" for h in v.chip_hours) for v in verdicts]
        columns.append(["chip hours (compiler's estimate, not measured on a TPU)", *hours])
    if any(v.chip_hours_at_peak for v in verdicts):
        at_peak = [v.chip_hours_at_peak and v.chip_hours_at_peak / utilization for v in verdicts]
        title = f"chip hours at {utilization:.0%} of peak"
        columns.append([title, *("-" if h is None else f"{h:,.1f}" for h in at_peak)])
    states = ["finished" if p.finished(out) else "started" if (out / p.name).exists() else "" for p in points]
    if any(states):
        columns.append(["state", *states])
    return run.table(list(zip(*columns, strict=True)))
