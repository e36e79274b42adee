"""Small data sets that are part of the package, for the first run and for tests."""

from pathlib import Path

NAMES = ("so100", "egodex")


def path(name: str) -> Path:
    """Directory of the demo data set "so100" (LeRobot v3.0) or "egodex". Raises ValueError for other names."""
    if name not in NAMES:
        raise ValueError(f"demo data set {name!r} does not exist; choose {' or '.join(NAMES)}")
    return Path(__file__).parent / name
