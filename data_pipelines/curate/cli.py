"""`rynnvla data curate`: raw ego-centric videos -> captioned clips in ArrayRecord shards."""

import argparse
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from apache_beam import Pipeline
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.corpus import records
from data_pipelines.curate import config as config_lib
from data_pipelines.curate import ledger, pipeline, report
from data_pipelines.curate.captions import Table
from data_pipelines.curate.clips import OUTCOMES
from data_pipelines.curate.pipeline import Job
from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.progress import Bar, progress_bar
from rynnvla_jax.storage import fetch, files

RUNNERS = {
    # Not DirectRunner, which first tries to download another engine.
    "direct": "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner",
    "dask": "apache_beam.runners.dask.dask_runner.DaskRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "portable": "PortableRunner",
}
_DESCRIPTION = """\
Probes videos, cuts them into clips, looks for faces and hands in a few frames of each, drops clips with a face or
without hands, captions the others and writes them as ArrayRecord shards that `config.data.source=records:DIR` trains
from. DIR/report.html shows what was kept and dropped; DIR/curation/ says it for every input, landmarks included.

The same command goes on after an interruption: finished shards are not made again, unless videos were added to them,
removed or changed. Other settings need another DIR. `rynnvla fetch people` is needed once on every machine that works.
"""
_EPILOG = """\
Options of Apache Beam follow after --, for example

  here, on all cores     --runner direct -- --direct_running_mode multi_processing --direct_num_workers 0
  a Dask cluster         --runner dask -- --dask_client_address tcp://HOST:8786     (without: a cluster on this machine)
  Dataflow               --runner dataflow -- --project P --region R --temp_location gs://B/tmp --sdk_container_image I
  Flink, Spark           --runner flink -- --flink_master HOST:8081 --environment_type LOOPBACK

Videos may be anywhere that Beam reads: gs:// needs apache-beam[gcp], s3:// apache-beam[aws]. --out is a folder that all
workers see, for example a bucket mounted with gcsfuse.
"""


def main(argv: list[str]) -> int:
    """Returns the exit status; expected errors are one line on stderr."""
    own, beams = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    arguments = _parser().parse_args(own)
    logging.getLogger("data_pipelines").setLevel(logging.INFO)
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")  # else it tells of every connection
    try:
        job, videos = prepare(arguments)
        run(job, videos, RUNNERS[arguments.runner], beams)
        show(job, report.write(Path(job.directory), job.num_shards))
        records.finish(job.directory, job.num_shards, pipeline.about(job))
    except (ConfigError, DataError, OSError) as error:
        print(f"rynnvla data curate: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(arguments: argparse.Namespace) -> tuple[Job, list[pipeline.Video]]:
    """Everything that can be known to be wrong before any work is.

    Raises ConfigError, DataError or FetchError.
    """
    if "://" in arguments.out:
        raise ConfigError(f"--out {arguments.out} is not a folder; mount the bucket, for example with gcsfuse")
    if bool(arguments.captions) == bool(arguments.caption_model):
        raise ConfigError("give either --captions FILE or --caption_model DIR")
    if arguments.shards < 0:
        raise ConfigError(f"shards is {arguments.shards}; it must be positive, or 0 to choose by the inputs' size")
    config = config_lib.from_options(arguments)
    fetch.path("people")
    pattern, captions = _absolute(arguments.videos), _absolute(arguments.captions)
    videos = pipeline.find_videos(pattern)
    size = sum(video.bytes for video in videos)
    settled = pipeline.settled(arguments.out)
    out = Path(arguments.out)
    if not settled and out.exists() and files.contents(out):
        raise DataError(f"{arguments.out} is not empty and no curation; choose another --out")
    shards = arguments.shards or settled or max(1, round(size / records.SHARD_BYTES))
    model = str(Path(arguments.caption_model).resolve()) if arguments.caption_model else ""
    if model and not (Path(model) / "config.json").is_file():
        raise DataError(f"{model} holds no config.json; --caption_model is a folder with a Qwen2-VL")
    job = Job(pattern, str(Path(arguments.out).resolve()), captions, model, shards, config)
    table = b""
    if captions:
        known = Table(captions, config.caption_column).captions
        if not any(video.name in known for video in videos):
            example = next(iter(known), "nothing")
            raise DataError(f"{captions} has no caption for {videos[0].name} or any other video, but for {example}")
        with FileSystems.open(captions, compression_type="uncompressed") as file:
            table = file.read()
    pipeline.settle(job, table)
    return job, videos


def run(job: Job, videos: list[pipeline.Video], runner: str, options: list[str]) -> None:
    """Makes the shards that are not finished."""
    todo = pipeline.unfinished(job, videos)
    print(f"{len(videos)} videos, {job.num_shards} shards, {job.num_shards - len(todo)} of them finished before")
    if not todo:
        return
    _tidy(Path(job.directory))
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
        raise DataError(f"{len(left)} shards are not finished, the first is {left[0]}; run the same command again")


def _tidy(directory: Path) -> None:
    """Takes away what a killed run left half written, and corpus.json until all shards are there again."""
    (directory / "corpus.json").unlink(missing_ok=True)
    for folder in (directory, directory / "manifest", directory / "curation"):
        files.remove_partial(folder)


@contextlib.contextmanager
def _progress(job: Job, todo: list[int]) -> Iterator[None]:
    """A bar that counts files of finished shards: the same for every engine."""
    stop, directory = threading.Event(), Path(job.directory)
    before = {s: _changed(directory, s, job.num_shards) for s in todo}

    def watch(bar: Bar) -> None:
        while not stop.wait(2.0):
            bar.n = sum(_changed(directory, s, job.num_shards) != before[s] for s in todo)
            bar.refresh()

    with progress_bar(total=len(todo), desc="curate", unit="shard") as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            stop.set()


def _changed(directory: Path, shard: int, num_shards: int) -> float:
    file = ledger.path(directory, shard, num_shards)
    return file.stat().st_mtime if file.exists() else 0.0


def show(job: Job, page: Path) -> None:
    """A line an outcome."""
    totals = ledger.totals(Path(job.directory), job.num_shards)
    print(f"\n{'outcome':<12}{'clips':>10}{'hours':>10}")
    for outcome, text in OUTCOMES.items():
        print(f"{outcome:<12}{totals.clips[outcome]:>10}{totals.hours[outcome]:>10.3f}  {text}")
    print(f"\n{page}")


def _absolute(path: str) -> str:
    return path if "://" in path or not path else os.path.abspath(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rynnvla data curate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--videos", required=True, metavar="PATTERN", help="for example 'gs://BUCKET/**/*.mp4'")
    parser.add_argument("--out", required=True, metavar="DIR", help="the corpus")
    parser.add_argument("--runner", choices=RUNNERS, default="direct", help="Beam's engine (direct)")
    parser.add_argument(
        "--captions", default="", metavar="FILE", help=".csv, .jsonl or .parquet with columns file and caption"
    )
    parser.add_argument("--caption_model", default="", metavar="DIR", help="folder with a Qwen2-VL")
    parser.add_argument(
        "--shards",
        type=int,
        default=0,
        metavar="N",
        help="files of the corpus and units of work; 0: one for every 256 MB of videos (large enough for the object "
        "stores' throughput, small enough to be made again). Clips are smaller than what they are cut from",
    )
    config_lib.add_options(parser)
    return parser
