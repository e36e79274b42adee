"""How this program starts modules of its own in other processes."""

import sys


def module(name: str) -> list[str]:
    """The command for `python -m name`; with -P nothing in the working directory shadows ours, such as `configs`."""
    return [sys.executable, "-P", "-m", name]
