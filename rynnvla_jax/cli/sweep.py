"""`rynnvla sweep`: many runs from one config file, all checked before the first one starts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, ConfigName, parse, parse_with_overrides
from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command, gke, slurm
from rynnvla_jax.storage import files

if TYPE_CHECKING:
    from rynnvla_jax.sweep import check
    from rynnvla_jax.sweep.plan import Definition

PROGRAM = "rynnvla sweep"


@dataclass(frozen=True)
class Sweep:
    """Runs every point that get_hyper(h) of a config file lists, each in its own work dir OUT/POINT.

    rynnvla_jax/sweep/hyper.py documents get_hyper. All points are checked before anything starts. The same command
    continues: finished points never run again, interrupted ones resume, and new ones may be added at the end.

      rynnvla sweep --config configs/FILE.py:tiny --out runs/rates --parallel 2 --config.data.source=lerobot:DATA
      rynnvla sweep --config configs/FILE.py:7b --out runs/rates --topology v5p:4x4x4 --dry-run
      rynnvla sweep --config configs/FILE.py:7b --out /mnt/shared/rates --launcher slurm -- --nodes 4 --gpus-per-node 8
      rynnvla sweep --config configs/FILE.py:7b --out gs://BUCKET/rates --launcher gke -- --cluster POD ...
      rynnvla sweep --config configs/FILE.py:tiny --out runs/best --search optuna --trials 30

    With --search, get_search(trial) of the file returns the keys of each run, from Optuna's trial.suggest_*. With
    --launcher slurm or gke the command writes OUT/jobs and OUT/submit.sh and submits nothing; options after `--` are
    those of `rynnvla launch slurm|gke`. With OUT gs://BUCKET/NAME these files are in the folder BUCKET-NAME here. The
    exit status is 1 when points are invalid or failed, 130 or 143 after a signal.
    """

    config: ConfigName
    """A config file that has get_hyper(h)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR"), OR_BUCKET]
    """Directory for work dirs and logs; with --launcher slurm or gke also a gs:// bucket."""
    launcher: Literal["local", "slurm", "gke"] = "local"
    """Run the points on this machine, or write job files."""
    parallel: int = 1
    """Number of runs at the same time; each gets its share of cores or GPUs."""
    retries: int = 1
    """Further attempts at a point that fails."""
    dry_run: bool = False
    """Check and list the points, and start nothing."""
    topology: str | None = None
    """A pod, such as v5p:4x4x4: also check the memory there (as `rynnvla aot` does) and estimate the cost."""
    slices: int = 1
    """Number of such pods."""
    utilization: float = 0.4
    """Fraction of the peak FLOP/s that the cost estimate assumes for GPUs; that of TPUs is the compiler's."""
    metric: str | None = None
    """The metric that decides: the objective of a search; by default one of held-out data, or else the loss."""
    search: Literal["optuna"] | None = None
    """Sample get_search(trial) instead of get_hyper(h)."""
    trials: int | None = None
    """Total number of runs of a search."""
    direction: Literal["minimize", "maximize"] | None = None
    """Direction of --metric in a search; by default the better one for this metric."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    own, options = command.split(argv)
    arguments, overrides = parse_with_overrides(Sweep, PROGRAM, own)
    _check_arguments(arguments, options)
    from rynnvla_jax.sweep import plan, run

    definition = plan.define(arguments.config, overrides)
    try:
        if arguments.search:
            from rynnvla_jax.sweep import search

            return search.search(
                definition,
                arguments.out,
                arguments.metric,
                arguments.trials or 0,
                direction=arguments.direction,
                retries=arguments.retries,
                parallel=arguments.parallel,
                pod=_pod(arguments),
                dry_run=arguments.dry_run,
                utilization=arguments.utilization,
            )
        return _sweep(definition, arguments, options)
    except run.Interrupted as error:
        print(f"{PROGRAM}: {error}; the same command continues in {arguments.out}", file=sys.stderr)
        return error.status


def _sweep(definition: "Definition", arguments: Sweep, options: list[str]) -> int:
    from rynnvla_jax.sweep import listing, plan, run

    out = arguments.out
    launched = devices = None
    if arguments.launcher != "local":
        from rynnvla_jax.sweep import jobs

        launched = _job(arguments.launcher, options)
        devices = jobs.devices(launched)
    pod = _pod(arguments)
    points, found = listing.checked(
        definition,
        plan.points(definition),
        out,
        parallel=arguments.parallel,
        pod=pod,
        files=arguments.launcher == "slurm" or (arguments.launcher == "local" and not pod),
        devices=devices,
    )
    print(listing.table(points, found.verdicts, arguments.utilization, out), flush=True)
    metric = listing.chosen_metric(arguments.metric, found)
    if arguments.dry_run:
        print(f"{len(points)} points are valid; nothing was started (--dry-run)")
        return 0
    with run.locked(out) as lock:
        plan.remember(definition, points, out, metric)
        if launched:
            left = [p for p in points if not p.finished(out)]
            submit, warning = jobs.write(definition, left, out, launched)
            print(f"{warning}\n" * bool(warning), end="", file=sys.stderr)
            where = submit.parent / "jobs"
            print(f"{len(left)} job files in {where}; nothing was submitted; read them, then run: sh {submit}")
            return 0
        machine = run.Machine(definition, out, lock, arguments.parallel, found.platform, found.devices)
        failed = run.run_all(machine, points, arguments.retries)
    print(run.final_table(points, out, failed, metric))
    return 1 if failed else 0


def _pod(arguments: Sweep) -> "check.Pod | None":
    from rynnvla_jax.sweep import check

    return check.Pod(arguments.topology, arguments.slices) if arguments.topology else None


def _job(launcher: str, options: Sequence[str]) -> slurm.SlurmJob | gke.GkeJob:
    """The job that `rynnvla launch LAUNCHER OPTIONS` describes.

    Raises:
      UsageError: unknown options, options that a sweep decides itself, or wrong values.
    """
    decided = dict.fromkeys(("--out", "--format"), "a sweep writes its own job files; leave --out and --format out")
    program = f"rynnvla launch {launcher}"
    if launcher == "slurm":
        return parse(slurm.SlurmJob, program, options, decided)
    return parse(gke.GkeJob, program, options, decided)


def _check_arguments(arguments: Sweep, options: list[str]) -> None:
    a = arguments
    if options and a.launcher == "local":
        raise ConfigError("options after `--` need --launcher slurm or gke")
    if a.parallel < 1 or a.retries < 0 or a.slices < 1 or not 0 < a.utilization <= 1:
        raise ConfigError("--parallel and --slices must be at least 1, --retries at least 0, --utilization in (0, 1]")
    if a.parallel > 1 and a.launcher != "local":
        raise ConfigError(f"--parallel is for runs on this machine; leave it out with --launcher {a.launcher}")
    if a.topology and a.launcher == "local" and not a.dry_run:
        raise ConfigError(
            "--topology describes a pod, where --launcher local cannot run; add --dry-run, or --launcher slurm or gke"
        )
    if files.is_bucket(a.out):
        if a.launcher == "local" and not a.dry_run:
            raise ConfigError(
                f"--out {a.out}: runs on this machine need a folder here; for a bucket use --launcher slurm or gke"
            )
        from rynnvla_jax.storage import buckets

        if buckets.scheme(a.out) != "gs":
            raise ConfigError(f"--out {a.out}: checkpoints cannot be saved in s3:// (Orbax); use a gs:// bucket")
        buckets.check(a.out, write=not a.dry_run)
    if a.search and (a.launcher != "local" or not a.trials):
        raise ConfigError("--search needs --trials, and runs on this machine (--launcher local)")
    if a.trials and not a.search:
        raise ConfigError("--trials needs --search optuna")
