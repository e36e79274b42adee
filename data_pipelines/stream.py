"""Which batch a step trains on (plain Python: the loop and the loader agree by this)."""

from collections.abc import Iterable


def position(step: int, skipped: Iterable[int] = ()) -> int:
    """Stream position of step `step`, both from 0 on: the step-th one that is not in `skipped`."""
    for left_out in sorted(skipped):
        if left_out > step:
            break
        step += 1
    return step
