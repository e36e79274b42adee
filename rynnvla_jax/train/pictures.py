"""Pictures of a few held-out examples: predicted frames below recorded ones, predicted chunks over recorded ones.

Frames are predicted one code at a time from all that was recorded before it (teacher-forced), so a strip costs one
forward pass and shows what the token loss measures, not a video that the model would dream up (`rynnvla imagine`).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rynnvla_jax.columns import Columns, labels
from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.pages.plot_style import INK, STYLE

PREDICTED = "#d9480f"
MAX_COLUMNS = 12  # of actions that are drawn
DPI = 80


@dataclass(frozen=True)
class Shown:
    """What is drawn of n examples. `codes`: (recorded, predicted) int32 [n, T, views, h/16, w/16]; `chunks`: (recorded,
    predicted) float [n, C, A], targets in the data's unit. None where a stage has none."""

    codes: tuple[np.ndarray, np.ndarray] | None = None
    chunks: tuple[np.ndarray, np.ndarray] | None = None


def codes_of_rows(
    tokens: np.ndarray, code_to_token: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, places) [n, *shape] of the first image codes of rows of tokens [n, S]: those of a row's first clip."""
    known = np.full(max(int(tokens.max()), int(code_to_token.max())) + 1, -1, np.int32)
    known[code_to_token] = np.arange(len(code_to_token))
    codes = known[tokens]
    places = np.argsort(codes < 0, axis=1, kind="stable")[:, : int(np.prod(shape))]
    whole = (len(tokens), *shape)
    return np.take_along_axis(codes, places, axis=1).reshape(whole), places.reshape(whole)


class Artist:
    """Draws for one process; the VQGAN's decoder is read when it is first needed."""

    def __init__(self, vqgan: Path | None, views: Sequence[str], columns: Columns | None):
        self._vqgan, self._views, self._columns = vqgan, views, columns
        self._codec: FrameCodec | None = None

    def __call__(self, shown: Shown) -> dict[str, bytes]:
        """PNG files by name. Raises whatever can go wrong: the caller goes on without pictures."""
        drawn = {}
        with matplotlib.rc_context(STYLE):
            if shown.codes and self._vqgan:
                drawn["frames"] = png(self._frames(*(self._decode(codes) for codes in shown.codes)))
            if shown.chunks and self._columns:
                drawn["actions"] = png(chunk_figure(*shown.chunks, labels(self._columns.action)))
        return drawn

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        device = jax.local_devices()[:1]
        with jax.set_mesh(mesh_lib.make_mesh(MeshConfig(), list(device))):
            self._codec = self._codec or FrameCodec.load(self._vqgan or "", devices=device)
            return self._codec.decode(codes)

    def _frames(self, recorded: np.ndarray, predicted: np.ndarray) -> Figure:
        """uint8 [n, T, views, h, w, 3] both."""
        n, T, V, h, w, _ = recorded.shape
        figure = Figure(figsize=(1.3 * T * V, 1.3 * h / w * 2 * n + 0.3))
        axes = figure.subplots(2 * n, T * V, squeeze=False)
        for i in range(n):
            for column, (t, v) in enumerate((t, v) for v in range(V) for t in range(T)):
                for row, image, name in ((2 * i, recorded, "recorded"), (2 * i + 1, predicted, "predicted")):
                    cell = axes[row, column]
                    cell.set_xticks([])
                    cell.set_yticks([])
                    cell.grid(False)
                    if image is recorded or t:
                        cell.imshow(image[i, t, v])
                    else:
                        cell.text(0.5, 0.5, "given", ha="center", va="center", transform=cell.transAxes)
                    if not row:
                        cell.set_title(f"{self._views[v]}, frame {t + 1}", fontsize=7)
                    if not column:
                        cell.set_ylabel(name, fontsize=7)
        return figure


def chunk_figure(recorded: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Figure:
    """Chunks [n, C, A] both: an example a row, a column of the actions each."""
    n, C, A = recorded.shape
    shown = min(A, MAX_COLUMNS)
    figure = Figure(figsize=(1.7 * shown, 1.2 * n + 0.3))
    axes = figure.subplots(n, shown, squeeze=False, sharex=True)
    for i in range(n):
        for a in range(shown):
            cell: Any = axes[i, a]
            cell.plot(np.arange(1, C + 1), recorded[i, :, a], color=INK, linewidth=1.2, label="recorded")
            cell.plot(np.arange(1, C + 1), predicted[i, :, a], color=PREDICTED, linewidth=1.2, label="predicted")
            if not i:
                cell.set_title(names[a], fontsize=7)
    axes[0, 0].legend(fontsize=6, frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The file of a figure; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
