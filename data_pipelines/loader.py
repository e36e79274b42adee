"""Batches of every stage. The order is a function of seed, step and what is left out, whatever the number of processes.

Starts of an episode of n steps: n - chunk (action_vae), n - chunk - span (trajectory, robot; both as published),
n - span + 1 (video: no chunk follows), n (vqgan: single frames of every view); span is the steps that the frames of
one example cover. A corpus (`records:DIR`) yields one example a record and epoch instead, its start drawn, in sequences
that are planned ahead (`packing.py`). A mixture takes its sources in turn by their weights, each shuffled by itself.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import grain
import numpy as np

from data_pipelines import statistics as data_statistics
from data_pipelines import transforms
from data_pipelines.corpus import packing, records
from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.sources import open_source
from data_pipelines.stream import position
from rynnvla_jax.actions import Statistics
from rynnvla_jax.config import ConfigError, DataConfig, TrainConfig
from rynnvla_jax.images import frame_size
from rynnvla_jax.sequence import PATCH, frame_length, sequence_length
from rynnvla_jax.vocabulary import TextTokenizer

_TOKEN_STAGES = ("video", "trajectory", "robot")
_ACTION_STAGES = ("action_vae", "trajectory", "robot")
_FEW = 1000  # examples: before so many are drawn, damaged ones are counted against so many

CodesOf = Callable[[Episode, str], np.ndarray]


@dataclass(frozen=True, eq=False)
class _Examples:
    """What is drawn from one source: example number -> row. `plan` is a corpus's, `unused` counts short episodes."""

    count: int
    make: Callable
    plan: packing.Plan | None = None
    unused: int = 0


def open_sources(config: TrainConfig, progress: bool = True) -> list[Episodes]:
    """The sources of a run, with the views its stage reads; a VQGAN takes from each the views it has.

    Raises DataError, ConfigError.
    """
    views = None if config.stage == "vqgan" else _views(config)
    found = [open_source(source, config.data, views, progress) for source, _ in mixture(config.data)]
    for source in found:
        if config.stage == "vqgan" and not source.views:
            open_source(source.source, config.data, ("front",), progress)  # raises, and says what cameras there are
    return found


def mixture(config: DataConfig) -> tuple[tuple[str, float], ...]:
    """(source, weight) pairs. Raises ConfigError when there is none."""
    if not config.mixture and not config.source:
        raise ConfigError("data.source is empty; set it to KIND:PATH, or data.mixture to (source, weight) pairs")
    return config.mixture or ((config.source, 1.0),)


