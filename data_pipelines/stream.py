"""Which batch a step trains on. The training loop and the loader both use this, so that they agree."""

from collections.abc import Iterable, Sequence

Span = tuple[int, int, int]  # (first stream position, its first example, examples of a batch from there on)


def position(step: int, skipped: Iterable[int] = ()) -> int:
    """Stream position of step `step`: the step-th position that is not in `skipped`. Both count from 0."""
    for left_out in sorted(skipped):
        if left_out > step:
            break
        step += 1
    return step


def first_example(position: int, spans: Sequence[Span]) -> int:
    """Number of the first example of a batch: of how many the batches before it had, whatever their sizes were.

    Args:
      spans: ascending; the first one starts at position 0.
    """
    start, example, size = next(span for span in reversed(spans) if span[0] <= position)
    return example + (position - start) * size
