"""The style of the plots on report pages, and images as `data:` URLs. matplotlib only."""

import base64
import io
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, QUIET, LINE = "#1d2433", "#6b7485", "#d9dee7"
STYLE: "dict[RcKeyType, Any]" = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f5",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.hashsalt": "rynnvla",  # the same page from the same data
    "figure.constrained_layout.use": True,
}


def svg(figure: Figure) -> str:
    """A figure as a `data:` URL. Without pyplot, which would select a display for the whole process."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return address("image/svg+xml", buffer.getvalue())


def address(kind: str, content: bytes) -> str:
    """Bytes of a media type as a `data:` URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
