"""What metrics mean: which are better when they are higher, which are no results, and which one decides between runs.

A metric of training has the name that it has in metrics.jsonl. One of held-out data, in eval.jsonl, is "eval/NAME".
"""

from collections.abc import Collection

EVAL = "eval/"
HIGHER_IS_BETTER = ("token_accuracy", "perplexity")  # of codes: how many of them are used
DECIDING = ("eval/action_error", "eval/cross_entropy", "eval/reconstruction")  # the first one that there is
NO_BEST = ("grad_norm", "learning_rate", "trained_share", "padding_share", "hold_still_error", "repeat_motion_error")


def higher_is_better(metric: str) -> bool:
    """Whether a larger value is better: accuracies and the perplexity of codes; of all others a smaller one is."""
    return _kind(metric) in HIGHER_IS_BETTER


def has_best(metric: str) -> bool:
    """Whether a value of the metric can be better than another: not of baselines, shares and norms."""
    return _kind(metric) not in NO_BEST


def of_held_out(known: Collection[str]) -> list[str]:
    """Those of held-out data that can decide: means over everything, not of a column or a step ahead."""
    return [name for name in known if name.startswith(EVAL) and name.count("/") == 1 and has_best(name)]


def deciding(known: Collection[str]) -> str:
    """The metric that decides between runs that have the metrics `known`, unless another is asked for."""
    held_out = of_held_out(known)
    return next((name for name in DECIDING if name in held_out), held_out[0] if held_out else "loss")


def decides(metric: str, reason: str = "") -> str:
    """A sentence for people: which metric decides, in which direction, and why (a `reason`, or that of `deciding`)."""
    text = f"{metric} decides ({'higher' if higher_is_better(metric) else 'lower'} is better)"
    if reason:
        return f"{text}, {reason}"
    if metric.startswith(EVAL):
        return f"{text}: it is of data that the runs do not train on"
    return (
        f"{text}: of training data, because not all runs have held-out data (config.evaluation.share); the run that "
        "remembers its data best may win"
    )


def _kind(metric: str) -> str:
    return metric.removeprefix(EVAL).partition("/")[0]
