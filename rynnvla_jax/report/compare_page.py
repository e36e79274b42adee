"""The page of `rynnvla compare`: the values for its template."""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rynnvla_jax
from rynnvla_jax import intervals
from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.config import to_dict
from rynnvla_jax.metric import higher_is_better
from rynnvla_jax.pages import templates
from rynnvla_jax.report import compare, compare_figures, compare_keys, figures, pairs
from rynnvla_jax.report import page as page_lib
from rynnvla_jax.report.compare import Group, Row
from rynnvla_jax.storage import files


def write(
    rows: Sequence[Row],
    out: Path,
    *,
    title: str,
    metric: str,
    decides: str,
    missing: Sequence[str] = (),
    importances: Mapping[str, float] | None = None,
) -> None:
    """Writes the page.

    Args:
      metric: that decides between the runs, and colours the parallel coordinates; `decides` says why.
      missing: points of sweeps that have no work dir.
      importances: shares of a search's parameters (`search.importances`).
    """
    keys, columns = compare.differing(rows), sorted(compare.columns(rows), key=lambda name: name != metric)
    groups = compare.groups(rows, keys)
    names = [compare.short(key, keys) for key in keys]
    colours = {row.name: compare_figures.colour(i) for i, group in enumerate(groups) for row in group.rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    page = templates.render(
        Path(__file__).with_name("compare.html"),
        title=title,
        keys=list(zip(keys, names, strict=True)),
        columns=[(name, figures.title(name)) for name in columns],
        runs=_run_lines(compare.ranked(rows, metric), keys, columns, colours),
        verdicts=verdicts(groups, metric),
        seeds=_seed_lines(groups, rows, keys, columns),
        few=pairs.FEWEST,
        seed_keys=[(key, name) for key, name in zip(keys, names, strict=True) if key != "seed"],
        legend=[(compare_figures.colour(i), group.label, len(group.rows)) for i, group in enumerate(groups)],
        curves=compare_figures.curves(groups, compare.logged(rows)) if any(r.run.metrics for r in rows) else "",
        against=compare_keys.against(rows, keys, names, metric),
        so_far=compare_keys.best_so_far(rows, metric),
        importances=compare_keys.importances(importances or {}),
        parallel=compare_figures.parallel(rows, keys, names, columns, metric),
        metric=figures.title(metric),
        decides=decides,
        missing=missing,
        problems=problems(rows),
        made_with=made_with(rows),
        library=compare_figures.library(),
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        version=rynnvla_jax.__version__,
    )
    files.write_text(out, page)


def verdicts(groups: Sequence[Group], metric: str) -> list[str]:
    """Which configuration is better, one sentence for each of the others; one for all where seeds are too few."""
    found = pairs.pairs(groups, metric)
    if found and all(pair.difference is None for pair in found):
        return [
            f"No configuration is separated from {found[0].best.label}, which has the best mean: none has "
            f"{pairs.FEWEST} seeds in common with it. Repeat the runs with other seeds (config.seed)"
        ]
    return [str(pair) for pair in found]


def _run_lines(
    rows: Sequence[Row], keys: Sequence[str], columns: Sequence[str], colours: dict[str, str]
) -> list[dict[str, Any]]:
    won, texts = compare.winners(rows, columns), compare.table_texts(rows, keys)
    return [
        {
            "name": row.name,
            "directory": str(row.run.directory),
            "colour": colours[row.name],
            "finished": row.finished,
            "state": row.state,
            "keys": [_key_cell(row, key, texts[i][key]) for key in keys],
            "metrics": [_metric_cell(row, name, won.get(name) == i) for name in columns],
            "seconds": row.run.seconds,
            "time": page_lib.duration(row.run.seconds) if row.run.timing else "",
        }
        for i, row in enumerate(rows)
    ]


def _key_cell(row: Row, key: str, shown: str) -> dict[str, Any]:
    value = row.keys.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"sort": repr(value) if number else shown, "text": shown, "whole": compare.text(value), "number": number}


