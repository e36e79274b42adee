"""Checks that `rynnvla doctor` runs in separate processes: one module per runtime, each prints one JSON result."""

import json

MARK = "rynnvla doctor: "  # begins the line of the answer: runtimes print lines of their own before and after it


def answer(value: object) -> None:
    """Prints what a probe found, for `doctor.probe` to read."""
    print(MARK + json.dumps(value), flush=True)
