"""What `rynnvla doctor` runs in processes of their own: one module per runtime, each prints one JSON answer."""

import json

MARK = "rynnvla doctor: "  # begins the line of the answer: runtimes print lines of their own before and after it


def answer(value: object) -> None:
    """Prints what a probe found, for `doctor.probe` to read."""
    print(MARK + json.dumps(value), flush=True)
