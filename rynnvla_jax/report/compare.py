"""Compares runs: their differing config keys and their results.

    final  mean of the last tenth of the logged lines of a run (at least one line; values that are not finite left out)
    best   lowest single logged value, or highest where higher is better

Runs whose configurations differ only in `seed` form a group: mean and 95 % t-interval over the final values of its
finished runs. A seed counts once: runs that repeat it form a separate group. `pairs.py` tells which group is better.
"""

import csv
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.config import to_dict
from rynnvla_jax.errors import did_you_mean
from rynnvla_jax.metric import decides, deciding, has_best, higher_is_better
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.report import figures, page
from rynnvla_jax.report.page import ReportError, Run
from rynnvla_jax.storage import files
from rynnvla_jax.sweep import plan
from rynnvla_jax.train import metrics as metrics_lib

NO_RESULTS = ("learning_rate", "skipped")  # drawn, but no column


@dataclass(frozen=True)
class Row:
    """One run. `keys` is its whole configuration, dotted; `lines` are the logged metrics, those of held-out data as
    "eval/NAME"; `final` and `best` (value, step) by metric."""

    run: Run
    name: str
    event: str  # what the sweep last noted of it: failed, pruned, ...; "" outside of sweeps
    keys: dict[str, Any]
    lines: list[dict[str, float]]
    final: dict[str, float]
    best: dict[str, tuple[float, int]]
    attempts: list[dict[str, Any]]
    trial: int | None = None  # its number in a search

    @property
    def outcome(self) -> str:
        """finished, failed, pruned, or "": under way."""
        return "finished" if self.finished else self.event if self.event in ("failed", "pruned") else ""

    @property
    def finished(self) -> bool:
        return self.run.step >= self.run.config.total_steps

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        event = f"{self.event}, " if self.event in ("failed", "pruned", "interrupted") else ""
        return f"{event}step {self.run.step} of {self.run.config.total_steps}"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, at least one."""

    label: str
    rows: list[Row]

    def finals(self, metric: str) -> list[float]:
        """Of the finished runs."""
        return list(self.by_seed(metric).values())

    def by_seed(self, metric: str) -> dict[int, float]:
        """The same, by seed."""
        done = [r for r in self.rows if r.finished and math.isfinite(r.final.get(metric, math.nan))]
        return {r.keys["seed"]: r.final[metric] for r in done}


def find(directories: Iterable[Path]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Work dirs, each with the last event that its sweep logged, and points of sweeps that have no work dir yet.

    A directory that is not a work dir means the work dirs directly in it.

    Raises:
      ReportError: a directory does not exist, or contains no work dir.
    """
    found: dict[Path, str] = {}
    missing = []
    for directory in map(files.place, directories):
        if _is_run(directory):
            found.setdefault(directory.resolve(), "")
            continue
        if not directory.is_dir():
            raise ReportError(f"{directory} is not a directory; pass work dirs of `rynnvla train` or sweep directories")
        points = {point["name"]: "" for point in (plan.recalled(directory) or {"points": []})["points"]}
        for line in page.read_lines(directory / "status.jsonl"):
            points[line["point"]] = line["event"]
        inside = sorted(path for path in directory.iterdir() if _is_run(path))
        if not inside:
            raise ReportError(
                f"{directory} is not a work dir of `rynnvla train` (assets/config.json is missing) and contains none"
            )
        found |= {path.resolve(): points.pop(path.name, "") for path in inside}
        missing += [f"{name} ({event})" if event else name for name, event in points.items()]
    return list(found.items()), missing


def _is_run(directory: Path) -> bool:
    return (directory / "assets" / "config.json").exists()


