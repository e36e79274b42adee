"""`rynnvla sweep`: a family of runs from one config file, checked before the first one starts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rynnvla_jax.config import ConfigError, to_dict
from rynnvla_jax.launch import command
from rynnvla_jax.sweep import check, plan, run
from rynnvla_jax.sweep.plan import Definition, Point

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

            return search.search(definition, arguments)
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

        launched = jobs.job(arguments.launcher, options)
        devices = jobs.devices(launched)
    points, found = checked(definition, plan.points(definition), arguments, devices)
    print(listing(points, found.verdicts, arguments.utilization, out), flush=True)
    metrics = sorted(set.intersection(*(set(v.metrics) for v in found.verdicts)))
    check_metric(arguments.metric, metrics)
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


def checked(
    definition: Definition, listed: Sequence[dict], arguments: argparse.Namespace, devices: int | None = None
) -> tuple[list[Point], check.Found]:
    """The points of a sweep and what was found of them, on the devices here or on so many elsewhere.

    Raises:
      ConfigError: names every fault of every point.
    """
    points, faults = plan.resolve(definition, listed)
    if not points:
        raise ConfigError(describe(faults, len(listed)))
    pod = check.Pod(arguments.topology, arguments.slices) if arguments.topology else None
    workdirs = [arguments.out / p.name for p in points]
    files = arguments.launcher == "slurm" or (arguments.launcher == "local" and not pod)
    found = check.ask([p.config for p in points], workdirs, arguments.parallel, pod, files, devices)
    faults += [(p.number, f) for p, v in zip(points, found.verdicts, strict=True) for f in v.faults]
    if faults:
        raise ConfigError(describe(faults, len(listed)))
    return points, found


def describe(faults: Sequence[tuple[int, str]], total: int) -> str:
    """All faults in one message, each once, with the points that have it."""
    where: dict[str, list[int]] = {}
    for number, text in sorted(faults, key=lambda fault: fault[0]):
        where.setdefault(text, []).append(number)
    bad = {number for number, _ in faults}
    lines = [f"{len(bad)} of {total} points are wrong; nothing was started"]
    for text, numbers in where.items():
        whose = "all" if len(numbers) == total > 1 else ", ".join(f"{n:03d}" for n in numbers)
        lines.append(f"  {whose}: {text}")
    return "\n".join(lines)


def check_metric(metric: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a metric that no run would write."""
    if metric not in known:
        raise ConfigError(f"--metric {metric} is not in metrics.jsonl of these runs; choose one of {', '.join(known)}")


def listing(points: Sequence[Point], verdicts: Sequence, utilization: float, out: Path) -> str:
    """The points as a table: name, differing keys, what they need of a pod, and what is done."""
    keys = plan.differing(points)
    flat = [plan.flattened(to_dict(p.config)) for p in points]
    columns = [["point", *(p.name for p in points)]]
    columns += [[plan.short(key), *(plan.brief(f[key]) for f in flat)] for key in keys]
    if any(v.hbm is not None for v in verdicts):
        columns.append(["GiB a chip", *(f"{v.hbm:.2f}" for v in verdicts)])
    if any(v.chip_hours is not None for v in verdicts):
        hours = [v.chip_hours and v.chip_hours / utilization for v in verdicts]
        title = f"chip hours at {utilization:.0%} of peak"
        columns.append([title, *("-" if h is None else f"{h:,.1f}" for h in hours)])
    states = ["finished" if p.finished(out) else "started" if (out / p.name).exists() else "" for p in points]
    if any(states):
        columns.append(["state", *states])
    return run.table(list(zip(*columns, strict=True)))


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