class Loader:
    """Opens the sources of a stage, checks all that can be checked, and yields batches from any step on.

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
        codes: Sequence[CodesOf | None] | None = None,
        sources: Sequence[Episodes] | None = None,
        progress: bool = True,
    ):
        """`statistics` None are computed if the stage has actions; `codes` has a `CodeStore` for each source, None for
        a tokenized corpus; `sources` are those of the config, opened already; `rows` int [B] are the rows of the global
        batch that this process needs, None all.

        Raises:
          ConfigError: settings that contradict each other or the data.
          DataError: data that is missing, inconsistent, too little, or in another unit than `statistics`.
        """
        _check(config, tokenizer)
        self.config = config
        self.rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        self.sources = list(open_sources(config, progress) if sources is None else sources)
        self.drawn = self.damaged = 0  # examples, and those of them replaced, since this loader was made
        self._views = _views(config)
        self._tokenizer = tokenizer
        _check_sources(self.sources, config)
        self.statistics = statistics
        if config.stage in _ACTION_STAGES:
            if statistics is None:
                statistics = data_statistics.compute(self.sources, config.data.chunk, progress)
            _check_statistics(statistics, self.sources[0])
            self.statistics = statistics
        self.frame_size = common_size(self.sources, config)
        self._size = cast(tuple[int, int], self.frame_size)  # where frames are read
        self._text_ids = _encode_texts(self.sources, tokenizer, config, self.frame_size)
        codes = codes or [None] * len(self.sources)
        self._examples = [self._build(*pair, progress) for pair in zip(self.sources, codes, strict=True)]
        needed = config.batch_size * config.sequence.clips
        if self.num_examples < needed and not any(examples.plan for examples in self._examples):
            raise DataError(
                f"{', '.join(s.source for s in self.sources)}: {sum(map(len, self.sources))} episodes give "
                f"{self.num_examples} examples for stage {config.stage}, fewer than one batch of {config.batch_size}; "
                "record more or lower batch_size"
            )

    @property
    def num_examples(self) -> int:
        """Distinct examples of one epoch, over all sources and processes."""
        return sum(examples.count for examples in self._examples)

    def describe(self) -> list[str]:
        """One line a source: episodes, duration, views, examples, sequence length, and what was left out."""
        weights = np.array([weight for _, weight in mixture(self.config.data)]) if len(self.sources) > 1 else np.ones(1)
        each = zip(self.sources, self._examples, weights / weights.sum(), strict=True)
        return [self._describe(*one) for one in each]

    def _describe(self, source: Episodes, examples: _Examples, share: float) -> str:
        hours = source.seconds / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        parts = [f"{100 * share:.1f} %"] if len(self.sources) > 1 else []
        parts += [f"{source.source}: {len(source)} episodes", f"{int(source.lengths.sum(dtype=np.int64))} frames", time]
        if self.frame_size:
            views = source.views if self.config.stage == "vqgan" else self._views
            parts.append(f"views {', '.join(views)} at {self.frame_size[0]} x {self.frame_size[1]}")
        if self.config.stage in _ACTION_STAGES:
            parts += [f"unit {source.unit}", f"absolute columns {list(source.absolute)}"]
        parts += [f"{examples.unused} too short and unused"] if examples.unused else []
        parts.append(examples.plan.describe() if examples.plan else f"{examples.count} examples")
        if self._text_ids and source.texts:
            needed = self._needed(max(len(self._text_ids[text]) for text in source.texts))
            parts.append(f"{len(source.texts)} instructions, at most {needed} of {self.config.sequence.length} tokens")
        return ", ".join(parts)

    def batches(self, step: int = 0, skipped: Iterable[int] = ()) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches from step `step` on. Close the generator to stop its workers.

        Args:
          skipped: stream positions (batches in the order of a run that leaves none out) that are left out.

        Raises:
          DataError: more than `data.max_damaged` of the examples drawn cannot be read.
        """
        config = self.config
        streams = [self._stream(examples, config.seed + i) for i, examples in enumerate(self._examples)]
        stream = streams[0]
        if len(streams) > 1:
            stream = grain.MapDataset.mix(streams, [weight for _, weight in mixture(config.data)])
        dataset = _Chosen(stream, config.batch_size, self.rows, step, tuple(skipped))
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
            for batch in iterator:
                damaged = batch.pop("damaged")
                self.drawn += damaged.size
                self.damaged += int(damaged.sum())
                if self.damaged > config.data.max_damaged * max(self.drawn, _FEW):
                    raise DataError(
                        f"{self.damaged} of {self.drawn} examples could not be read, more than data.max_damaged "
                        f"{config.data.max_damaged:g} allows; mend the files named above (`rynnvla data validate`)"
                    )
                yield batch
        finally:
            iterator.close()

    def _stream(self, examples: _Examples, seed: int) -> grain.MapDataset:
        """Endless rows of one source. Draws come before any choice of rows: they are seeded by the place in the stream,
        not by this process's own."""
        config = self.config
        draw = transforms.Draw(config.data.image.jitter, config.sequence.clips)
        make = transforms.OtherIfDamaged(examples.make, examples.count)
        stream = grain.MapDataset.range(examples.count).seed(seed).shuffle().repeat().random_map(draw).map(make)
        if config.sequence.clips > 1 and config.stage in _TOKEN_STAGES and not examples.plan:
            stream = stream.batch(config.sequence.clips, batch_fn=self._pack())
        return stream

    def _needed(self, num_text: int) -> int:
        clips = self.config.sequence.clips
        return clips * sequence_length(num_text, frame_length(*self._size), self.config.sequence)

    def _pack(self) -> transforms.Pack:
        sequence = self.config.sequence
        codes = sequence.num_frames * self._size[0] * self._size[1] // PATCH**2
        return transforms.Pack(sequence.length, codes, sequence.clips)

    def _build(self, source: Episodes, codes: CodesOf | None, progress: bool) -> _Examples:
        config, stage = self.config, self.config.stage
        mode, chunk = config.data.normalization, config.data.chunk
        # Of these a stage has what it needs, else `_check` had raised.
        statistics, tokenizer = cast(Statistics, self.statistics), cast(TextTokenizer, self._tokenizer)
        tokenized = tokenized_corpus(source)
        steps: list[Callable]
        read: list[Callable] = [transforms.ReadFrames(config.data.image)]
        if config.data.image.jitter:
            read.append(transforms.ColourJitter())
        if stage == "action_vae":
            steps = [transforms.RelativeActions(statistics, chunk, mode, frames=False)]
            return self._windows(source, steps, ("actions", "actions_pad"))
        if stage == "vqgan":
            if tokenized:
                raise ConfigError(f"{source.source} holds VQ codes instead of frames; train a VQGAN on videos")
            return self._windows(source, [*read, transforms.SingleFrame()], ("images",))
        ahead = bool(codes or tokenized)
        if tokenized and config.data.frame_codes != "ahead":
            raise ConfigError(f"{source.source} holds VQ codes instead of frames; set data.frame_codes='ahead'")
        keys = ["tokens", "loss_mask"] + ([] if ahead else list(self._views))
        steps = [transforms.ReadCodes(codes)] if ahead else read
        grid = self._size[0] // PATCH, self._size[1] // PATCH
        encode = self._text_ids.__getitem__ if source.texts else tokenizer.encode
        steps.append(transforms.Compose(encode, grid, tokenizer.vocabulary, config.sequence))
        if stage != "video":
            steps.append(transforms.RelativeActions(statistics, chunk, mode, frames=True))
            keys += ["state", "actions", "actions_pad", "state_positions", "action_positions"]
        if source.corpus is None:
            return self._windows(source, steps, keys)
        plan = packing.prepare(source.corpus, config, tokenizer, self._size, progress)
        planned = transforms.Planned(
            episodes=source,
            plan=plan,
            views=self._views,
            length=config.sequence.num_frames,
            interval=config.sequence.frame_interval,
            stride=records.read_corpus(source.corpus)[1].stride,
            after=packing.window(config)[1],
            steps=transforms.Chain(tuple(steps), tuple(keys)),
            pack=self._pack() if config.sequence.clips > 1 else None,
        )
        return _Examples(len(plan), planned, plan)

    def _windows(self, source: Episodes, steps: list[Callable], keys: Sequence[str]) -> _Examples:
        """Every window of every episode. Raises DataError when all are too short."""
        config, chunk = self.config, self.config.data.chunk
        span = packing.window(config)[0]
        lengths = source.lengths.astype(np.int64)
        starts = {
            "action_vae": lengths - chunk,
            "vqgan": lengths * len(source.views),
            "video": lengths - span + 1,
        }.get(config.stage, lengths - chunk - span)  # as actions.start_indices counts
        starts = np.maximum(starts, 0)
        if not starts.any():
            raise DataError(
                f"{source.source}: no episode is long enough (longest {lengths.max()} steps) for stage {config.stage} "
                f"with {span} frames and chunks of {chunk}; record longer episodes or lower data.chunk"
            )
        frames = 1 if config.stage in ("vqgan", "action_vae") else config.sequence.num_frames
        views = source.views if config.stage == "vqgan" else self._views
        window = transforms.Window(
            episodes=source,
            ends=np.cumsum(starts),
            views=views,
            length=frames,
            interval=config.sequence.frame_interval,
            one_view=config.stage == "vqgan",
        )
        make = transforms.Chain((window, *steps), tuple(keys))
        return _Examples(int(starts.sum()), make, unused=int((starts == 0).sum()))