def read(directories: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The runs, in the order given, and points without a work dir. Raises ReportError, ConfigError."""
    found, missing = find(directories)
    paths = [path for path, _ in found]
    searches = {parent for parent in {path.parent for path in paths} if (plan.recalled(parent) or {}).get("search")}
    rows = []
    for path, event in progress_bar(found, desc="compare", unit="run"):
        run = page.read_run(path)
        lines = metrics_lib.with_held_out(run.metrics, run.evaluations)
        keys = plan.flattened(to_dict(run.config))
        trial = int(path.name.partition("_")[0]) if path.parent in searches else None
        attempts = provenance.attempts(path)
        rows.append(Row(run, _name(path, paths), event, keys, lines, *results(lines), attempts, trial))
    return rows, missing


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The shortest suffix of a path that is unique among `paths`."""
    ends = (path.parts[-n:] for n in range(1, len(path.parts)))
    own = next((end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1), path.parts)
    return str(Path(*own))


def results(lines: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, tuple[float, int]]]:
    """(final, best) of every metric; NaN if no value of the last tenth is finite."""
    final, best = {}, {}
    for name in sorted({key for line in lines for key in line} - {"step"}):
        own = [line for line in lines if name in line]
        final[name] = metrics_lib.final([line[name] for line in own])
        sound = [(line[name], int(line["step"])) for line in own if math.isfinite(line[name])]
        if sound and has_best(name):
            best[name] = better(name)(sound, key=lambda pair: pair[0])
    return final, best


def better(metric: str) -> Callable:
    """`max` or `min`."""
    return max if higher_is_better(metric) else min


def differing(rows: Sequence[Row]) -> list[str]:
    """Keys whose values are not the same in all runs, in the order of the configuration."""
    keys = dict.fromkeys(key for row in rows for key in row.keys)
    return [k for k in keys if any(row.keys.get(k) != rows[0].keys.get(k) for row in rows)]


def logged(rows: Sequence[Row]) -> list[str]:
    """The metrics to show."""
    return figures.parts([line for row in rows for line in row.lines])


def columns(rows: Sequence[Row]) -> list[str]:
    """The metrics that are results."""
    return [name for name in logged(rows) if name not in NO_RESULTS]


def ranked(rows: Sequence[Row], metric: str) -> list[Row]:
    """The runs by their final metric, the best first: finished ones, then others, then those without a number."""
    sign = -1 if higher_is_better(metric) else 1

    def place(row: Row) -> tuple[int, float]:
        value = row.final.get(metric, math.nan)
        return (0 if row.finished else 1, sign * value) if math.isfinite(value) else (2, 0.0)

    return sorted(rows, key=place)


