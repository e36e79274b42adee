"""Pictures of a data page, each as a `data:` URL: frames as JPEG, codes as PNG, curves as SVG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from data_pipelines.episode import Episode
from rynnvla_jax.pages.plot_style import INK, QUIET, STYLE, address, svg

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType

_JOINTS = ("#1c6dd0", "#d9480f", "#2b8a3e", "#862e9c", "#c99700", "#0b7285", "#a61e4d", "#5f6b7d")
_WIDTH = 11.0  # inches of a figure that fills the page
_POINTS = 600  # of one curve
_EDGE = 272  # pixels: larger frames are scaled down for the page
_CODE_PIXELS = 8  # edge of one code's square
_DASHES = (0, (3, 1.5))  # of the action


def curves(episode: Episode, names: Sequence[str]) -> str:
    """State and action over seconds, one colour per column; columns that are kept as recorded (the gripper) have
    separate axes. A relative action has the colour of its state.

    With `Episode.origin` the action is shown as the motion of each step, since each episode has its own frame.
    """
    joints, kept = list(episode.columns.relative), list(episode.columns.kept)
    state = _beside(episode)
    panels: list[tuple[str, list[int], list[tuple[np.ndarray, bool]]]] = []  # title, columns, (values, dashed)
    if episode.origin is None:
        both = [(state, False), (episode.action, True)]
        panels += [("State and action", joints, both)] if joints else []
        panels += [(", ".join(names[c] for c in kept), kept, both)] if kept else []
    else:
        panels.append(("State", joints, [(state, False)]))
        panels.append(("Action: motion of each step", joints, [(episode.action - episode.origin, False)]))
    widths = [3 if columns is joints and kept else 1 for _, columns, _ in panels]
    keep = np.unique(np.linspace(0, len(episode) - 1, min(_POINTS, len(episode))).astype(int))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 2.7))
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
        for (title, columns, lines), axis in zip(panels, axes[0], strict=True):
            for values, dashed in lines:
                for c in (c for c in columns if not np.isnan(values[0, c])):
                    style: dict[str, Any] = {"linestyle": _DASHES, "linewidth": 0.9} if dashed else {"linewidth": 1.5}
                    label = None if dashed and not np.isnan(state[0, c]) else names[c]
                    colour = INK if columns is kept else _JOINTS[c % len(_JOINTS)]
                    axis.plot(keep / episode.fps, values[keep, c], color=colour, label=label, **style)
            axis.set_title(title)
            axis.set_xlabel("seconds")
            axis.xaxis.set_major_locator(MaxNLocator(8 if len(columns) > 1 else 4))
            axis.set_xlim(0, max(len(episode) - 1, 1) / episode.fps)
        axes[0, 0].set_ylabel(", ".join(sorted({episode.columns.action[c].unit for c in panels[0][1]} - {""})))
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if episode.origin is None:
            styles: list[tuple[str, LineStyleType]] = [("state", "-")] if episode.state.shape[1] else []
            for text, line in (*styles, ("action", _DASHES)):
                handles.append(Line2D([], [], color=QUIET, linestyle=line, linewidth=1.2))
                labels.append(text)
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=8)
        return svg(figure)


def _beside(episode: Episode) -> np.ndarray:
    """State [N, A]: for each action column the one it is paired with, or else that of its name; NaN without one."""
    names = {column.name: i for i, column in enumerate(episode.columns.state) if column.name}
    out = np.full(episode.action.shape, np.nan, np.float32)
    for c, column in enumerate(episode.columns.action):
        pair = names.get(column.name) if column.pair is None else column.pair
        if pair is not None:
            out[:, c] = episode.state[:, pair]
    return out


def lengths(counts: np.ndarray, edges: np.ndarray, fps: Sequence[float]) -> str:
    """Histogram of episode lengths; with a second axis in seconds where all episodes have the same rate."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.0))
        axis = figure.subplots()
        axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#1c6dd0", edgecolor="white")
        axis.set_xlabel("steps per episode")
        axis.set_ylabel("episodes")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if len(fps) == 1:
            rate = fps[0]
            top = axis.secondary_xaxis("top", functions=(lambda x: np.divide(x, rate), lambda x: np.multiply(x, rate)))
            top.set_xlabel("seconds")
            top.spines["top"].set_visible(False)
        return svg(figure)


def frame(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] as JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return address("image/jpeg", buffer.getvalue())


def codes(grid: np.ndarray) -> str:
    """VQ codes [h, w] as a map: each code has its own colour; similar colours have no meaning."""
    mixed = grid.astype(np.uint64) * np.uint64(2654435761)  # Knuth's: neighbouring codes get different colours
    pixels = np.stack([(mixed >> np.uint64(shift)) & np.uint64(255) for shift in (8, 16, 24)], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8)).resize(
        (grid.shape[1] * _CODE_PIXELS, grid.shape[0] * _CODE_PIXELS), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return address("image/png", buffer.getvalue())
