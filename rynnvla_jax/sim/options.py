"""Types of the options that `rynnvla record` and `rynnvla evaluate` share."""

import math
from argparse import ArgumentTypeError
from pathlib import Path


def natural(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def edge(text: str) -> int:
    """Pixels a side: videos have even ones."""
    value = positive(text)
    if value % 2 or not 32 <= value <= 1024:
        raise ArgumentTypeError(f"{text} is not an even number from 32 to 1024")
    return value


def amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text} is not a finite number from 0 on")
    return value


def seconds(text: str) -> float:
    value = amount(text)
    if not value:
        raise ArgumentTypeError(f"{text} is no time")
    return value


def directory(text: str) -> Path:
    """One that is there, or is to be made."""
    if Path(text).exists() and not Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is a file, not a folder")
    return Path(text)
