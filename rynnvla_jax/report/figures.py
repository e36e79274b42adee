"""Figures of a report, each as a `data:` URL: curves and action chunks as SVG, frames as PNG."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from rynnvla_jax.metric import EVAL
from rynnvla_jax.pages.plot_style import INK, QUIET, STYLE, address, svg

COLOURS = {
    "true": INK,
    "predicted": "#d9480f",
    "rebuilt": "#1c6dd0",
    "ActionVAE (upper bound)": "#1c6dd0",
    "hold still": "#9aa3b2",
    "held out": "#d9480f",
}
ERRORS = {  # of held-out data: name of the value, label, line
    "action_error": ("the model", "-"),
    "hold_still_error": ("holding still", ":"),
    "repeat_motion_error": ("repeating the last motion", "--"),
}
WIDTH = 11.0  # inches of a figure that fills the page
MAX_POINTS = 1500  # of one curve
SMOOTH_FROM = 60  # points; fewer are shown as they are
MAX_FRAME_EDGE = 320  # pixels: larger frames are scaled down for the page

TITLES = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy",
    "token_accuracy": "Token accuracy",
    "action_l1": "Action embedding L1",
    "z_loss": "z-loss, unweighted",
    "reconstruction": "Reconstruction L1",
    "codebook": "Codebook loss",
    "perplexity": "Perplexity of codes",
    "l1": "Action L1, normalised",
    "kl": "KL to the prior",
    "action_error": "Action error, data's units",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
SMALL = ("learning_rate", "grad_norm")
SOURCE = "source/"  # begins the names of values of one source of a mixture


def parts(metrics: list[dict]) -> list[str]:
    """Names of the logged values to show: known ones in their order, then others; no counts of skips where none was.

    Those of single sources are in `by_source`.
    """
    found = {key for line in metrics for key in line if key not in ("step", "tokens") and not key.startswith(SOURCE)}
    if not any(line.get("skipped_total") for line in metrics):
        found -= {"skipped", "skipped_total"}
    return [k for k in TITLES if k in found] + sorted(found - set(TITLES))


def title(metric: str) -> str:
    """A metric as a heading; "eval/NAME" is one of held-out data."""
    name = metric.removeprefix(EVAL)
    text = TITLES.get(name, name.replace("_", " "))
    return text if name == metric else f"{text}, held out"


def by_source(metrics: list[dict]) -> dict[str, list[str]]:
    """Losses that are logged by source of a mixture, and the names of the sources that have them."""
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith(SOURCE))
    found: dict[str, list[str]] = {}
    for _, source, name in (key.split("/") for key in keys):
        if name not in ("examples", "epochs"):
            found.setdefault(name, []).append(source)
    return found


def curves(metrics: list[dict], held_out: Sequence[dict] = ()) -> str:
    """Every logged value over the steps on axes of its own, that of held-out data over that of training; learning rate
    and gradient norm small, in one cell."""
    names = parts(metrics)
    large, small = [n for n in names if n not in SMALL], [n for n in names if n in SMALL]
    large += [name for name in list(ERRORS)[:1] if any(name in line for line in held_out)]
    sources = by_source(metrics)
    large += [f"{SOURCE}{name}" for name in sources]
    cells = len(large) + bool(small)
    columns = cells if cells <= 5 else 3
    rows = -(-cells // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3 * rows))
        grid = figure.add_gridspec(rows, columns)
        for i, name in enumerate(large):
            axes, label = figure.add_subplot(grid[i // columns, i % columns]), i // columns == rows - 1
            if name in ERRORS:
                _errors(axes, held_out, label)
            elif name.startswith(SOURCE):
                _of_sources(axes, name.removeprefix(SOURCE), sources, metrics, label)
            else:
                _curve(axes, name, metrics, label, held_out=held_out)
        if small:
            last = grid[(cells - 1) // columns, (cells - 1) % columns].subgridspec(len(small), 1)
            for i, name in enumerate(small):
                _curve(figure.add_subplot(last[i]), name, metrics, i == len(small) - 1, small=True)
        return svg(figure)


def _errors(axes, held_out: Sequence[dict], label: bool) -> None:
    """The action error on held-out data, beside the baselines."""
    for name, (said, line) in ERRORS.items():
        points = [(e["step"], e[name]) for e in held_out if name in e]
        colour = COLOURS["held out"] if name == "action_error" else QUIET
        marker = "o" if name == "action_error" else ""
        style = {"label": said, "color": colour, "linewidth": 1.3, "marker": marker, "markersize": 2.5}
        axes.plot(*zip(*points, strict=True), line, **style)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=6, frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title("Action error, held out, data's units", fontsize=9)
    if label:
        axes.set_xlabel("step")


def _of_sources(axes, name: str, sources: dict[str, list[str]], metrics: list[dict], label: bool) -> None:
    """A loss of each source of a mixture."""
    for source in sources[name]:
        key = f"{SOURCE}{source}/{name}"
        points = [(line["step"], line[key]) for line in metrics if key in line]
        steps, values = np.array(points, float).T
        values = smooth(values) if len(values) >= SMOOTH_FROM else values
        keep = np.unique(np.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).astype(int))
        axes.plot(steps[keep], values[keep], label=source, linewidth=1.3)
    axes.legend(fontsize=6, frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(f"{TITLES.get(name, name.replace('_', ' '))}, by source", fontsize=9)
    if label:
        axes.set_xlabel("step")


def _curve(
    axes, name: str, metrics: list[dict], label: bool, small: bool = False, held_out: Sequence[dict] = ()
) -> None:
    steps = np.array([line["step"] for line in metrics if name in line])
    values = np.array([line[name] for line in metrics if name in line], float)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    smoothed = smooth(values) if len(values) >= SMOOTH_FROM and name != "learning_rate" else None
    keep = np.unique(np.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).astype(int))
    colour, width = ("#5f6b7d", 1.0) if small else ("#1c6dd0", 1.5)
    if smoothed is not None:
        axes.plot(steps[keep], values[keep], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps[keep], smoothed[keep], color=colour, linewidth=width)
    else:
        axes.plot(steps, values, color=colour, linewidth=width, marker="o", markersize=2.2 if len(steps) < 25 else 0)
    if points := [(line["step"], line[name]) for line in held_out if name in line]:
        style = {"color": COLOURS["held out"], "linewidth": 1.3, "marker": "o", "markersize": 2.5}
        axes.plot(*zip(*points, strict=True), label="held out", **style)
        axes.legend(fontsize=6, frameon=False)
    if name == "token_accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        low, high = axes.get_ylim()
        if high - low < 0.04:  # chance is not drawn as a climb
            axes.set_ylim((low + high) / 2 - 0.02, (low + high) / 2 + 0.02)
    elif name != "learning_rate" and len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if name == "learning_rate":
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.yaxis.get_offset_text().set_size(6.5)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(2 if small else 5))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=8 if small else 9)
    if label:
        axes.set_xlabel("step")


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a fiftieth of the run, started without bias."""
    weight = 1 - 1 / max(2.0, len(values) / 50)
    out, total, norm = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out[i] = total / norm
    return out


