"""Defines the examples of a source: every window of every episode, or the planned sequences of a corpus.

A corpus (`records:DIR`) yields one example per record and epoch, with a random start, in sequences that are planned
before training (`corpus/packing.py`). In all other sources every start is an example
(`rynnvla_jax.stage.start_counts`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines import transforms
from data_pipelines.corpus import packing, records
from data_pipelines.episode import DataError, Episodes
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.stage import STAGES, start_counts
from rynnvla_jax.vocabulary import TextTokenizer


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one source: example number -> row. A corpus has a `plan`; `unused` counts short episodes.

    `ends` int64 [n] is the running sum of the number of starts per episode, where every window is an example.
    """

    count: int
    make: Callable
    plan: packing.Plan | None = None
    unused: int = 0
    ends: np.ndarray | None = None


def every_window(source: Episodes, config: TrainConfig, steps: transforms.Chain) -> Examples:
    """Every window of every episode, through `steps`. Raises DataError when all episodes are too short."""
    stage = STAGES[config.stage]
    span, after = stage.window(config, published=True)
    starts = start_counts(source.lengths, span, after)
    views, each_view = stage.views(config), False
    if views is None:  # each start counts once for each view
        views, starts, each_view = source.views, starts * len(source.views), True
    if not starts.any():
        raise DataError(
            f"{source.source}: no episode is long enough (the longest has {source.lengths.max()} steps) for stage "
            f"{config.stage}, whose examples need {span + after} steps; record longer episodes, or reduce "
            f"{stage.long_by(config)}"
        )
    window = transforms.Window(
        episodes=source,
        ends=np.cumsum(starts),
        views=views,
        length=stage.num_frames(config),
        interval=config.sequence.frame_interval,
        one_view=each_view,
    )
    make = transforms.Chain((window, *steps.steps), steps.keys)
    return Examples(int(starts.sum()), make, unused=int((starts == 0).sum()), ends=window.ends)


def planned(
    source: Episodes,
    config: TrainConfig,
    steps: transforms.Chain,
    pack: transforms.Pack | None,
    tokenizer: TextTokenizer,
    size: tuple[int, int],
    progress: bool,
) -> Examples:
    """The sequences of a corpus, whose records go through `steps`. `size` is (height, width) of a frame in pixels.

    Raises DataError, ConfigError as `packing.prepare`.
    """
    assert source.corpus is not None
    stage = STAGES[config.stage]
    plan = packing.prepare(source.corpus, config, tokenizer, size, progress, source.kept)
    make = transforms.Planned(
        episodes=source,
        plan=plan,
        views=stage.views(config) or (),
        length=config.sequence.num_frames,
        interval=config.sequence.frame_interval,
        stride=records.read_corpus(source.corpus)[1].stride,
        after=stage.window(config, published=False)[1],
        steps=steps,
        pack=pack,
    )
    return Examples(len(plan), make, plan)
