"""Which batch a step trains on. The training loop and the loader both use this, so that they agree."""

from collections.abc import Iterable


def position(step: int, skipped: Iterable[int] = ()) -> int:
    """Stream position of step `step`: the step-th position that is not in `skipped`. Both count from 0."""
    for left_out in sorted(skipped):
        if left_out > step:
            break
        step += 1
    return step