def tokenized_corpus(source: Episodes) -> records.CorpusLayout | None:
    """The layout of a corpus that holds VQ codes."""
    layout = records.read_corpus(source.corpus)[1] if source.corpus else None
    return layout if layout and layout.grid else None


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


def _check_sources(sources: list[Episodes], config: TrainConfig) -> None:
    """Raises DataError when sources with actions are not of one kind, ConfigError when they do not fit the model."""
    first, stage = sources[0], config.stage
    if stage not in _ACTION_STAGES:
        return
    for source in sources:
        if not source.action_width:
            raise DataError(f"{source.source} has no actions, which stage {stage} learns; use it in stage video")
        for what, a, b in (
            ("unit", first.unit, source.unit),
            ("action width", first.action_width, source.action_width),
            ("state width", first.state_width, source.state_width),
            ("absolute columns", first.absolute, source.absolute),
        ):
            if a != b:
                raise DataError(
                    f"{source.source}: {what} is {b!r} but {first.source} has {a!r}; mix data of one kind only"
                )
    if stage == "action_vae" and first.action_width != config.action_vae_model.action_dim:
        raise ConfigError(
            f"{first.source} has actions of {first.action_width} numbers but action_vae_model.action_dim is "
            f"{config.action_vae_model.action_dim}; set it to {first.action_width}"
        )
    if stage != "action_vae" and first.state_width != config.vla.state_dim:
        raise ConfigError(
            f"{first.source} has states of {first.state_width} numbers but vla.state_dim is {config.vla.state_dim}; "
            f"set it to {first.state_width}"
        )


