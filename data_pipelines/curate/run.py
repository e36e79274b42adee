"""Turns raw ego-centric videos into captioned clips in ArrayRecord shards."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from apache_beam import Pipeline
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.corpus import records
from data_pipelines.curate import ledger, pipeline
from data_pipelines.curate.captions import Table, check_model
from data_pipelines.curate.clips import OUTCOMES
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.duplicates import Duplicate
from data_pipelines.curate.pipeline import Job
from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.progress import Bar, progress_bar
from rynnvla_jax.storage import fetch, files

_LOOK, _LOOK_BUCKET = 2.0, 30.0  # seconds between two looks for finished shards; one in a bucket is a request
RUNNERS = {
    # Not DirectRunner, which first tries to download another engine.
    "direct": "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner",
    "dask": "apache_beam.runners.dask.dask_runner.DaskRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "portable": "PortableRunner",
}


def prepare(
    videos: str, out: str, captions: str, caption_model: str, shards: int, config: CurateConfig
) -> tuple[Job, list[pipeline.Video]]:
    """Checks everything that can be checked before any work starts; returns the job and its videos.

    Raises ConfigError, DataError, FetchError or BucketError.
    """
    if bool(captions) == bool(caption_model):
        raise ConfigError("give either --captions FILE or --caption-model DIR")
    if shards < 0:
        raise ConfigError(f"shards is {shards}; it must be positive, or 0 to choose by the inputs' size")
    fetch.path("people")
    found = pipeline.find_videos(videos)
    size = sum(video.bytes for video in found)
    settled = pipeline.settled(out)
    folder = files.place(out)
    if not settled and folder.exists() and files.contents(folder):
        raise DataError(f"{out} is not empty and was not written by `rynnvla data curate`; choose another --out")
    shards = shards or settled or max(1, round(size / records.SHARD_BYTES))
    model = str(Path(caption_model).resolve()) if caption_model else ""
    if model:
        check_model(Path(model))
    job = Job(videos, str(folder.resolve()), captions, model, shards, config)
    table = b""
    if captions:
        known = Table(captions, config.caption_column).captions
        if not any(video.name in known for video in found):
            example = next(iter(known), "")
            raise DataError(
                f"{captions} has no caption for {found[0].name} or any other video"
                + (f"; it names videos such as {example}" if example else "; it is empty")
                + "; its column 'file' must hold paths relative to the searched folder"
            )
        with FileSystems.open(captions, compression_type="uncompressed") as file:
            table = file.read()
    pipeline.settle(job, table)
    return job, found


def run(job: Job, videos: list[pipeline.Video], runner: str, options: list[str]) -> None:
    """Makes the shards that are not finished."""
    todo = pipeline.unfinished(job, videos)
    print(f"{len(videos)} videos, {job.num_shards} shards, {job.num_shards - len(todo)} of them already finished")
    if not todo:
        return
    _tidy(files.place(job.directory))
    beam = Pipeline(options=PipelineOptions(options, runner=runner))
    pipeline.build(beam, job, todo)
    with _progress(job, todo):
        result = beam.run()
        try:
            result.wait_until_finish()
        finally:
            if client := getattr(result, "client", None):  # Dask's, which would wait for more
                client.close()
    if left := pipeline.unfinished(job, pipeline.find_videos(job.videos)):
        raise DataError(
            f"{len(left)} shards are not finished, the first is shard {left[0]}; run the same command again"
        )


def _tidy(directory: Path) -> None:
    """Removes files that a killed run left half written, and corpus.json until all shards exist again."""
    (directory / "corpus.json").unlink(missing_ok=True)
    for folder in (directory, directory / "manifest", directory / "curation"):
        files.remove_partial(folder)


@contextlib.contextmanager
def _progress(job: Job, todo: list[int]) -> Iterator[None]:
    """A progress bar that counts files of finished shards, so that it works with every engine."""
    stop, folder = threading.Event(), files.place(job.directory) / "curation"
    names = [ledger.path(folder.parent, s, job.num_shards).name for s in todo]
    before = files.listing(folder)

    def watch(bar: Bar) -> None:
        while not stop.wait(_LOOK_BUCKET if files.is_bucket(folder) else _LOOK):
            with contextlib.suppress(OSError):  # a bucket that does not answer for a moment
                now = files.listing(folder)
                bar.n = sum(now.get(name) != before.get(name) for name in names)
                bar.refresh()

    with progress_bar(total=len(todo), desc="curate", unit="shard") as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            stop.set()


def show(job: Job, page: Path, found: Mapping[str, Duplicate]) -> None:
    """Prints one line per outcome."""
    totals = ledger.totals(files.place(job.directory), job.num_shards, found)
    print(f"\n{'outcome':<12}{'clips':>10}{'hours':>10}")
    for outcome, text in OUTCOMES.items():
        print(f"{outcome:<12}{totals.clips[outcome]:>10}{totals.hours[outcome]:>10.3f}  {text}")
    if found:
        exact = sum(duplicate.kind == "exact" for duplicate in found.values())
        print(
            f"duplicates: {exact} exact, {len(found) - exact} near; delete {records.DUPLICATES} to train from them too"
        )
    print(f"\n{page}")
