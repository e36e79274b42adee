"""Checks made before any work starts: settings and sources that do not fit together are refused."""

import dataclasses
import json
from itertools import pairwise

import numpy as np

from data_pipelines import columns
from data_pipelines.corpus import records
from data_pipelines.episode import DataError, Episodes
from data_pipelines.sources import KNOWN
from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import difference, wraps
from rynnvla_jax.config import ConfigError, DataConfig, TrainConfig
from rynnvla_jax.images import frame_size
from rynnvla_jax.sequence import frame_length, sequence_length
from rynnvla_jax.stage import STAGES
from rynnvla_jax.vocabulary import TextTokenizer


def check_config(config: TrainConfig, tokenizer: TextTokenizer | None) -> None:
    """Raises ConfigError when a stage that reads text has no tokenizer."""
    if STAGES[config.stage].tokens and tokenizer is None:
        raise ConfigError(f"stage {config.stage} needs a tokenizer; set tokenizer or init_from.path")


def check_sources(sources: list[Episodes], config: TrainConfig) -> None:
    """Raises DataError when sources with actions differ in kind, ConfigError when they do not fit the model."""
    first, stage = sources[0], STAGES[config.stage]
    if not stage.actions:
        return
    for source in sources:
        if not source.action_width:
            raise DataError(
                f"{source.source} has no actions, but stage {config.stage} learns actions; use it in stage video"
            )
        if differ := difference(first.columns, source.columns):
            known = [s.source for s in (first, source) if s.source.partition(":")[0] in KNOWN]
            but = f" (not beside {' and '.join(known)}: the meaning of such columns is known)" if known else ""
            raise DataError(
                f"{first.source} and {source.source} differ in what their columns mean: {differ}; mix only sources "
                f"that agree, or say what the columns of each mean in {columns.FILE} beside it{but}"
            )
    if stage.model == "action_vae" and first.action_width != config.action_vae_model.action_dim:
        raise ConfigError(
            f"{first.source} has actions of {first.action_width} values but action_vae_model.action_dim is "
            f"{config.action_vae_model.action_dim}; set it to {first.action_width}"
        )
    if stage.state and first.state_width != config.vla.state_dim:
        key = "" if first.state_width else ", or name the state's key (data.rlds.state)"
        raise ConfigError(
            f"{first.source} has states of {first.state_width} values but vla.state_dim is {config.vla.state_dim}; "
            f"set it to {first.state_width}{key}"
        )
    if config.vla.actions == "raw" and stage.state and first.action_width != config.vla.raw_width:
        raise ConfigError(
            f"{first.source} has actions of {first.action_width} values but a model with vla.actions='raw' and "
            f"vla.action_dim {config.vla.action_dim} predicts {config.vla.raw_width}; set vla.action_dim to "
            f"{first.action_width}"
        )


def check_statistics(statistics: Statistics, source: Episodes, config: TrainConfig) -> None:
    """Raises DataError when the statistics belong to a different kind of data, ConfigError to other percentiles."""
    data = config.data
    if data.normalization == "min_max" and statistics.percentiles != data.percentile_range:
        raise ConfigError(
            f"config.data.percentile_range is {data.percentile_range} but the statistics, of the ActionVAE or of this "
            f"run's start, hold {statistics.percentiles}; set the key to that"
        )
    if wraps(source.columns.action) and not wraps(statistics.columns.action):
        raise DataError(
            f"the statistics were made when jumps of angles were learnt as motions, but those of {source.source} are "
            "followed beyond a turn today; train the ActionVAE again, or start a new run without these statistics"
        )
    if differ := difference(statistics.columns, source.columns):
        kind, where = source.source.partition(":")[0], "beside it"
        if kind == "records":
            where = "beside the data that it is made from, and make it again"
        otherwise = f", or say what its columns mean in {columns.FILE} {where}"
        if kind in KNOWN and kind != "records":
            otherwise = " (the meaning of its columns is known, and no file changes it)"
        raise DataError(
            f"the statistics and {source.source} differ in what columns mean: {differ}; set config.action_vae to an "
            f"ActionVAE that was trained on such data (an ActionVAE's own run: use another --workdir){otherwise}"
        )


def common_size(sources: list[Episodes], config: TrainConfig) -> tuple[int, int] | None:
    """(height, width) of every frame after preprocessing; None for a stage that reads no frames.

    Raises DataError when frames have several sizes, ConfigError for codes made with different image settings.
    """
    if not STAGES[config.stage].num_frames(config):
        return None
    sizes: dict[tuple[int, int], str] = {}
    for source in sources:
        layout = tokenized_corpus(source)
        if layout and layout.image != image_key(config.data):
            raise ConfigError(
                f"{source.source} was tokenized with data.image {layout.image}, but this run has "
                f"{image_key(config.data)}; "
                "use the same data.image in this run, or tokenize the data again"
            )
        for (height, width), where in source.frame_sizes.items():
            size = (height, width) if layout else frame_size(height, width, config.data.image)
            sizes.setdefault(size, f"{source.source} {where}")
    for (a, b), (first, other) in zip(pairwise(sizes), pairwise(sizes.values()), strict=True):
        raise DataError(
            f"frames of {other} are {b[0]} x {b[1]} pixels after resizing but those of {first} are {a[0]} x {a[1]}; "
            f"use one aspect ratio for all cameras, or set data.image.fit='square'"
        )
    (size,) = sizes
    frame_length(*size)  # raises unless both edges are multiples of 32
    return size


def tokenized_corpus(source: Episodes) -> records.CorpusLayout | None:
    """The layout of a source that is a corpus of VQ codes; None for any other source."""
    layout = records.read_corpus(source.corpus)[1] if source.corpus else None
    return layout if layout and layout.grid else None


def image_key(config: DataConfig) -> str:
    """The image configuration that codes depend on, in JSON."""
    return json.dumps({k: v for k, v in dataclasses.asdict(config.image).items() if k != "jitter"})


def encode_texts(
    sources: list[Episodes], tokenizer: TextTokenizer | None, config: TrainConfig, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Token ids of every instruction known before training. Raises ConfigError when the longest does not fit."""
    ids = {}
    if STAGES[config.stage].tokens and tokenizer and size:
        ids = {text: tokenizer.encode(text) for text in sorted({t for source in sources for t in source.texts})}
    if not ids or not size:
        return {}
    text = max(ids, key=lambda t: len(ids[t]))
    clips = config.sequence.clips
    needed = clips * sequence_length(len(ids[text]), frame_length(*size), config.sequence)
    if needed > config.sequence.length:
        raise ConfigError(
            f"instruction {text!r} needs {needed} tokens with {config.sequence.num_frames} frames of {size[0]} x "
            f"{size[1]} pixels in {clips} clip(s) but sequence.length is {config.sequence.length}; increase it, or "
            "use fewer or smaller frames"
        )
    return ids
