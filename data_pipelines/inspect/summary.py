"""Summary of a data set: counts, lengths, instructions, and statistics of states and actions."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines import statistics
from data_pipelines.columns import questions, suspicions
from data_pipelines.episode import Episodes
from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import Columns, difference, labels
from rynnvla_jax.progress import progress_bar

_PERCENTILE_ROWS = 5_000_000  # beyond these, percentiles are of every k-th row
_BINS = 20
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Summary:
    """Of one source. `tables`: {"state" or "action": {statistic: [columns]}}; `relative` None without actions;
    `questions`: what the meaning of the columns leaves open.

    `texts`: (instruction, episodes, steps), the most frequent first; `lengths` are in steps.
    """

    source: str
    episodes: int
    steps: int
    seconds: float
    fps: tuple[float, ...]
    views: tuple[str, ...]
    frame_sizes: tuple[tuple[int, int], ...]
    lengths: np.ndarray
    texts: tuple[tuple[str, int, int], ...]
    columns: Columns
    questions: tuple[str, ...]
    tables: dict[str, dict[str, np.ndarray]]
    relative: Statistics | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts, edges = histogram(self.lengths)
        out = {
            "source": self.source,
            "episodes": self.episodes,
            "steps": self.steps,
            "hours": self.seconds / 3600,
            "fps": list(self.fps),
            "views": list(self.views),
            "frame_sizes": [list(size) for size in self.frame_sizes],
            "lengths": {
                "min": int(self.lengths.min()),
                "median": float(np.median(self.lengths)),
                "max": int(self.lengths.max()),
                "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            },
            "instructions": [{"text": t, "episodes": e, "steps": s} for t, e, s in self.texts],
            "columns": self.columns.to_json(),
            "questions": list(self.questions),
        }
        for what, rows in self.tables.items():
            out[what] = {name: values.tolist() for name, values in rows.items()}
        if self.relative is not None:
            r = self.relative
            out["relative_action"] = {
                "mean": r.rel_mean_action.tolist(),
                "std": r.rel_std_action.tolist(),
                "p1": r.rel_min_action.tolist(),
                "p99": r.rel_max_action.tolist(),
            }
        return out


def summarise(source: str, episodes: Episodes, chunk: int = 20, progress: bool = True) -> Summary:
    """Reads all rows of `episodes` twice, but no frames. Raises DataError for an episode that cannot be read."""
    total = int(episodes.lengths.sum())
    stride = -(-total // _PERCENTILE_ROWS)
    fps: Counter = Counter()
    texts: dict[str, list[int]] = {}
    columns = {"state": _Columns(stride), "action": _Columns(stride)}
    for e in progress_bar(episodes, desc=f"{source}: rows", show=progress):
        fps[round(e.fps, 3)] += 1
        for i, steps in zip(*np.unique(e.text_of, return_counts=True), strict=True):
            row = texts.setdefault(e.texts[i], [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + int(steps)
        columns["state"].add(e.state)
        columns["action"].add(e.action)
    widths = {"state": episodes.state_width, "action": episodes.action_width}
    return Summary(
        source=source,
        episodes=len(episodes),
        steps=total,
        seconds=episodes.seconds,
        fps=tuple(rate for rate, _ in fps.most_common()),
        views=episodes.views,
        frame_sizes=tuple(sorted(episodes.frame_sizes)),
        lengths=np.asarray(episodes.lengths),
        texts=tuple(sorted(((t, n, steps) for t, (n, steps) in texts.items()), key=lambda r: (-r[1], r[0]))),
        columns=episodes.columns,
        questions=(*questions(episodes.columns, episodes.corpus is not None), *suspicions(episodes)),
        tables={what: columns[what].result() for what, width in widths.items() if width},
        relative=statistics.compute([episodes], chunk, progress) if episodes.action_width else None,
    )


class _Columns:
    """Running moments of rows [N, A], and every `stride`-th row for the percentiles."""

    def __init__(self, stride: int):
        self._stride, self._moments = stride, statistics.RunningMoments()
        self._sample: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        if rows.size:
            self._sample.append(rows[-self._moments.count % self._stride :: self._stride])
            self._moments.add(rows)

    def result(self) -> dict[str, np.ndarray]:
        p1, p99 = np.percentile(np.concatenate(self._sample), [1, 99], axis=0)
        return {
            "mean": self._moments.mean,
            "std": self._moments.std,
            "min": self._moments.low,
            "max": self._moments.high,
            "p1": p1,
            "p99": p99,
        }


def meaning(columns: Columns) -> list[str]:
    """Lines for a terminal: a table of what every column means."""
    lines = [f"  robot {columns.robot or 'not stated'}"]
    rows = [("column", "unit", "kind", "recorded as", "why")]
    for c in columns.state:
        rows.append((c.name, c.unit, c.kind, "state", c.why))
    for a in columns.action:
        relative = "kept" if a.pair is None else f"relative to state {columns.state[a.pair].name or a.pair}"
        rows.append((a.name, a.unit, a.kind, f"{'difference' if a.delta else 'target'}, {relative}", a.why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return lines + ["  " + "  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(counts [bins], edges [bins + 1]) of episode lengths in steps; edges are whole steps."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    bins = min(_BINS, 3 + math.ceil(math.sqrt(len(lengths))))
    width = max(1, math.ceil((high - low) / bins))
    edges = np.arange(low, high + width, width)
    return np.histogram(lengths, edges)[0], edges


def differences(found: Sequence[Summary]) -> list[str]:
    """Properties that differ and so cannot be mixed in one run, with the sources of each value."""
    acting = [s for s in found if s.columns.action]
    unlike = ((s, difference(acting[0].columns, s.columns)) for s in acting[1:])
    out = [f"what columns mean: {text} ({acting[0].source} and {s.source})" for s, text in unlike if text]
    for what, value in (("frames per second", lambda s: s.fps),):
        groups: dict[Any, list[str]] = {}
        for s in found:
            groups.setdefault(value(s), []).append(s.source)
        if len(groups) > 1:
            out.append(f"{what}: " + "; ".join(f"{v!r} in {', '.join(names)}" for v, names in groups.items()))
    return out


def duration(seconds: float) -> str:
    """ "62 s", "4.1 min" or "829 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.4g} h"


