"""Corpora of this project (`data_pipelines.corpus.records`), with random access; shards are opened on request.

Shards in gs:// are read by range: two requests when a shard is opened, one for a record. Those in s3://, which
ArrayRecord cannot read, are copied whole (`bucket_cache`).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from grain.sources import ArrayRecordDataSource

from data_pipelines.corpus import records
from data_pipelines.episode import DataError, Episode, Episodes, Kept, Summary
from data_pipelines.sources.exclude import left_in, left_out
from data_pipelines.video import probe
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import arrays, bucket_cache, files

PATIENCE = 600.0  # seconds that a bucket which does not answer is waited for, beyond what ArrayRecord's client waits
_PAUSE = 5.0  # between two tries
_TRIES = 3  # of a record whose bucket answers


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """A corpus of any size: sizes come from its metadata, and no shard is opened here. With `data.exclude`, or with
    duplicates, the kept records are renumbered.

    Raises DataError naming what is missing or has a newer schema, ConfigError for views that the corpus lacks.
    """
    corpus, layout = records.read_corpus(root)
    views = layout.views if views is None else views
    if missing := [v for v in views if v not in layout.views]:
        raise ConfigError(
            f"{root} has views {', '.join(layout.views)}, but not {missing[0]}; set sequence.use_wrist_frame and "
            "data.extra_views to match"
        )
    try:
        here = bucket_cache.copy(root, progress) if str(root).startswith("s3://") else root
        file = bucket_cache.copy(here / records.LENGTHS, progress)
        lengths = arrays.map_array(file)
    except (arrays.DamagedArrayError, OSError) as error:
        raise DataError(f"{root}/lengths.npy cannot be read ({shorten(error)}); copy the corpus again") from None
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
        raise DataError(f"{root}/lengths.npy does not hold one number of steps for each record; copy the corpus again")
    if len(lengths) != corpus["records"]:
        raise DataError(
            f"{root}/lengths.npy has {len(lengths)} entries for {corpus['records']} records; "
            "run the command that writes the corpus again"
        )
    expected = corpus.get("sha256", {}).get(records.LENGTHS)
    if expected and files.sha256(file) != expected:
        raise DataError(
            f"{root}/lengths.npy is not the file that was written (its SHA-256 differs); copy the corpus again, or run "
            "the command that writes it again"
        )
    source = f"records:{root}"
    read: Callable[[int], Episode] = _Reader(str(here), tuple(corpus["shard_lengths"]), layout, views)
    copies = records.duplicates(root, corpus)
    kept: np.ndarray | None = None
    if copies or (config.exclude and left_out(source, config.exclude)):
        columns = ["clip_id", "steps", "seconds", "height", "width"]
        table = pa.concat_tables(records.read_manifest(root, corpus["shard_lengths"], columns))
        names = table["clip_id"].to_pylist()
        kept = np.array([i for i in left_in(source, names, config) if names[i] not in copies], np.int64)
        if not len(kept):
            raise DataError(f"data.exclude {config.exclude} leaves only duplicates of {source}; correct the file")
        lengths, read = lengths[kept], Kept(read, kept)
        corpus |= records.extent(table.take(kept))
    return Episodes(
        source=source,
        lengths=lengths,
        read=read,
        texts=(),
        frame_sizes={(h, w): f"{n} records" for h, w, n in corpus["frame_sizes"]},
        seconds=corpus["seconds"],
        views=views,
        columns=layout.columns,
        corpus=root,
        rates=tuple(corpus.get("rates", ())),
        files=partial(_files, here, tuple(corpus["shard_lengths"]), bool(copies)),
        summaries=partial(_summaries, root, tuple(corpus["shard_lengths"]), kept),
    )


def _summaries(root: Path, shard_lengths: Sequence[int], kept: np.ndarray | None) -> Iterator[Summary]:
    """From the manifest; of the records `kept`, None: all."""
    first, left = 0, None if kept is None else np.isin(np.arange(sum(shard_lengths)), kept)
    for table in records.read_manifest(root, shard_lengths, ["clip_id", "steps", "seconds"]):
        fps = table["steps"].to_numpy() / table["seconds"].to_numpy()
        for i, (name, rate) in enumerate(zip(table["clip_id"].to_pylist(), fps.tolist(), strict=True)):
            if left is None or left[first + i]:
                yield Summary(name, (), rate)
        first += len(table)


def _files(directory: Path, lengths: Sequence[int], duplicates: bool) -> list[Path]:
    names = ["corpus.json", records.DUPLICATES] if duplicates else ["corpus.json"]
    shards = [records.shard_name(i, len(lengths)) for i, n in enumerate(lengths) if n]
    return [directory / name for name in (*names, *shards)]


@dataclass(frozen=True)
class _Shard:
    """The fields that ArrayRecord's reader needs; with them it does not open a file to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Reader:
    """Record number -> Episode. Thread-safe; worker processes open their own files."""

    def __init__(
        self, directory: str, shard_lengths: tuple[int, ...], layout: records.CorpusLayout, views: tuple[str, ...]
    ):
        self._arguments = directory, shard_lengths, layout, views
        self._directory, self._lengths, self._layout, self._views = self._arguments
        self._source, self._opening = self._open(), threading.Lock()
        self._features = layout.features()
        self._ends = np.cumsum(shard_lengths)

    def __reduce__(self):
        return _Reader, self._arguments

    def _open(self) -> ArrayRecordDataSource:
        shards = []
        for i, n in enumerate(self._lengths):
            path = os.path.join(self._directory, records.shard_name(i, len(self._lengths)))
            if n:
                shards.append(_Shard(path, 0, n, n))
        return ArrayRecordDataSource(shards)

    def _record(self, number: int) -> bytes:
        """Raises what ArrayRecord does, and BucketError when the bucket does not answer for too long."""
        source = self._source
        if not files.is_bucket(self._directory):
            return source[number]
        began, tries, said = time.monotonic(), 0, False
        while True:
            try:
                return source[number]
            except Exception as error:
                # Its client has tried again for minutes. A bucket that does not answer damages no record.
                answers = self._answers(raising=time.monotonic() - began > PATIENCE)
                tries += answers
                if tries == _TRIES:
                    raise
                if not answers and not said:
                    reason = shorten(error)
                    print(f"{self._directory} does not answer ({reason}); waiting", file=sys.stderr, flush=True)
                    said = True
            time.sleep(_PAUSE)
            with self._opening:
                if source is self._source:
                    self._source = self._open()  # a reader that has failed stays so
                source = self._source

    def _answers(self, raising: bool) -> bool:
        """Whether the bucket can be read. Raises BucketError if it cannot and `raising`."""
        from rynnvla_jax.storage import buckets

        try:
            buckets.check(self._directory)
        except buckets.BucketError:
            if raising:
                raise
            return False
        return True

    def __call__(self, number: int) -> Episode:
        try:
            record = self._features.deserialize_example_np(self._record(number))
            return _episode(record, self._layout, self._views)
        except Exception as error:  # the reader and TFDS can raise any exception for damaged bytes
            if type(error).__name__ == "BucketError":  # no damage; the class is in a module with extras
                raise
            shard = int(np.searchsorted(self._ends, number, side="right"))
            name = records.shard_name(shard, len(self._lengths))
            row = number - int(self._ends[shard] - self._lengths[shard])
            raise DataError(
                f"{self._directory}/{name}: record {row} cannot be read ({shorten(error)}); "
                "copy the shard again, or delete it and run the command that writes the corpus again"
            ) from None


