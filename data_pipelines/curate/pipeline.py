"""The Beam pipeline: lists the inputs, groups their names by shard, and makes each shard on one worker.

Only names go through the shuffle. A shard depends only on its inputs and the settings: videos are assigned to it by a
hash of their names and processed in order of their names. Its ledger is written before the shard gets its final name.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from data_pipelines.corpus import records
from data_pipelines.curate import captions as captions_lib
from data_pipelines.curate import ledger
from data_pipelines.curate.clips import CandidateClip, process_video
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.people import People
from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError, to_dict
from rynnvla_jax.storage import files


@dataclass(frozen=True)
class Job:
    """Everything a worker needs. Exactly one of `captions` (a table) and `caption_model` (a folder) is set."""

    videos: str  # pattern, as Beam's filesystems understand it
    directory: str
    captions: str
    caption_model: str
    num_shards: int
    config: CurateConfig


@dataclass(frozen=True, order=True)
class Video:
    name: str  # relative to the folder before the pattern's first wildcard
    path: str
    bytes: int


def find_videos(pattern: str) -> list[Video]:
    """The inputs, sorted. Raises DataError when no file matches.

    `/**/` matches any number of folders, including zero, as in shells; Beam itself requires at least one.
    """
    folder = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] + "/"
    results = FileSystems.match(list({pattern, pattern.replace("/**/", "/")}))
    found = {m.path: m.size_in_bytes for result in results for m in result.metadata_list}
    videos = sorted(Video(path.removeprefix(folder), path, size) for path, size in found.items())
    if not videos:
        raise DataError(
            f"no file matches {pattern}; correct it (/**/ matches any number of folders) and put it in "
            "quotes in the shell"
        )
    return videos


def shard_of(video: str, num_shards: int) -> int:
    """The shard of a video; depends on the video's name only."""
    return int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big") % num_shards


def unfinished(job: Job, videos: Iterable[Video]) -> list[int]:
    """Shards that do not exist, or were made from different inputs."""
    inputs: list[list[Video]] = [[] for _ in range(job.num_shards)]
    for video in videos:
        inputs[shard_of(video.name, job.num_shards)].append(video)
    found = ledger.inputs_of(files.place(job.directory), job.num_shards)
    return [s for s, (done, now) in enumerate(zip(found, inputs, strict=True)) if done != _digest(now)]


def settle(job: Job, table: bytes) -> None:
    """Writes curation.json, or compares the settings with it: a folder has one set of settings.

    `table`: content of the caption table. Raises ConfigError naming a setting that has changed.
    """
    file = files.place(job.directory) / "curation.json"
    settings = {
        "videos": job.videos,
        "captions": job.captions and f"{job.captions} (SHA-256 {hashlib.sha256(table).hexdigest()})",
        "caption_model": job.caption_model,
        "shards": job.num_shards,
        **to_dict(job.config),
    }
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, settings)
        return
    before = _read_settings(file)
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise ConfigError(
                f"{job.directory} was started with {name} {before.get(name)!r}, not {settings.get(name)!r}; "
                f"use the same value, or another --out"
            )


def settled(directory: str) -> int:
    """The number of shards that a folder was started with; 0 for a new folder."""
    file = files.place(directory) / "curation.json"
    return _read_settings(file)["shards"] if file.exists() else 0


def _read_settings(file: Path) -> dict[str, Any]:
    """Raises DataError."""
    remedy = "copy it again, or choose another --out"
    try:
        settings = files.read_json(file)
    except files.DamagedFileError as error:
        raise DataError(f"{error}; {remedy}") from None
    if not isinstance(settings, dict) or type(settings.get("shards")) is not int or settings["shards"] < 1:
        raise DataError(f"{file} does not hold the settings of a corpus; {remedy}")
    return settings


def build(pipeline: beam.Pipeline, job: Job, todo: list[int]) -> beam.PCollection:
    """(shard, counts by outcome) of the shards in `todo`."""
    return (
        pipeline
        | "Pattern" >> beam.Create([job.videos])
        | "List" >> beam.FlatMap(_by_shard, job.num_shards, frozenset(todo))
        | "Group" >> beam.GroupByKey()
        | "Curate" >> beam.ParDo(CurateShard(job))
    )


def _by_shard(pattern: str, num_shards: int, todo: frozenset[int]) -> Iterator[tuple[int, Video | None]]:
    """(shard, input); a None for every shard, so that those without inputs are made too."""
    for shard in sorted(todo):
        yield shard, None
    for video in find_videos(pattern):
        if (shard := shard_of(video.name, num_shards)) in todo:
            yield shard, video


class CurateShard(beam.DoFn):
    """(shard, its inputs) -> (shard, counts by outcome). Writes the shard and its ledger."""

    def __init__(self, job: Job):
        self.job = job
        self._shared = Shared()  # one caption model per worker process, whatever its number of threads

    def setup(self):
        self._people = People(self.job.config)
        self._captioner = self._shared.acquire(self._open_captioner)

    def _open_captioner(self) -> captions_lib.Captioner:
        if self.job.captions:
            return captions_lib.Table(self.job.captions, self.job.config.caption_column)
        return captions_lib.QwenVL(self.job.caption_model, self.job.config)

    def process(self, item: tuple[int, Iterable[Video | None]]) -> Iterator[tuple[int, dict[str, int]]]:
        shard, videos = item[0], sorted(v for v in item[1] if v is not None)
        job = self.job
        directory = files.place(job.directory)
        with ledger.written(directory, shard, job.num_shards, _digest(videos), job.config.pictures) as rows:
            records.write_shard(directory, shard, job.num_shards, self._records(videos, rows))
        for outcome, count in rows.counts.items():
            Metrics.counter("curate", outcome).inc(count)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(rows.counts.items()))
        logging.getLogger(__name__).info("shard %d of %d: %s", shard, job.num_shards, counts or "no inputs")
        yield shard, dict(rows.counts)

    def _records(self, videos: list[Video], rows: ledger.Ledger) -> Iterator[records.Record]:
        kept: list[CandidateClip] = []
        clips = (
            process_video(video.path, video.name, self._people, self.job.config) for video in videos
        )  # lazily: one clip at a time
        for clip in itertools.chain.from_iterable(clips):
            if clip.outcome != "kept":
                rows.add(clip)
                continue
            kept.append(clip)
            if len(kept) == self.job.config.caption_batch:
                yield from self._captioned(kept, rows)
                kept = []
        yield from self._captioned(kept, rows)

    def _captioned(self, clips: list[CandidateClip], rows: ledger.Ledger) -> Iterator[records.Record]:
        if not clips:
            return
        for clip, caption in zip(clips, self._captioner(clips), strict=True):
            clip.caption = caption
            if not caption:
                where = (
                    f"{self.job.captions} has no caption for this video"
                    if self.job.captions
                    else "the model returned an empty caption"
                )
                clip.outcome, clip.reason = "no_caption", where
            rows.add(clip)
            if caption:
                yield records.video_record(clip.clip_id, caption, clip.fps, clip.mp4, clip.count)


def _digest(videos: Iterable[Video]) -> str:
    lines = "".join(f"{v.name}\t{v.bytes}\n" for v in sorted(videos))
    return hashlib.sha256(lines.encode()).hexdigest()


def about(job: Job) -> dict[str, Any]:
    """The origin of the corpus, for corpus.json."""
    return {"made by": "rynnvla data curate", "videos": job.videos, "captions": job.captions or job.caption_model}