def rates(fps: Sequence[float]) -> str:
    """ "30 fps", or all rates of several."""
    return f"{', '.join(f'{f:g}' for f in fps)} fps"


def text(s: Summary, chunk: int) -> list[str]:
    """Lines for a terminal about one source."""
    counts, edges = histogram(s.lengths)
    bars = "".join(_BLOCKS[math.ceil(c / counts.max() * (len(_BLOCKS) - 1))] if c else " " for c in counts)
    sizes = ", ".join(f"{w} x {h}" for h, w in s.frame_sizes)
    lines = [
        s.source,
        f"  {s.episodes:,} episodes, {s.steps:,} steps, {duration(s.seconds)} at {rates(s.fps)}",
        f"  views    {', '.join(s.views) or 'none'}{f' ({sizes} pixels)' if sizes else ''}",
        f"  lengths  {s.lengths.min()} .. {np.median(s.lengths):g} .. {s.lengths.max()} steps (min, median, max)",
        f"           {edges[0]} |{bars}| {edges[-1] - 1}",
        "",
        f"  {'episodes':>8} {'steps':>9}  instruction ({len(s.texts)})",
        *(f"  {e:>8,} {n:>9,}  {text}" for text, e, n in s.texts[:20]),
    ]
    if len(s.texts) > 20:
        lines.append(f"  ... and {len(s.texts) - 20} more (--json lists all)")
    if s.relative is None:
        return [*lines, "", "  without states and actions"]
    lines += ["", *meaning(s.columns), *(f"  ? {question}" for question in s.questions)]
    r = s.relative
    state, action = labels(s.columns.state), labels(s.columns.action)
    tables = {
        "state": s.tables.get("state"),
        "action": s.tables["action"],
        f"relative action, chunks of {chunk}": {
            "mean": r.rel_mean_action,
            "std": r.rel_std_action,
            "p1": r.rel_min_action,
            "p99": r.rel_max_action,
        },
    }
    for title, table in tables.items():
        if table:
            lines += ["", *_columns_table(title, table, state if title == "state" else action)]
    return lines


def _columns_table(title: str, table: dict[str, np.ndarray], names: Sequence[str]) -> list[str]:
    room = max(len(title), *map(len, names))
    lines = [f"  {title:<{room}}" + "".join(f"{name:>11}" for name in table)]
    for i, label in enumerate(names):
        lines.append(f"  {label:<{room}}" + "".join(f"{values[i]:>11.4g}" for values in table.values()))
    return lines


def rows(found: Sequence[Summary]) -> list[str]:
    """Lines for a terminal: a table of several sources, and the properties in which they differ."""
    room = max(len(s.source) for s in found)
    lines = [f"{'source':<{room}}  {'episodes':>8} {'steps':>11} {'time':>9}  {'rate':<8} {'views':<12} robot"]
    for s in found:
        lines.append(
            f"{s.source:<{room}}  {s.episodes:>8,} {s.steps:>11,} {duration(s.seconds):>9}  {rates(s.fps):<8} "
            f"{', '.join(s.views) or 'none':<12} {s.columns.robot or 'no actions'}"
        )
    steps, seconds = sum(s.steps for s in found), sum(s.seconds for s in found)
    lines.append(f"{'all':<{room}}  {sum(s.episodes for s in found):>8,} {steps:>11,} {duration(seconds):>9}")
    return [*lines, *(f"they differ in {text}" for text in differences(found))]