def numeric(values: Sequence[Any]) -> bool:
    """Whether all values of a key are numbers."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def by_magnitude(values: Sequence[float]) -> bool:
    """Whether numbers are best shown on a logarithmic axis: positive, and ten times apart or more."""
    return min(values) > 0 and max(values) >= 10 * min(values)


def repeats(rows: Sequence[Row]) -> list[int]:
    """For each run, the number of earlier runs with the same configuration and seed."""
    return [sum(row.keys == other.keys for other in rows[:i]) for i, row in enumerate(rows)]


def groups(rows: Sequence[Row], keys: Sequence[str]) -> list[Group]:
    """Groups runs by their keys without the seed, in the order of their first runs. `keys` are the differing ones.

    A repeated seed is not an independent sample: it goes to another group.
    """
    by: dict[tuple[str, int], list[Row]] = {}
    for row, times in zip(rows, repeats(rows), strict=True):
        alike = json.dumps({k: v for k, v in row.keys.items() if k != "seed"})
        by.setdefault((alike, times), []).append(row)
    named, shown = [k for k in keys if k != "seed"], table_texts(rows, keys)
    labels = []
    for (_, times), members in by.items():
        texts = shown[rows.index(members[0])]
        values = ", ".join(f"{short(k, keys)}={texts[k]}" for k in named) or "all runs"
        again = f" (again, {times + 1})" if times else ""
        labels.append(members[0].name if len(members) == 1 else values + again)
    return [Group(label, members) for label, members in zip(labels, by.values(), strict=True)]


def winners(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, int]:
    """The index of the run with the best final value, by metric: among finished runs, or among all if none is."""
    some = any(row.finished for row in rows)
    found = {}
    for name in metrics:
        judged = [
            (row.final[name], i)
            for i, row in enumerate(rows)
            if (row.finished or not some) and math.isfinite(row.final.get(name, math.nan))
        ]
        if len(rows) > 1 and judged and has_best(name):
            found[name] = better(name)(judged, key=lambda pair: pair[0])[1]
    return found


def short(key: str, keys: Sequence[str]) -> str:
    """The last two parts of a dotted key, or more if needed to be unique among `keys`."""
    parts = key.split(".")
    for n in range(2, len(parts)):
        end = ".".join(parts[-n:])
        if not any(other != key and f".{other}".endswith(f".{end}") for other in keys):
            return end
    return key


def table_texts(rows: Sequence[Row], keys: Sequence[str]) -> list[dict[str, str]]:
    """The values of `keys` by row, as shown: without the common folder of a key's paths, numbers with as few digits as
    tell them apart; – is empty."""
    columns = {}
    for key in keys:
        values: list[Any] = [row.keys.get(key) for row in rows]
        texts = _rounded(values) if numeric(values) else list(map(text, values))
        shared = os.path.commonprefix([t for t in texts if t]).rpartition("/")[0]
        cut = len(shared) + 1 if len(shared) > 10 else 0
        columns[key] = [f"…/{t[cut:]}" if cut and t else t or "–" for t in texts]
    return [{key: columns[key][i] for key in keys} for i in range(len(rows))]


def _rounded(values: Sequence[float]) -> list[str]:
    """Numbers in at least three digits, and no more than tell them apart."""
    for digits in range(3, 17):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return list(map(repr, values))


def text(value: Any) -> str:
    """A value of a configuration."""
    if isinstance(value, list):
        return ", ".join(" ".join(map(text, v)) if isinstance(v, list) else text(v) for v in value)
    return value if isinstance(value, str) else "" if value is None else repr(value)


def write_csv(rows: Sequence[Row], out: Path) -> None:
    """One line per run: name, directory, state, differing keys, final and best of every metric, seconds, revision."""
    keys, metrics = differing(rows), columns(rows)
    lines = []
    for row in rows:
        line = {"run": row.name, "directory": row.run.directory, "state": row.state, "step": row.run.step}
        line |= {f"config.{key}": text(row.keys.get(key)) for key in keys}
        for name in metrics:
            value, step = row.best.get(name, ("", ""))
            line |= {name: row.final.get(name, "")}
            line |= {} if not has_best(name) else {f"{name}_best": value, f"{name}_best_step": step}
        line["seconds"] = round(row.run.seconds, 1)
        line["revision"] = row.attempts[-1]["code"].get("revision", "") if row.attempts else ""
        lines.append(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def main_metric(directories: Iterable[Path], rows: Sequence[Row], asked: str = "") -> tuple[str, str]:
    """The metric that decides, and a sentence that says why: the requested one, or else a sweep's, or else the one of
    `metric.deciding`.

    Raises:
      ReportError: no run logged it.
    """
    known = columns(rows)
    if asked:
        if asked not in known:
            hint = did_you_mean(asked, known, otherwise=f" Known: {', '.join(known) or 'none yet'}.")
            raise ReportError(f"no run logged --metric {asked}.{hint}")
        return asked, decides(asked, "as --metric says")
    of_sweep = next((found["metric"] for found in map(plan.recalled, directories) if found), "")
    logged_by_all = [name for name in known if all(name in row.final for row in rows if row.lines)]
    default = deciding(logged_by_all)
    if of_sweep and of_sweep != default:
        return of_sweep, decides(of_sweep, "as the sweep has it")
    return default, decides(default)


def importances(directories: Iterable[Path], metric: str) -> dict[str, float]:
    """Shares of the parameters of the first search by this metric; {} without one, without Optuna or enough trials."""
    for directory in directories:
        kind = (plan.recalled(directory) or {}).get("search")
        if kind and kind["metric"] == metric and importlib.util.find_spec("optuna"):
            from rynnvla_jax.sweep import search

            return search.importances(Path(directory))
    return {}
