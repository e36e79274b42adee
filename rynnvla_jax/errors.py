"""Helpers for error messages."""

import difflib
import re
from collections.abc import Iterable, Sequence

_LONGEST = 600


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "", otherwise: str = "") -> str:
    """The end of a message: " Did you mean {prefix}{the nearest of `known`}?", or `otherwise` if none is similar."""
    near = difflib.get_close_matches(word[:100], known, n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else otherwise


def listing(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """ "a, b and 3 more"; all items if there are at most `most`."""
    shown = separator.join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def shorten(error: BaseException | str, longest: int = _LONGEST) -> str:
    """An error in one line of at most `longest` characters: the system's message, or the first line; never empty.

    The list of source files in TensorStore's errors is left out.
    """
    text = str(getattr(error, "strerror", None) or error)
    text = re.sub(r"\s*\[source locations=.*", "", text, flags=re.DOTALL).strip()
    line = " ".join((text.splitlines() or [""])[0].split())
    if not line and isinstance(error, BaseException):
        line = type(error).__name__
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 5]} ... {line[-end:]}"
