"""Plotly figures of a comparison: curves of all runs, parallel coordinates. Each is HTML without the library."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from rynnvla_jax import intervals
from rynnvla_jax.metric import has_best, higher_is_better
from rynnvla_jax.report import compare, figures, pairs

if TYPE_CHECKING:
    from rynnvla_jax.report.compare import Group, Row

INK, QUIET, GRID = "#1d2433", "#6b7485", "#eef1f5"  # as plot_style.STYLE
FONT = {"family": "system-ui, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif", "size": 12, "color": INK}
COLOURS = (
    *("#1c6dd0", "#d9480f", "#2b8a3e", "#862e9c", "#c99700", "#0b7285", "#c2255c", "#5f3dc4", "#5c940d", "#495057"),
    *("#4dabf7", "#ff922b", "#69db7c", "#da77f2", "#fcc419", "#3bc9db", "#f783ac", "#9775fa", "#a9e34b", "#adb5bd"),
)
GOOD, BAD = COLOURS[0], COLOURS[1]
COLUMNS, HEIGHT = 3, 270  # panels in a row, pixels of one
MAX_POINTS = 500  # of one curve
MOST_TICKS = 8  # of an axis with a tick per value
LABELS = 140  # characters of values beside all axes together, before they overlap


def library() -> str:
    """plotly.js, to include once in a page."""
    return get_plotlyjs()


def colour(group: int) -> str:
    """Of the curves of a group."""
    return COLOURS[group % len(COLOURS)]


def html(figure: go.Figure, name: str) -> str:
    """A figure as an element with this id."""
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def dress(figure: go.Figure, height: int, margin: dict[str, int]) -> None:
    """What panels of the page have in common; height and margins in pixels."""
    figure.update_layout(
        height=height,
        margin=margin,
        font=FONT,
        plot_bgcolor="#fff",
        hovermode="closest",
        showlegend=False,
        hoverlabel={"namelength": -1, "align": "left"},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, color=QUIET)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, color=QUIET)


def curves(groups: Sequence["Group"], metrics: Sequence[str]) -> str:
    """One panel per metric. The `meta` of a trace is the number of its group, by which the page shows and hides it.

    A run is a line; runs that differ only in their seed are thin lines, with the mean of the finished ones (if fewer
    than two have finished: of all, over the steps that all have logged) and, from three on, its interval.
    """
    rows = -(-len(metrics) // COLUMNS)
    titles = [figures.title(name) for name in metrics]
    figure = make_subplots(
        rows, COLUMNS, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=min(0.3, 60 / (HEIGHT * rows))
    )
    for i, metric in enumerate(metrics):
        cell = {"row": i // COLUMNS + 1, "col": i % COLUMNS + 1}
        values: list[float] = []
        for number, group in enumerate(groups):
            lines = {row.name: line for row in group.rows if (line := _line(row, metric))}
            figure.add_traces(_group(number, group, lines), **{f"{k}s": v for k, v in cell.items()})
            values += [v for line in lines.values() for v in line.values()]
        figure.update_yaxes(**_scale(metric, values), **cell)
    dress(figure, HEIGHT * rows + 40, {"l": 50, "r": 10, "t": 30, "b": 40})
    figure.update_xaxes(nticks=6)
    figure.update_yaxes(nticks=6)
    for title, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=False):
        title.update(x=axis.domain[0], xanchor="left", font={"size": 13, "color": INK}, text=f"<b>{title.text}</b>")
    return html(figure, "curves")


def _scale(metric: str, values: list[float]) -> dict:
    """The value axis of a panel. The runs determine its range: an interval of two runs is very wide."""
    if not values:
        return {}
    low, high = min(values), max(values)
    if metric == "learning_rate":
        return {"exponentformat": "e", "rangemode": "tozero"}
    if metric.endswith("accuracy"):
        return {"tickformat": ".4~%", "range": _padded(low, high)}
    if low > 0 and high > 10 * low:
        ticks = {"dtick": "D2"} if high < 100 * low else {"dtick": 1, "exponentformat": "power"}
        return {"type": "log", "range": _padded(math.log10(low), math.log10(high)), **ticks}
    return {"range": _padded(low, high)}


def _padded(low: float, high: float) -> list[float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - room, high + room]


def _line(row: "Row", metric: str) -> dict[int, float]:
    """{step: value}, smoothed if there are many, without values that are not finite."""
    lines = [line for line in row.lines if math.isfinite(line.get(metric, math.nan))]
    values = np.array([line[metric] for line in lines], float)
    if len(values) >= figures.SMOOTH_FROM and metric != "learning_rate":
        values = figures.smooth(values)
    return dict(zip([int(line["step"]) for line in lines], values.tolist(), strict=True))


def _group(number: int, group: "Group", lines: dict[str, dict[int, float]]) -> list[go.Scatter]:
    """The traces of one group in one panel."""
    several, own = len(lines) > 1, colour(number)
    traces = []
    for name, line in lines.items():
        steps = _thinned(list(line))
        traces.append(
            go.Scatter(
                x=steps,
                y=[line[step] for step in steps],
                meta=number,
                mode="lines" if len(line) > 1 else "markers",
                line={"color": own, "width": 1 if several else 1.8},
                opacity=0.35 if several else 1,
                hovertemplate=f"<b>{name}</b><br>step %{{x}}: %{{y:.5g}}<extra></extra>",
            )
        )
    done = [lines[row.name] for row in group.rows if row.finished and row.name in lines]
    whole = done if len(done) > 1 else list(lines.values())
    shared = _thinned(sorted(set.intersection(*map(set, whole)))) if several else []
    if not shared:
        return traces
    found = [intervals.mean([line[step] for line in whole]) for step in shared]
    low, high = [e.low for e in found], [e.high for e in found]
    band = go.Scatter(
        x=[*shared, *reversed(shared)],
        y=[*high, *reversed(low)],
        meta=number,
        mode="lines",
        line={"width": 0, "color": own},
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(own[i : i + 2], 16)) for i in (1, 3, 5))}, 0.13)",
        hoverinfo="skip",
    )
    middle = go.Scatter(
        x=shared,
        y=[e.value for e in found],
        meta=number,
        mode="lines",
        line={"color": own, "width": 2.2},
        customdata=[f" ± {e.high - e.value:.2g}" if len(whole) >= pairs.FEWEST else "" for e in found],
        hovertemplate=f"<b>{group.label}</b><br>mean of {len(whole)} at step %{{x}}: %{{y:.5g}}%{{customdata}}"
        "<extra></extra>",
    )
    return [*([band] if len(whole) >= pairs.FEWEST else []), *traces, middle]


def _thinned(steps: list[int]) -> list[int]:
    keep = np.unique(np.linspace(0, len(steps) - 1, min(MAX_POINTS, len(steps))).astype(int))
    return [steps[i] for i in keep]


def parallel(
    rows: Sequence["Row"], keys: Sequence[str], names: Sequence[str], metrics: Sequence[str], metric: str
) -> str:
    """One axis per differing key (`names` are their labels), then one per metric; each line is a run.

    `metric` determines the colour. Empty if fewer than two runs have it, or no key differs.
    """
    known = [row for row in rows if math.isfinite(row.final.get(metric, math.nan))]
    if len(known) < 2 or not keys:
        return ""
    texts = compare.table_texts(known, keys)
    others = [m for m in metrics if m != metric and has_best(m)]
    room = max(6, LABELS // (len(keys) + len(others) + 1))
    axes = [
        _axis(name, [row.keys.get(key) for row in known], [t[key] for t in texts], room)
        for key, name in zip(keys, names, strict=True)
    ]
    for name in [*others, metric]:
        values = [row.final.get(name, math.nan) for row in known]
        if all(map(math.isfinite, values)):
            axes.append({"label": figures.title(name), "values": values})
    scale = [[0, GOOD], [0.5, "#b9a8b9"], [1, BAD]]
    figure = go.Figure(
        go.Parcoords(
            dimensions=axes,
            line={
                "color": [row.final[metric] for row in known],
                "colorscale": scale,
                "reversescale": higher_is_better(metric),
                "showscale": True,
                "colorbar": {"thickness": 12, "outlinewidth": 0, "title": {"text": ""}},
            },
            labelfont={"size": 12, "color": INK},
            tickfont={"size": 11, "color": INK},
            rangefont={"size": 10, "color": QUIET},
            labelangle=-18 if len(axes) > 6 else 0,
            unselected={"line": {"opacity": 0.08}},
        )
    )
    longest = max(len(str(text)) for text in axes[0].get("ticktext", [""]))
    figure.update_layout(height=430, margin={"l": 40 + 6 * longest, "r": 30, "t": 90, "b": 30}, font=FONT)
    return html(figure, "parallel")


def _axis(name: str, values: list, texts: list[str], room: int) -> dict:
    """The axis of a key: numeric (logarithmic above a ratio of ten) if all values are numbers, else categorical."""
    if not compare.numeric(values):
        named = sorted(set(texts))
        ticks = [text if len(text) <= room else f"{text[: room // 2 - 1]}…{text[-room // 2 :]}" for text in named]
        return {
            "label": name,
            "values": [named.index(text) for text in texts],
            "tickvals": list(range(len(named))),
            "ticktext": ticks,
            "range": [-0.3, len(named) - 0.7],
        }
    magnitude = compare.by_magnitude(values)
    positions = [math.log10(v) if magnitude else v for v in values]
    axis = {"label": name, "values": positions}
    if len(set(values)) <= MOST_TICKS:
        shown = dict(sorted(zip(positions, texts, strict=True)))
        axis |= {"tickvals": list(shown), "ticktext": list(shown.values())}
    elif magnitude:
        powers = range(math.floor(min(positions)), math.ceil(max(positions)) + 1)
        axis |= {"tickvals": list(powers), "ticktext": [f"{10.0**n:g}" for n in powers]}
        axis["range"] = [powers[0], powers[-1]]
    return axis
