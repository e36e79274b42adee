"""Helpers for error messages."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence

_LONGEST = 600
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 20


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "", otherwise: str = "") -> str:
    """The end of a message: " Did you mean {prefix}{the nearest of `known`}?", or `otherwise` if none is similar."""
    near = difflib.get_close_matches(word[:100], known, n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else otherwise


def listing(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """ "a, b and 3 more"; all items if there are at most `most`."""
    shown = separator.join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def brief(value: object) -> str:
    """`repr` of any value in one line of some hundred characters, however long or deep it is."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # a number of more digits than Python prints
        text = f"a large {type(value).__name__}"
    return shorten(text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text, 300)


def one_line(message: str) -> str:
    """A message that may quote a foreign file: escaped where it is not printable, and cut where it is very long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return text if len(text) <= 5 * _LONGEST else shorten(text, 5 * _LONGEST)


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