def _episode(record: records.Record, layout: records.CorpusLayout, views: tuple[str, ...]) -> Episode:
    name, steps = record["clip_id"].decode(), len(record["caption_of"])
    texts = tuple(caption.decode() for caption in record["captions"])
    parts = [record[key] for key in ("state", "action", "origin", "world_to_camera") if key in record]
    numbers = record["caption_of"]
    if not steps or any(len(part) != steps or not np.isfinite(part).all() for part in parts):
        raise ValueError("its states or actions are not one finite row per step")
    if numbers.min() < 0 or numbers.max() >= len(texts) or not all(text.strip() for text in texts):
        raise ValueError("its steps have no instruction")
    if not 0 < record["fps"] < np.inf:
        raise ValueError(f"it has {record['fps']} frames per second")
    if layout.grid:
        codes, frames = {view: record[f"{view}_codes"] for view in views}, {}
    else:
        codes, frames = {}, {view: probe(f"{name} {view}", record[f"{view}_video"]) for view in views}
    return Episode(
        name=name,
        texts=texts,
        text_of=record["caption_of"],
        fps=float(record["fps"]),
        state=record.get("state", np.zeros((steps, 0), np.float32)),
        action=record.get("action", np.zeros((steps, 0), np.float32)),
        columns=layout.columns,
        views=frames,
        codes=codes,
        stride=layout.stride,
        origin=record.get("origin"),
        world_to_camera=record.get("world_to_camera"),
    )
