"""`rynnvla sweep`: a family of runs from one config file, checked before the first one starts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rynnvla_jax.cli import launch
from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command, gke, slurm
from rynnvla_jax.sweep import check, listing, plan, run
from rynnvla_jax.sweep.plan import Definition

_DESCRIPTION = """\
Runs every point that get_hyper(h) of a config file lists (its words: rynnvla_jax/sweep/hyper.py), each in its own
work dir OUT/POINT. All points are checked before anything starts. The same command continues: finished points never run
again, interrupted ones go on, new ones may be added behind. Any key can be overridden for all points, as in
`rynnvla train`.

  rynnvla sweep --config configs/FILE.py:tiny --out runs/rates --parallel 2 --config.data.source=lerobot:DATA
  rynnvla sweep --config configs/FILE.py:7b --out runs/rates --topology v5p:4x4x4 --dry_run
  rynnvla sweep --config configs/FILE.py:7b --out /mnt/shared/rates --launcher slurm -- --nodes 4 --gpus_per_node 8
  rynnvla sweep --config configs/FILE.py:tiny --out runs/best --search optuna --trials 30 --metric action_l1

With --search, get_search(trial) of the file gives the keys of each run by Optuna's trial.suggest_*. slurm and gke write
OUT/jobs and OUT/submit.sh, and submit nothing; what follows `--` are options of `rynnvla launch slurm|gke`.
Exit status: 1 when points are wrong or failed, 130 or 143 after a signal.
"""


def main(argv: list[str]) -> int:
    """Returns the exit status; expected errors are printed on stderr."""
    own, options = command.split(argv)
    arguments, rest = _parser().parse_known_args(own)
    try:
        _check_arguments(arguments, options)
        arguments.metric = arguments.metric or "loss"
        definition = plan.define(arguments.config, rest)
        if arguments.search:
            from rynnvla_jax.sweep import search

            return search.search(
                definition,
                arguments.out,
                arguments.metric,
                arguments.trials,
                direction=arguments.direction,
                retries=arguments.retries,
                parallel=arguments.parallel,
                pod=_pod(arguments),
                dry_run=arguments.dry_run,
                utilization=arguments.utilization,
            )
        return _sweep(definition, arguments, options)
    except ConfigError as error:
        print(f"rynnvla sweep: {error}", file=sys.stderr)
        return 1
    except run.Interrupted as error:
        print(f"rynnvla sweep: {error}; the same command continues in {arguments.out}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("rynnvla sweep: stopped before anything ran", file=sys.stderr)
        return 130


def _sweep(definition: Definition, arguments: argparse.Namespace, options: list[str]) -> int:
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
    metrics = sorted(set.intersection(*(set(v.metrics) for v in found.verdicts)))
    listing.check_metric(arguments.metric, metrics)
    if arguments.dry_run:
        print(f"{len(points)} points are right; nothing was started (--dry_run)")
        return 0
    with run.locked(out) as lock:
        plan.remember(definition, points, out, arguments.metric)
        if launched:
            left = [p for p in points if not p.finished(out)]
            submit, warning = jobs.write(definition, left, out, launched)
            print(f"{warning}\n" * bool(warning), end="", file=sys.stderr)
            print(f"{len(left)} job files in {out / 'jobs'}; nothing was submitted; read them, then: sh {submit}")
            return 0
        machine = run.Machine(definition, out, lock, arguments.parallel, found.platform, found.devices)
        failed = run.run_all(machine, points, arguments.retries)
    print(run.final_table(points, out, failed, arguments.metric))
    return 1 if failed else 0


def _pod(arguments: argparse.Namespace) -> check.Pod | None:
    return check.Pod(arguments.topology, arguments.slices) if arguments.topology else None


def _job(launcher: str, options: Sequence[str]) -> slurm.SlurmJob | gke.GkeJob:
    """What `rynnvla launch LAUNCHER OPTIONS` asks for.

    Raises:
      ConfigError: options that a sweep decides itself, or wrong values. Unknown ones end with argparse's usage.
    """
    arguments = launch.parser().parse_args([launcher, *options])
    if arguments.out or getattr(arguments, "format", "jobset") != "jobset":
        raise ConfigError("a sweep writes its own job files: leave --out and --format out of the launcher's options")
    return launch.job_of({"slurm": slurm.SlurmJob, "gke": gke.GkeJob}[launcher], arguments)


def _check_arguments(arguments: argparse.Namespace, options: list[str]) -> None:
    a = arguments
    if options and a.launcher == "local":
        raise ConfigError("options after `--` are those of --launcher slurm or gke")
    if a.parallel < 1 or a.retries < 0 or a.slices < 1 or not 0 < a.utilization <= 1:
        raise ConfigError("--parallel and --slices must be at least 1, --retries at least 0, --utilization in (0, 1]")
    if a.parallel > 1 and a.launcher != "local":
        raise ConfigError(f"--parallel is for runs on this machine; leave it out with --launcher {a.launcher}")
    if a.topology and a.launcher == "local" and not a.dry_run:
        raise ConfigError("--topology names a pod that is not here; add --dry_run, or --launcher slurm or gke")
    if a.search and (a.launcher != "local" or not a.trials or not a.metric):
        raise ConfigError("--search needs --trials and --metric, and runs on this machine (--launcher local)")
    if a.trials and not a.search:
        raise ConfigError("--trials goes with --search")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rynnvla sweep",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="rynnvla sweep --config FILE[:ARG] --out DIR [options] [--config.KEY=VALUE ...] [-- LAUNCHER OPTIONS]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file that has get_hyper(h)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="work dirs and logs go here")
    parser.add_argument("--launcher", choices=("local", "slurm", "gke"), default="local")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; each gets its share of cores or GPUs")
    parser.add_argument("--retries", type=int, default=1, help="more attempts at a point that fails (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="check and list the points")
    parser.add_argument("--topology", help="a pod, as v5p:4x4x4: check its memory too (`rynnvla aot`), and the price")
    parser.add_argument("--slices", type=int, default=1, help="how many such pods")
    parser.add_argument("--utilization", type=float, default=0.4, help="assumed for the price (%(default)s)")
    parser.add_argument("--metric", help="of metrics.jsonl: first in the last table, and what a search looks at (loss)")
    parser.add_argument("--search", choices=("optuna",), help="sample get_search(trial) instead of get_hyper(h)")
    parser.add_argument("--trials", type=int, help="how many runs a search makes in all")
    parser.add_argument("--direction", choices=("minimize", "maximize"), help="of --metric (what is better of it)")
    return parser
