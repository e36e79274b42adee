"""`rynnvla data curate`: raw ego-centric videos -> captioned clips in ArrayRecord shards."""

import contextlib
import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_pipelines.curate.config import CurateConfig
from rynnvla_jax.cli.arguments import OR_BUCKET, parse
from rynnvla_jax.storage import files, lease


@dataclass(frozen=True)
class _Files:
    videos: Annotated[str, tyro.conf.arg(metavar="PATTERN")]
    """The videos, for example 'gs://BUCKET/**/*.mp4'."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR"), OR_BUCKET]
    """The corpus to write."""
    runner: Literal["direct", "dask", "dataflow", "flink", "spark", "portable"] = "direct"
    """Runner of Apache Beam."""
    captions: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A .csv, .jsonl or .parquet with columns file and caption."""
    caption_model: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with a Qwen2-VL checkpoint, which writes the captions."""
    shards: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Number of files of the corpus, which are also the units of work; 0: one per 256 MB of input videos."""
    review: bool = False
    """Also write OUT/review/*.html, on which a person judges the clips that a possible face decides."""


@dataclass(frozen=True)
class Curate(CurateConfig, _Files):  # in help the fields of the last one come first
    """Cuts raw ego-centric videos into captioned clips, as a corpus that config.data.source=records:OUT trains from.

    It cuts videos into clips, looks for faces and hands in a few frames of each, drops clips with a face or without
    hands, captions the others and writes them to ArrayRecord shards. OUT/report.html shows what was kept and dropped;
    OUT/curation/ lists it for every input, with landmarks. Of clips that are the same or look the same only one is
    read later; OUT/duplicates.json names the others.

    The same command continues after an interruption: finished shards are not written again, unless their videos were
    added, removed or changed. Other settings need another OUT. Run `rynnvla fetch people` once on every worker.

    Options of Apache Beam come after --, for example

      here, on all cores     --runner direct -- --direct_running_mode multi_processing --direct_num_workers 0
      a Dask cluster         --runner dask -- --dask_client_address tcp://HOST:8786     (without it: this machine)
      Dataflow               --runner dataflow -- --project P --region R --temp_location gs://B/tmp \\
                             --sdk_container_image I
      Flink, Spark           --runner flink -- --flink_master HOST:8081 --environment_type LOOPBACK

    Videos may be anywhere that Beam can read: gs:// needs apache-beam[gcp], s3:// needs apache-beam[aws]. --out must be
    a folder that all workers can write: on one machine any, else a gs:// or s3:// bucket (with rynnvla_jax[gcs] or [s3]
    on the workers) or a shared file system. Nothing keeps a second command from writing into one OUT of s3:// at the
    same time.
    """


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    own, beams = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    a = parse(Curate, "rynnvla data curate", own)
    logging.getLogger("data_pipelines").setLevel(logging.INFO)
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")  # else it tells of every connection
    from data_pipelines.corpus import records
    from data_pipelines.curate import duplicates, pipeline, report, review, run

    config = CurateConfig(**{field.name: getattr(a, field.name) for field in dataclasses.fields(CurateConfig)})
    model = str(a.caption_model.resolve()) if a.caption_model else ""
    files.check(a.out, write=True)
    # In s3:// there are no conditional writes, which the lease needs; two copies of a command write the same records.
    leased = not str(a.out).startswith("s3://")
    with files.naming(a.out), lease.hold(a.out, "curating videos in", print) if leased else contextlib.nullcontext():
        job, videos = run.prepare(_absolute(a.videos), str(a.out), _absolute(a.captions or ""), model, a.shards, config)
        run.run(job, videos, run.RUNNERS[a.runner], beams)
        directory = files.place(job.directory)
        found = duplicates.find(directory, job.num_shards)
        run.show(job, report.write(a.out, job.num_shards, found), found)
        duplicates.write(directory, found)
        if a.review:
            pages = review.write(directory, job.num_shards, config, f"records:{a.out}")
            print(f"{pages[0]} ({len(pages)} page{'s' * (len(pages) > 1)} to judge faces by eye)")
        records.finish(job.directory, job.num_shards, pipeline.about(job))
    return 0


def _absolute(path: str) -> str:
    return path if "://" in path or not path else os.path.abspath(path)