def _check_statistics(statistics: Statistics, source: Episodes) -> None:
    if statistics.unit != source.unit:
        raise DataError(
            f"statistics are of {statistics.unit!r} but {source.source} holds {source.unit!r}; "
            f"use statistics of this data or convert it"
        )
    for what, a, b in (
        ("absolute columns", tuple(statistics.absolute), tuple(source.absolute)),
        ("action width", len(statistics.rel_mean_action), source.action_width),
        ("state width", len(statistics.mean_state), source.state_width),
    ):
        if a != b:
            raise DataError(f"statistics have {what} {a} but {source.source} has {b}; compute them on this data")


def common_size(sources: list[Episodes], config: TrainConfig) -> tuple[int, int] | None:
    """(height, width) of every frame after preprocessing; None without views."""
    if config.stage == "action_vae":
        return None
    sizes: dict[tuple[int, int], str] = {}
    for source in sources:
        layout = tokenized_corpus(source)
        if layout and layout.image != image_key(config.data):
            raise ConfigError(
                f"{source.source} was tokenized with data.image {layout.image}, this run has {image_key(config.data)}; "
                "make them equal"
            )
        for (height, width), where in source.frame_sizes.items():
            size = (height, width) if layout else frame_size(height, width, config.data.image)
            sizes.setdefault(size, f"{source.source} {where}")
    for (a, b), (first, other) in zip(pairwise(sizes), pairwise(sizes.values()), strict=True):
        raise DataError(
            f"frames of {other} become {b[0]} x {b[1]} pixels but those of {first} {a[0]} x {a[1]}; "
            f"bring all cameras to one aspect ratio, or set data.image.fit='square'"
        )
    (size,) = sizes
    frame_length(*size)  # raises unless both edges are multiples of 32
    return size


def image_key(config: DataConfig) -> str:
    """The image configuration that codes depend on, in JSON."""
    return json.dumps({k: v for k, v in dataclasses.asdict(config.image).items() if k != "jitter"})


def _encode_texts(
    sources: list[Episodes], tokenizer: TextTokenizer | None, config: TrainConfig, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Ids of every instruction that is known ahead. Raises ConfigError when the longest does not fit the sequence."""
    ids = {}
    if config.stage in _TOKEN_STAGES and tokenizer and size:
        ids = {text: tokenizer.encode(text) for text in sorted({t for source in sources for t in source.texts})}
    if not ids or not size:
        return {}
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


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which a program without absl's `app.run` never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