def _metric_cell(row: Row, name: str, won: bool) -> dict[str, Any]:
    value = row.final.get(name)
    if value is None:
        return {"sort": "", "text": "", "under": "", "won": False}
    best, finite = row.best.get(name), math.isfinite(value)
    return {
        "sort": repr(value) if finite else "",
        "text": page_lib.number_text(name, value) if finite else "not finite",
        "under": f"{page_lib.number_text(name, best[0])} @ {best[1]}" if best else "",
        "won": won,
    }


def _seed_lines(
    groups: Sequence[Group], rows: Sequence[Row], keys: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The table of the means over seeds, in the order of the first column; empty unless some runs differ only in their
    seed."""
    if all(len(group.rows) == 1 for group in groups):
        return []
    texts = compare.table_texts(rows, keys)
    estimates = [{name: intervals.mean(f) for name in columns if (f := g.finals(name))} for g in groups]
    best = {name: pairs.best(groups, name) for name in columns}
    sign = -1 if columns and higher_is_better(columns[0]) else 1
    means = [sign * e[columns[0]].value if columns and columns[0] in e else math.inf for e in estimates]
    lines = []
    for i, group in sorted(enumerate(groups), key=lambda pair: means[pair[0]]):
        first, cells = rows.index(group.rows[0]), []
        for name in columns:
            if name not in estimates[i]:
                cells.append({"sort": "", "text": "", "half": "", "won": False})
                continue
            found = estimates[i][name]
            mean, half = found.value, found.high - found.value
            half_text = f"± {page_lib.number_text(name, half)}" if len(group.finals(name)) >= pairs.FEWEST else ""
            text = page_lib.number_text(name, mean)
            cells.append({"sort": repr(mean), "text": text, "half": half_text, "won": best[name] is group})
        done = [row for row in group.rows if row.finished]
        lines.append(
            {
                "colour": compare_figures.colour(i),
                "keys": [_key_cell(rows[first], key, texts[first][key]) for key in keys if key != "seed"],
                "count": len(done),
                "seeds": ", ".join(str(row.keys["seed"]) for row in done) or "none finished",
                "metrics": cells,
            }
        )
    return lines


def problems(rows: Sequence[Row]) -> list[str]:
    """Reasons to doubt the comparison, one sentence each."""
    said = []
    stages = {row.run.config.stage for row in rows}
    if len(stages) > 1:
        said.append(
            f"The runs are of different stages ({', '.join(sorted(stages))}); their metrics are not comparable."
        )
    if wild := [r.name for r in rows if any(not math.isfinite(v) for line in r.lines for v in line.values())]:
        said.append(f"Non-finite values are left out; they were logged by {', '.join(wild)}.")
    if again := [row.name for row, times in zip(rows, compare.repeats(rows), strict=True) if times]:
        said.append(
            f"Not included in a mean, because another run has the same configuration and seed: {', '.join(again)}."
        )
    held = {json.dumps(to_dict(row.run.config.evaluation), sort_keys=True) for row in rows if row.run.evaluations}
    if len(held) > 1:
        said.append(
            "The runs are not evaluated on the same held-out data (config.evaluation differs): eval/* misleads."
        )
    known = [row for row in rows if row.attempts]
    read: dict[tuple, set[str]] = {}
    for row in known:
        read.setdefault(tuple(page_lib.sources(row.run.config)), set()).add(row.attempts[-1]["data"])
    for sources, hashes in read.items():
        if len(hashes) > 1:
            said.append(
                f"The data of {'; '.join(sources)} differs between runs: {len(hashes)} different manifests (number, "
                "lengths or instructions of the episodes)."
            )
    if changed := [row.name for row in known if len({attempt["data"] for attempt in row.attempts}) > 1]:
        said.append(f"The data changed during {', '.join(changed)}.")
    return said


def made_with(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(revision and versions, names of the runs) of the last starts, most runs first; versions only if they differ."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        last = row.attempts[-1] if row.attempts else None
        key = (provenance.code_line(last["code"]), provenance.versions_line(last)) if last else ("not recorded", "")
        found.setdefault(key, []).append(row.name)
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(f"{code}; {versions}" if versions else code, names) for (code, versions), names in ranked]
