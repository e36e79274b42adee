"""Ranges and defaults of options that several commands share. A value out of range raises UsageError."""

import math
import os
from pathlib import Path

from rynnvla_jax.cli.main import UsageError


def at_least(least: float, **options: float) -> None:
    """`options`: values by field name."""
    for name, value in options.items():
        if not least <= value < math.inf:
            raise UsageError(f"{_option(name)} is {value}; it must be at least {least}")


def edge(name: str, pixels: int) -> None:
    """The side of a square video, which must be even."""
    if pixels % 2 or not 32 <= pixels <= 1024:
        raise UsageError(f"{_option(name)} is {pixels}; it must be an even number from 32 to 1024")


def folder(name: str, path: Path) -> None:
    """A folder that exists or can be made."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{_option(name)} {path} is a file, not a folder")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