def chunks(examples: list, dimensions: list[str], unit: str, quantity: str) -> str:
    """Rows: examples (`report_examples.Chunk`), columns: dimensions, x: steps ahead."""
    rows, columns = len(examples), len(dimensions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.45 * rows + 0.75))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
        spans = np.array([[np.ptp([v[:, d] for v in e.lines.values()]) for d in range(columns)] for e in examples])
        least = np.maximum(0.15 * spans.max(), 1e-9)  # a joint at rest must not look as if it danced
        for r, example in enumerate(examples):
            for d in range(columns):
                _chunk_panel(axes[r, d], {k: v[:, d] for k, v in example.lines.items()}, max(spans[r, d], least))
            axes[r, 0].set_ylabel(example.caption, fontsize=7.5)
        for d, name in enumerate(dimensions):
            axes[0, d].set_title(name, fontsize=8.5)
            axes[-1, d].set_xlabel("steps ahead", fontsize=7.5)
        handles, labels = (list(reversed(x)) for x in axes[0, 0].get_legend_handles_labels())
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=8)
        figure.suptitle(f"{quantity}, {unit}", x=0.995, ha="right", fontsize=8, color=QUIET)
        return svg(figure)


def _chunk_panel(axes, lines: dict[str, np.ndarray], span: float) -> None:
    for order, (label, values) in enumerate(reversed(lines.items())):
        style: dict[str, Any] = {"linewidth": 1.6 if label != "hold still" else 1.1}
        if label == "hold still":
            style["linestyle"] = (0, (1, 1.5))
        elif label.startswith("ActionVAE"):
            style.update(linestyle=(0, (4, 2)), linewidth=1.2)
        ahead, colour = np.arange(1, len(values) + 1), COLOURS.get(label, QUIET)
        axes.plot(ahead, values, label=label, color=colour, zorder=order + 2, **style)
    low, high = min(v.min() for v in lines.values()), max(v.max() for v in lines.values())
    middle = (low + high) / 2
    axes.set_ylim(middle - 0.56 * span, middle + 0.56 * span)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))


def frame(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] as PNG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = MAX_FRAME_EDGE / max(image.size)
    if scale < 1:
        image = image.resize([math.ceil(edge * scale) for edge in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return address("image/png", buffer.getvalue())
