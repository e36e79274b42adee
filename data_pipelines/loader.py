"""Batches of every stage. Their order depends only on seed, step and skipped batches, not on the number of processes.

`windows.py` defines the examples. A mixture alternates between its sources according to their weights; each source is
shuffled separately.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import grain
import numpy as np

from data_pipelines import checks, held_out, transforms, workers
from data_pipelines import statistics as data_statistics
from data_pipelines.columns import questions, suspicions
from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.rows import Chunks, Rows, open_rows
from data_pipelines.sources import mixture, open_sources
from data_pipelines.stream import Span, first_example, position
from data_pipelines.windows import Examples, every_window, planned
from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import describe, labels
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.errors import listing
from rynnvla_jax.recording import Recording, hertz
from rynnvla_jax.sequence import PATCH, frame_length, sequence_length
from rynnvla_jax.stage import STAGES
from rynnvla_jax.vocabulary import TextTokenizer

_FEW = 1000  # until this many examples are drawn, the share of damaged ones is computed as if there were this many

CodesOf = Callable[[Episode, str], np.ndarray]


class Loader:
    """Opens the sources of a stage, checks settings and data, and yields batches starting from any step.

    Batches hold the requested rows of the global batch, with the shapes that `Stage.batch_spec` gives.
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
        evaluates: bool = False,
    ):
        """With `statistics` None they are computed if the stage has actions. `codes` has one `CodeStore` per source, or
        None for a tokenized corpus; `sources` are the config's sources if they are open already; `rows` int [B] are the
        rows of the global batch that this process needs (None: all rows). With `evaluates` there are no `batches` but
        those of `fixed`.

        Raises:
          ConfigError: settings that contradict each other, the data or the shared memory of this machine.
          DataError: data that is missing, inconsistent, too little, or in a unit different from that of `statistics`.
        """
        checks.check_config(config, tokenizer)
        self.config = config
        self._stage = STAGES[config.stage]
        self.rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        self.opened = list(open_sources(config, progress) if sources is None else sources)
        self.splits = held_out.split(self.opened, config.evaluation) if config.evaluation.share else []
        self.sources = [part.train for part in self.splits] or self.opened  # what is trained on
        self.drawn = self.damaged = 0  # examples, and those of them replaced, since this loader was made
        self._tokenizer, self._evaluates = tokenizer, evaluates
        checks.check_sources(self.sources, config)
        self.statistics = statistics
        # Where an example is rows alone, a batch is gathered at once.
        alone = self._stage.actions and not self._stage.tokens and not evaluates
        self._rows = [open_rows(s, config.data, progress) if alone else None for s in self.sources]
        if self._stage.actions:
            if statistics is None:
                data = config.data
                statistics = data_statistics.compute(
                    self.sources, data.chunk, progress, data.percentile_range, self._rows
                )
            checks.check_statistics(statistics, self.sources[0], config)
            self.statistics = statistics
        self.frame_size = checks.common_size(self.sources, config)
        self._size = cast(tuple[int, int], self.frame_size)  # where frames are read
        spec = self._stage.batch_spec(config, self.frame_size)
        workers.check_shared_memory(spec, len(self.rows), config.data.num_workers)
        self._text_ids = checks.encode_texts(self.sources, tokenizer, config, self.frame_size)
        codes = codes or [None] * len(self.sources)
        self._examples = [self._build(*pair, progress) for pair in zip(self.sources, codes, strict=True)]
        needed = config.batch_size * config.sequence.clips
        packed = f" x {config.sequence.clips} clips" if config.sequence.clips > 1 else ""
        few = self.num_examples < needed and not any(examples.plan for examples in self._examples)
        if few and not evaluates:
            keys = "batch_size or sequence.clips" if packed else "batch_size"
            raise DataError(
                f"{', '.join(s.source for s in self.sources)}: {sum(map(len, self.sources))} episodes give "
                f"{self.num_examples} examples for stage {config.stage}, fewer than one batch of "
                f"{config.batch_size}{packed}; record more episodes or reduce {keys}"
            )

    @property
    def num_examples(self) -> int:
        """Distinct examples of one epoch, over all sources and processes."""
        return sum(examples.count for examples in self._examples)

    @property
    def epochs(self) -> list[tuple[int, int]]:
        """For each source the examples of one epoch, and those in a row of a batch: more than one where they are packed
        as they come. Of a plan, an example is a sequence."""
        clips = self.config.sequence.clips if self._stage.tokens else 1
        return [(examples.count, 1 if examples.plan else clips) for examples in self._examples]

    def describe(self) -> list[str]:
        """One line per source: episodes, duration, views, examples, sequence length, and what was left out."""
        weights = np.array([weight for _, weight in mixture(self.config.data)]) if len(self.sources) > 1 else np.ones(1)
        each = zip(self.sources, self._examples, weights / weights.sum(), strict=True)
        lines = [self._describe(*one) for one in each]
        recording = Recording(tuple(sorted({rate for source in self.sources for rate in source.rates})))
        if self._stage.actions and recording.mixed:
            lines.append(
                f"WARNING: recorded at {hertz(recording.rates)}: the same motion is of another size per step, and no "
                "control rate fits all of the policy; use sources of one rate"
            )
        return lines

    def _describe(self, source: Episodes, examples: Examples, share: float) -> str:
        hours = source.seconds / 3600
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        parts = [f"{100 * share:.1f} %"] if len(self.sources) > 1 else []
        parts += [f"{source.source}: {len(source)} episodes", f"{int(source.lengths.sum(dtype=np.int64))} frames", time]
        if self.frame_size:
            views = self._stage.views(self.config)
            views = source.views if views is None else views
            parts.append(f"views {', '.join(views)} at {self.frame_size[0]} x {self.frame_size[1]}")
        parts += [f"recorded at {hertz(source.rates)}"] if source.rates else []
        if self._stage.actions:
            kept = [name for i, name in enumerate(labels(source.columns.action)) if i in source.columns.kept]
            parts += [f"{source.columns.robot}: {describe(source.columns.action)}"]
            parts += [f"kept as recorded: {listing(kept, 8) or 'no column'}"]
        parts += [f"episodes too short to use: {examples.unused}"] if examples.unused else []
        parts.append(examples.plan.describe() if examples.plan else f"{examples.count} examples")
        if self._text_ids and source.texts:
            needed = self._needed(max(len(self._text_ids[text]) for text in source.texts))
            parts.append(f"{len(source.texts)} instructions, at most {needed} of {self.config.sequence.length} tokens")
        return ", ".join(parts)

    def questions(self) -> list[str]:
        """What the meaning of the columns leaves open, by source; [] for a stage that reads no actions."""
        if not self._stage.actions:
            return []
        return [
            f"{source.source}: {text}"
            for source in self.sources
            for text in (*questions(source.columns, stored=source.corpus is not None), *suspicions(source))
        ]

    def batches(
        self, step: int = 0, skipped: Iterable[int] = (), spans: Sequence[Span] = ()
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Endless batches starting from step `step`. Close the generator to stop its workers.

        Args:
          skipped: positions in the stream that are left out; the stream is the batches of a run that skips nothing.
          spans: sizes of the batches before and now, see `stream.first_example`; (): all have `config.batch_size`.

        Raises:
          DataError: more than `data.max_damaged` of the examples drawn cannot be read, or a worker process was killed.
        """
        config = self.config
        chunks = self._chunks()
        streams = [self._stream(i, chunks) for i in range(len(self.sources))]
        stream = streams[0]
        if len(streams) > 1:
            stream = grain.MapDataset.mix(streams, [weight for _, weight in mixture(config.data)])
        dataset = _Chosen(stream, self.rows, step, tuple(skipped), spans or ((0, 0, config.batch_size),))
        rows, threads = len(self.rows), config.data.num_threads
        if config.data.num_workers:
            # The processes already run in parallel; threads in each would multiply with them.
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            batches = dataset.batch(rows, batch_fn=chunks).to_iter_dataset(read)
            iterator = iter(workers.prefetched(batches, config.data.num_workers))
        elif chunks:
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 if threads else 0)
            iterator = iter(dataset.batch(rows, batch_fn=chunks).to_iter_dataset(read))
        else:
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * rows if threads else 0)
            iterator = iter(dataset.to_iter_dataset(read).batch(rows))
        try:
            while True:
                with workers.explained():
                    batch = next(iterator, None)
                if batch is None:
                    return
                damaged = batch.pop("damaged")
                self.drawn += damaged.size
                self.damaged += int(damaged.sum())
                if self.damaged > config.data.max_damaged * max(self.drawn, _FEW):
                    raise DataError(
                        f"{self.damaged} of {self.drawn} examples could not be read, more than data.max_damaged "
                        f"{config.data.max_damaged:g} allows; repair the files named above, or leave their "
                        "episodes out with data.exclude (rynnvla data validate SOURCE --fix OUT.json writes its file)"
                    )
                yield batch
        finally:
            iterator.close()  # ends worker processes and threads

    def fixed(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The same `count` examples whenever it is called, all where there are fewer, in batches; for evaluation.

        They are spread evenly over each source, which has its share of them by its weight, at least one; of a record of
        a corpus it is the window in the middle. A batch also has `real` bool [B], False in the rows that only fill up
        the last batch, and, where the stage has actions, what `transforms.Recorded` adds.
        """
        config, clips = self.config, self.config.sequence.clips
        weights = np.array([weight for _, weight in mixture(config.data)])
        rows = []
        for examples, share in zip(self._examples, weights / weights.sum(), strict=True):
            make = transforms.OtherIfDamaged(examples.make, examples.count)
            packs = clips > 1 and self._stage.tokens and not examples.plan
            # A sequence of a plan counts as the records that it may hold.
            each = clips if examples.plan else 1
            chosen = min(examples.count, max(1, round(count * share / each)))
            numbers = (2 * np.arange(chosen) + 1) * examples.count // (2 * chosen)
            groups = np.array_split(numbers, -(-chosen // clips)) if packs else numbers[:, None]
            rows += [partial(self._fixed, make, group.tolist(), packs) for group in groups]
        size = config.batch_size
        with ThreadPoolExecutor(max(1, config.data.num_threads)) as pool:
            for first in range(0, len(rows), size):
                wanted = first + self.rows
                made = list(pool.map(lambda row: row(), [rows[min(i, len(rows) - 1)] for i in wanted]))
                batch = {key: np.stack([row[key] for row in made]) for key in made[0]}
                damaged, batch["real"] = batch.pop("damaged"), wanted < len(rows)
                self.drawn += damaged.size
                self.damaged += int((damaged > 0).sum())
                yield batch

    def _fixed(self, make: Callable, numbers: list[int], packs: bool) -> dict[str, np.ndarray]:
        drawn = {"jitter": np.ones(3, np.float32), "fractions": np.full(self.config.sequence.clips, 0.5)}
        made = [make({"number": number, **drawn}) for number in numbers]
        return self._pack()(made) if packs else made[0]

    def _chunks(self) -> Chunks | None:
        """What gathers a batch, where the rows of all sources are there."""
        if not all(self._rows):
            return None
        first = np.cumsum([0, *(examples.count for examples in self._examples[:-1])])
        ends, data = tuple(cast(np.ndarray, examples.ends) for examples in self._examples), self.config.data
        rows, statistics = cast(tuple[Rows, ...], tuple(self._rows)), cast(Statistics, self.statistics)
        return Chunks(rows, first, ends, statistics, data.chunk, data.normalization)

    def _stream(self, number: int, chunks: Chunks | None) -> grain.MapDataset:
        """Endless rows of one source, or their numbers for `chunks`. Draws come before any choice of rows: they are
        seeded by the position in the stream, not by this process's own."""
        config, examples = self.config, self._examples[number]
        first = int(chunks.first[number]) if chunks else 0
        stream = grain.MapDataset.range(first, first + examples.count).seed(config.seed + number).shuffle().repeat()
        if chunks:
            return stream
        draw = transforms.Draw(config.data.image.jitter, config.sequence.clips)
        stream = stream.random_map(draw).map(transforms.OtherIfDamaged(examples.make, examples.count))
        if config.sequence.clips > 1 and self._stage.tokens and not examples.plan:
            stream = stream.batch(config.sequence.clips, batch_fn=self._pack())
        return stream.map(transforms.From(number)) if len(self.sources) > 1 else stream

    def _needed(self, num_text: int) -> int:
        clips = self.config.sequence.clips
        return clips * sequence_length(num_text, frame_length(*self._size), self.config.sequence)

    def _pack(self) -> transforms.Pack:
        sequence = self.config.sequence
        codes = sequence.num_frames * self._size[0] * self._size[1] // PATCH**2
        return transforms.Pack(sequence.length, codes, sequence.clips)

    def _build(self, source: Episodes, codes: CodesOf | None, progress: bool) -> Examples:
        config, stage = self.config, self._stage
        tokenized = checks.tokenized_corpus(source)
        ahead = bool(codes or tokenized)
        if tokenized and stage.single_frames:
            raise ConfigError(f"{source.source} holds VQ codes instead of frames; train a VQGAN on videos")
        if tokenized and stage.tokens and config.data.frame_codes != "ahead":
            raise ConfigError(f"{source.source} holds VQ codes instead of frames; set data.frame_codes='ahead'")
        steps: list[Callable] = []
        if stage.num_frames(config):
            steps += [transforms.ReadCodes(codes)] if ahead else [transforms.ReadFrames(config.data.image)]
            steps += [transforms.ColourJitter()] if config.data.image.jitter and not ahead else []
        if stage.single_frames:
            steps.append(transforms.SingleFrame())
        # A stage has those it needs; otherwise `check_config` had raised.
        statistics, tokenizer = cast(Statistics, self.statistics), cast(TextTokenizer, self._tokenizer)
        if stage.tokens:
            grid = self._size[0] // PATCH, self._size[1] // PATCH
            encode = self._text_ids.__getitem__ if source.texts else tokenizer.encode
            steps.append(transforms.Compose(encode, grid, tokenizer.vocabulary, config.sequence))
        if stage.actions:
            mode = config.data.normalization
            steps.append(transforms.RelativeActions(statistics, config.data.chunk, mode, frames=stage.tokens))
            steps += [transforms.Recorded(config.data.chunk)] if self._evaluates else []
        chain = transforms.Chain(tuple(steps), self._keys(ahead))
        if stage.tokens and source.corpus is not None:
            pack = self._pack() if config.sequence.clips > 1 else None
            return planned(source, config, chain, pack, tokenizer, self._size, progress)
        return every_window(source, config, chain)

    def _keys(self, ahead: bool) -> tuple[str, ...]:
        """What a row holds before it is packed."""
        frames = self._stage.views(self.config) or () if ahead else ()
        spec = self._stage.batch_spec(self.config, self.frame_size)
        more = transforms.RECORDED if self._evaluates and self._stage.actions else ()
        return (*(key for key in spec if key not in (*frames, "segments", "positions", "source")), *more)


class _Chosen(grain.MapDataset):
    """The rows `rows` of the batches from step `step` on, O(1) at any of them."""

    def __init__(
        self, stream: grain.MapDataset, rows: np.ndarray, step: int, skipped: tuple[int, ...], spans: Sequence[Span]
    ):
        super().__init__(stream)
        self._rows, self._step, self._skipped, self._spans = rows, step, skipped, tuple(spans)

    def __len__(self) -> int:
        batches = len(self._parent) // self._spans[-1][2] - self._step - len(self._skipped)
        return max(batches, 0) * len(self._rows)

    def __getitem__(self, index):
        step, row = divmod(index, len(self._rows))
        drawn = first_example(position(self._step + step, self._skipped), self._spans) + self._rows[row]
        return self._parent[int(drawn)]
