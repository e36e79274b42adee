"""Batches of every stage. The order is a function of seed, step and what is left out, whatever the number of processes.

Starts of an episode of n steps: n - chunk (action_vae), n - chunk - span (trajectory, robot; both as published),
n - span + 1 (video: no chunk follows), n (vqgan: single frames of every view); span is the steps that the frames of
one example cover.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import grain
import numpy as np

from data_pipelines import statistics as data_statistics
from data_pipelines import transforms
from data_pipelines.episode import DataError, Episode
from data_pipelines.sources import open_source
from rynnvla_jax.actions import Statistics, start_indices
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.images import frame_size
from rynnvla_jax.sequence import PATCH, frame_length, sequence_length
from rynnvla_jax.stream import position
from rynnvla_jax.vocabulary import TextTokenizer

_TOKEN_STAGES = ("video", "trajectory", "robot")
_ACTION_STAGES = ("action_vae", "trajectory", "robot")


def open_episodes(config: TrainConfig, progress: bool = True) -> list[Episode]:
    """The episodes of a run, with the views its stage reads. Raises DataError, ConfigError.

    `data.source` may name several sources, separated by commas; a VQGAN takes from each the views it has.
    """
    episodes = []
    for source in config.data.source.split(","):
        views = _views(config)
        if config.stage == "vqgan" and source.startswith("egodex:"):
            views = ("front",)
        episodes += open_source(source, config.data, views, progress)
    return episodes


class Loader:
    """Opens the source of a stage, checks all that can be checked, and yields batches from any step on.

    Batches hold the B rows of the global batch that the loader was asked for.
      video, trajectory, robot: tokens int32 [B, S], loss_mask bool [B, S]; front (and wrist) uint8 [B, T, h, w, 3]
        unless codes were made ahead; with `sequence.clips` above 1 also segments and positions int32 [B, S], and T
        counts the frames of all clips.
      trajectory, robot: state float32 [B, T, S], actions float32 [B, T, C, A] (both normalised), actions_pad bool
        [B, T, C], state_positions and action_positions int32 [B, T].
      action_vae: actions float32 [B, C, A], actions_pad bool [B, C].   vqgan: images uint8 [B, h, w, 3].
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        tokenizer: TextTokenizer | None = None,
        statistics: Statistics | None = None,
        rows: np.ndarray | None = None,
        codes: Callable[[Episode, str], np.ndarray] | None = None,
        episodes: list[Episode] | None = None,
        progress: bool = True,
    ):
        """`statistics` None are computed if the stage has actions; `codes` is a `CodeStore`; `episodes` replaces
        `config.data.source`; `rows` int [B] are the rows of the global batch that this process needs, None all.

        Raises:
          ConfigError: settings that contradict each other or the data.
          DataError: data that is missing, inconsistent, too little, or in another unit than `statistics`.
        """
        _check(config, tokenizer)
        self.config = config
        self.rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        self._views = _views(config)
        self.episodes = episodes or open_episodes(config, progress)
        if config.stage != "vqgan":
            data_statistics.check_alike(self.episodes)
        _check_widths(config, self.episodes[0])
        self.statistics = statistics
        if config.stage in _ACTION_STAGES:
            if statistics is None:
                self.statistics = data_statistics.compute(self.episodes, config.data.chunk, progress)
            _check_statistics(self.statistics, self.episodes[0], config)
        self.frame_size = _common_size(self.episodes, self._views, config)
        self._text_ids = _encode_texts(self.episodes, tokenizer, config, self.frame_size)
        self._window = _window(self.episodes, self._views, config)
        if self.num_examples < config.batch_size * config.sequence.clips:
            raise DataError(
                f"{config.data.source}: {len(self.episodes)} episodes give {self.num_examples} examples for stage "
                f"{config.stage}, fewer than one batch of {config.batch_size}; record more or lower batch_size"
            )
        self._chain = self._build(tokenizer, codes)

    @property
    def num_examples(self) -> int:
        """Distinct examples of one epoch, over all processes."""
        return int(self._window.ends[-1])

    def describe(self) -> str:
        """One line: episodes, frames, duration, views, examples, sequence length, and what was left out."""
        frames = sum(len(e) for e in self.episodes)
        hours = sum(len(e) / e.fps for e in self.episodes) / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        unused = len(self.episodes) - len({id(episode) for episode, *_ in self._window.sources})
        parts = [
            f"{self.config.data.source}: {len(self.episodes)} episodes"
            + (f" ({unused} too short and unused)" if unused else ""),
            f"{frames} frames",
            time,
            f"views {', '.join(self._views) or 'none'}"
            + (f" at {self.frame_size[0]} x {self.frame_size[1]}" if self.frame_size else ""),
            f"unit {self.episodes[0].unit}",
            f"absolute columns {list(self.episodes[0].absolute)}",
            f"{self.num_examples} examples",
        ]
        if self._text_ids:
            needed = self._needed(max(map(len, self._text_ids.values())))
            parts.append(
                f"{len(self._text_ids)} instructions, at most {needed} of {self.config.sequence.length} tokens"
            )
        return ", ".join(parts)

    def batches(self, step: int = 0, skipped: Iterable[int] = ()) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches from step `step` on. Close the generator to stop its workers.

        Args:
          skipped: stream positions (batches in the order of a run that leaves none out) that are left out.
        """
        config = self.config
        # Draws come before the choice: they are then seeded by the place in the stream, not by this process's own.
        examples = (
            grain.MapDataset.range(self.num_examples)
            .seed(config.seed)
            .shuffle()
            .repeat()
            .random_map(transforms.DrawJitter(config.data.image.jitter))
            .map(self._chain)
        )
        if config.sequence.clips > 1 and config.stage in _TOKEN_STAGES:
            codes = config.sequence.num_frames * self.frame_size[0] * self.frame_size[1] // PATCH**2
            examples = examples.batch(config.sequence.clips, batch_fn=transforms.Pack(config.sequence.length, codes))
        dataset = _Chosen(examples, config.batch_size, self.rows, step, tuple(skipped))
        rows = len(self.rows)
        if config.data.num_workers:
            _mark_flags_parsed()
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            options = grain.MultiprocessingOptions(num_workers=config.data.num_workers, per_worker_buffer_size=2)
            iterator = iter(dataset.batch(rows).to_iter_dataset(read).mp_prefetch(options))
        else:
            threads = config.data.num_threads
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * rows if threads else 0)
            iterator = iter(dataset.to_iter_dataset(read).batch(rows))
        try:
            yield from iterator
        finally:
            iterator.close()

    def _needed(self, num_text: int) -> int:
        clips = self.config.sequence.clips
        return clips * sequence_length(num_text, frame_length(*self.frame_size), self.config.sequence)

    def _build(self, tokenizer: TextTokenizer | None, codes: Callable | None) -> transforms.Chain:
        config, stage = self.config, self.config.stage
        mode, chunk = config.data.normalization, config.data.chunk
        read = [transforms.ReadFrames(config.data.image)]
        if config.data.image.jitter:
            read.append(transforms.ColourJitter())
        if stage == "action_vae":
            steps = [transforms.RelativeActions(self.statistics, chunk, mode, frames=False)]
            return transforms.Chain((self._window, *steps), ("actions", "actions_pad"))
        if stage == "vqgan":
            return transforms.Chain((self._window, *read, transforms.SingleFrame()), ("images",))
        grid = self.frame_size[0] // PATCH, self.frame_size[1] // PATCH
        keys = ["tokens", "loss_mask"] + ([] if codes else list(self._views))
        steps = [transforms.ReadCodes(codes)] if codes else read
        steps.append(transforms.Compose(self._text_ids, grid, tokenizer.vocabulary, config.sequence))
        if stage != "video":
            steps.append(transforms.RelativeActions(self.statistics, chunk, mode, frames=True))
            keys += ["state", "actions", "actions_pad", "state_positions", "action_positions"]
        return transforms.Chain((self._window, *steps), tuple(keys))


class _Chosen(grain.MapDataset):
    """The rows `rows` of the batches from step `step` on, O(1) at any of them."""

    def __init__(
        self, stream: grain.MapDataset, batch_size: int, rows: np.ndarray, step: int, skipped: tuple[int, ...]
    ):
        super().__init__(stream)
        self._batch_size, self._rows, self._step, self._skipped = batch_size, rows, step, skipped

    def __len__(self) -> int:
        batches = len(self._parent) // self._batch_size - self._step - len(self._skipped)
        return max(batches, 0) * len(self._rows)

    def __getitem__(self, index):
        step, row = divmod(index, len(self._rows))
        place = position(self._step + step, self._skipped) * self._batch_size + self._rows[row]
        return self._parent[int(place)]


def _check(config: TrainConfig, tokenizer: TextTokenizer | None) -> None:
    if config.stage in _TOKEN_STAGES:
        if tokenizer is None:
            raise ConfigError(f"stage {config.stage} needs a tokenizer; set tokenizer or init_from.path")
        if config.sequence.use_state != (config.stage != "video"):
            raise ConfigError(f"stage {config.stage} needs sequence.use_state={config.stage != 'video'}")
    if config.stage == "action_vae" and config.data.chunk != config.action_vae_model.chunk:
        raise ConfigError(
            f"data.chunk {config.data.chunk} and action_vae_model.chunk {config.action_vae_model.chunk} differ; "
            f"make them equal"
        )


def _views(config: TrainConfig) -> tuple[str, ...]:
    if config.stage == "action_vae":
        return ()
    return ("front", "wrist") if config.sequence.use_wrist_frame else ("front",)


def _check_widths(config: TrainConfig, episode: Episode) -> None:
    action, state = episode.action.shape[1], episode.state.shape[1]
    if config.stage == "action_vae" and action != config.action_vae_model.action_dim:
        raise ConfigError(
            f"{config.data.source} has actions of {action} numbers but action_vae_model.action_dim is "
            f"{config.action_vae_model.action_dim}; set it to {action}"
        )
    if config.stage in ("trajectory", "robot") and state != config.vla.state_dim:
        raise ConfigError(
            f"{config.data.source} has states of {state} numbers but vla.state_dim is {config.vla.state_dim}; "
            f"set it to {state}"
        )


def _check_statistics(statistics: Statistics, episode: Episode, config: TrainConfig) -> None:
    if statistics.unit != episode.unit:
        raise DataError(
            f"statistics are of {statistics.unit!r} but {config.data.source} holds {episode.unit!r}; "
            f"use statistics of this data or convert it"
        )
    for what, a, b in (
        ("absolute columns", tuple(statistics.absolute), tuple(episode.absolute)),
        ("action width", len(statistics.rel_mean_action), episode.action.shape[1]),
        ("state width", len(statistics.mean_state), episode.state.shape[1]),
    ):
        if a != b:
            raise DataError(f"statistics have {what} {a} but {config.data.source} has {b}; compute them on this data")


def _common_size(episodes: list[Episode], views: tuple[str, ...], config: TrainConfig) -> tuple[int, int] | None:
    """(height, width) of every frame after preprocessing; None without views."""
    sizes = {}
    for episode in episodes:
        for view in episode.views:
            frames = episode.views[view]
            sizes.setdefault(frame_size(frames.height, frames.width, config.data.image), f"{episode.name} {view}")
    for (a, b), (first, other) in zip(pairwise(sizes), pairwise(sizes.values()), strict=True):
        raise DataError(
            f"frames of {other} become {b[0]} x {b[1]} pixels but those of {first} {a[0]} x {a[1]}; "
            f"bring all cameras to one aspect ratio"
        )
    if not sizes:
        return None
    (size,) = sizes
    frame_length(*size)  # raises unless both edges are multiples of 32
    return size


def _encode_texts(
    episodes: list[Episode], tokenizer: TextTokenizer | None, config: TrainConfig, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Ids of every instruction. Raises ConfigError when the longest does not fit the sequence."""
    if config.stage not in _TOKEN_STAGES:
        return {}
    ids = {text: tokenizer.encode(text) for text in sorted({t for e in episodes for t in e.texts})}
    text = max(ids, key=lambda t: len(ids[t]))
    clips = config.sequence.clips
    needed = clips * sequence_length(len(ids[text]), frame_length(*size), config.sequence)
    if needed > config.sequence.length:
        raise ConfigError(
            f"instruction {text!r} needs {needed} tokens with {config.sequence.num_frames} frames of {size[0]} x "
            f"{size[1]} pixels in {clips} clip(s) but sequence.length is {config.sequence.length}; raise it or use "
            "fewer or smaller frames"
        )
    return ids


def _window(episodes: list[Episode], views: tuple[str, ...], config: TrainConfig) -> transforms.Window:
    frames, interval, chunk = config.sequence.num_frames, config.sequence.frame_interval, config.data.chunk
    span = (frames - 1) * interval + 1

    def starts(n: int) -> int:
        if config.stage == "action_vae":
            return len(start_indices(n, chunk))
        if config.stage == "vqgan":
            return n
        if config.stage == "video":
            return max(0, n - span + 1)
        return len(start_indices(n, chunk, span))

    if config.stage == "vqgan":
        sources = [(e, (view,), starts(len(e))) for e in episodes for view in e.views]
    else:
        sources = [(e, views, starts(len(e))) for e in episodes]
    sources = [s for s in sources if s[2]]
    if not sources:
        longest = max(map(len, episodes))
        raise DataError(
            f"{config.data.source}: no episode is long enough (longest {longest} steps) for stage {config.stage} with "
            f"{span} frames and chunks of {chunk}; record longer episodes or lower data.chunk"
        )
    length = 1 if config.stage in ("vqgan", "action_vae") else frames
    return transforms.Window(tuple(sources), np.cumsum([s[2] for s in sources]), length, interval)


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which a program without absl's `app.run` never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
