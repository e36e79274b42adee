"""Plotly figures of what keys do to the metric that decides: the metric against each key, the best trial so far, and
the importance of a search's parameters. Each is HTML without the library."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rynnvla_jax.metric import higher_is_better
from rynnvla_jax.report import compare, figures
from rynnvla_jax.report.compare_figures import COLOURS, COLUMNS, HEIGHT, INK, dress, html

if TYPE_CHECKING:
    from rynnvla_jax.report.compare import Row

SYMBOLS = {"finished": "circle", "pruned": "triangle-down-open", "failed": "x", "": "circle-open"}  # "": under way


def against(rows: Sequence["Row"], keys: Sequence[str], names: Sequence[str], metric: str) -> str:
    """One panel per differing key, but for the seed: the final metric of every run; empty without any."""
    known = [row for row in rows if math.isfinite(row.final.get(metric, math.nan))]
    shown = [(key, name) for key, name in zip(keys, names, strict=True) if key != "seed"]
    if len(known) < 2 or not shown:
        return ""
    texts = compare.table_texts(known, keys)
    lines = -(-len(shown) // COLUMNS)
    figure = make_subplots(lines, COLUMNS, horizontal_spacing=0.08, vertical_spacing=min(0.3, 90 / (HEIGHT * lines)))
    for i, (key, name) in enumerate(shown):
        cell = {"row": i // COLUMNS + 1, "col": i % COLUMNS + 1}
        values, labels = [row.keys.get(key) for row in known], [text[key] for text in texts]
        figure.add_trace(_points(known, values if compare.numeric(values) else labels, labels, metric), **cell)
        figure.update_xaxes(title={"text": name, "standoff": 4}, **_scale(values, labels), **cell)
    figure.update_yaxes(title={"text": figures.title(metric), "standoff": 4}, col=1)
    _dress(figure, HEIGHT * lines + 40)
    return html(figure, "against")


def _scale(values: Sequence, labels: Sequence[str]) -> dict:
    """The axis of a key: logarithmic where numbers are spread like that, categories where they are no numbers."""
    if not compare.numeric(values):
        return {"type": "category", "categoryorder": "array", "categoryarray": sorted(set(labels))}
    return {"type": "log", "exponentformat": "e", "dtick": 1} if compare.by_magnitude(values) else {"nticks": 6}


def _points(rows: Sequence["Row"], x: Sequence, labels: Sequence[str], metric: str) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=[row.final[metric] for row in rows],
        mode="markers",
        marker={"symbol": [SYMBOLS[row.outcome] for row in rows], "size": 8, "color": COLOURS[0], "opacity": 0.8},
        customdata=[[row.name, label, row.state] for row, label in zip(rows, labels, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}: %{y:.5g}<br>%{customdata[2]}<extra></extra>",
    )


def best_so_far(rows: Sequence["Row"], metric: str) -> str:
    """The final metric of every trial of a search in their order, and the best finished one so far; empty without."""
    trials = sorted(
        (row for row in rows if row.trial is not None and math.isfinite(row.final.get(metric, math.nan))),
        key=lambda row: row.trial or 0,
    )
    if len(trials) < 2:
        return ""
    better, best, steps = max if higher_is_better(metric) else min, math.nan, []
    for row in trials:
        if row.finished:
            best = row.final[metric] if math.isnan(best) else better(best, row.final[metric])
        steps.append(best)
    numbers = [row.trial for row in trials]
    figure = go.Figure(_points(trials, numbers, [f"trial {n}" for n in numbers], metric))
    line = {"color": COLOURS[1], "shape": "hv", "width": 2}
    figure.add_trace(go.Scatter(x=numbers, y=steps, mode="lines", line=line, name="best so far", hoverinfo="skip"))
    figure.update_xaxes(title={"text": "trial"})
    figure.update_yaxes(title={"text": figures.title(metric)})
    _dress(figure, HEIGHT)
    return html(figure, "best_so_far")


def importances(found: Mapping[str, float]) -> str:
    """Bars of the shares of a search's parameters; empty without any."""
    if not found:
        return ""
    names = list(reversed(list(found)))
    figure = go.Figure(go.Bar(x=[found[n] for n in names], y=names, orientation="h", marker={"color": COLOURS[0]}))
    figure.update_xaxes(range=[0, 1], tickformat=".0%")
    _dress(figure, 80 + 28 * len(names))
    return html(figure, "importances")


def _dress(figure: go.Figure, height: int) -> None:
    dress(figure, height, {"l": 60, "r": 10, "t": 20, "b": 50})
    title = {"font": {"size": 12, "color": INK}}
    figure.update_xaxes(title=title)
    figure.update_yaxes(title=title)
