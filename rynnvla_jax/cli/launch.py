"""`rynnvla launch local | slurm | gke | tpu-vm ... -- train --config ... --workdir ...`."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command, gke, slurm, tpu_vm

_LAUNCH = """\
Starts or writes down one run of several processes. What follows `--` is the train command, the same everywhere;
in it the processes find each other by RYNNVLA_COORDINATOR, RYNNVLA_NUM_PROCESSES and RYNNVLA_PROCESS_ID, or by what
Slurm, Open MPI, Cloud TPU and GKE set. Only `local` starts anything; the others write a file to read and submit.
"""
_LOCAL = """\
Starts N processes here and waits for them. Every line of output carries the number of its process. SIGTERM and
SIGINT are passed on. When one process fails the others get a minute to leave, then they are killed; the exit status
and the last lines say who failed and how.

example:
  rynnvla launch local --processes 2 --devices_per_process 4 -- train --config configs/robot.py:tiny --workdir runs/two
"""
_SLURM = """\
Writes an sbatch script: one process a GPU; SIGTERM reaches the processes some time before the time limit, for the
emergency save, and the job queues again by itself; so it does after preemption, a lost node, and, a limited number of
times, a failure. Log: JOB_NAME-JOB_ID.log, lines with the process number.

example:
  rynnvla launch slurm --nodes 4 --gpus_per_node 8 --time 24:00:00 --out run.sbatch \\
      -- train --config configs/robot.py:7b --workdir runs/robot
"""
_GKE = """\
Writes a JobSet (YAML) for TPU slices on GKE: one Job a slice, one Pod a TPU VM; a failure restarts all of them.
--format xpk writes the command for XPK instead. The image must hold this package, `rynnvla` on its PATH and, as
working directory, the configs. A Pod keeps nothing: work dir and data lie on a PersistentVolumeClaim of the cluster
that all Pods can write: Filestore, Lustre, or a bucket (CLAIM:DIR:gcsfuse; its volume needs hostNetworkPodKSA: "true").

example:
  rynnvla launch gke --cluster pod --tpu_type v5p-128 --num_slices 2 --image IMAGE --mount shared:/mnt/shared \\
      --out run.yaml -- train --config configs/robot.py:7b --workdir /mnt/shared/robot
"""
_TPU_VM = """\
Writes a shell script that asks for a TPU slice as a queued resource, runs the same command on all its VMs over ssh
until it ends with 0, and asks for another slice after preemption. --setup is a shell line before every start: it must
leave `rynnvla` on the PATH and the configs in the working directory.

example:
  rynnvla launch tpu-vm --name pod --zone us-west4-a --type v5litepod-256 --version v2-alpha-tpuv5-lite --spot \\
      --setup 'cd rynnvla_jax && . .venv/bin/activate' --out run.sh \\
      -- train --config configs/robot.py:7b --workdir /mnt/shared/robot
"""


def main(argv: list[str]) -> int:
    """Runs one sub-command. Returns the exit status; expected errors are one line on stderr."""
    options, train = command.split(argv)
    arguments = parser().parse_args(options)
    try:
        command.check(train)
        return arguments.run(arguments, train)
    except (ConfigError, OSError) as error:
        print(f"rynnvla launch {arguments.command}: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="rynnvla launch", description=_LAUNCH, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    usage = "rynnvla launch {} [options] -- train --config FILE[:SIZE] --workdir DIR ..."

    def add(name: str, help_: str, description: str, run) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=help_, description=description, formatter_class=raw, usage=usage.format(name), allow_abbrev=False
        )
        one.set_defaults(run=run)
        return one

    local = add("local", "processes on this machine", _LOCAL, _local)
    local.add_argument("--processes", type=int, required=True, metavar="N")
    local.add_argument(
        "--devices_per_process",
        type=int,
        metavar="D",
        help="on the CPU: D virtual devices each; on NVIDIA GPUs: D of the visible ones each (without: all see all)",
    )

    job = add("slurm", "an sbatch script", _SLURM, _slurm)
    job.add_argument("--nodes", type=int, required=True)
    job.add_argument("--gpus_per_node", type=int, required=True)
    job.add_argument("--job_name", default="rynnvla")
    job.add_argument("--partition")
    job.add_argument("--time", help="time limit, as 24:00:00 or 2-00:00:00")
    job.add_argument("--cpus_per_task", type=int, help="CPU cores a process")
    job.add_argument("--container", help="image or .sqsh file; needs pyxis on the cluster")
    job.add_argument("--container_mounts", help="for pyxis: /data:/data,...")
    job.add_argument("--setup", help="shell line before srun, for example 'module load cuda'")
    job.add_argument(
        "--grace_seconds", type=int, default=120, help="SIGTERM so long before the time limit (%(default)s)"
    )
    job.add_argument("--max_restarts", type=int, default=10, help="after failures (%(default)s)")
    _out(job)

    job = add("gke", "a JobSet for TPU slices on Kubernetes, or the XPK command", _GKE, _gke)
    job.add_argument("--cluster", required=True, help="name of the GKE cluster")
    job.add_argument("--tpu_type", required=True, help="for example v5litepod-256, v5p-128, v6e-64")
    job.add_argument("--image", required=True, help="container image")
    job.add_argument("--num_slices", type=int, default=1)
    job.add_argument("--name", default="rynnvla", help="of the JobSet (%(default)s)")
    job.add_argument("--queue", help="Kueue's LocalQueue, where the cluster uses Kueue")
    job.add_argument("--max_restarts", type=int, default=50, help="(%(default)s)")
    job.add_argument("--grace_seconds", type=int, default=120, help="from SIGTERM to SIGKILL (%(default)s)")
    job.add_argument(
        "--mount",
        dest="mounts",
        action="append",
        default=[],
        metavar="CLAIM:DIR[:gcsfuse]",
        help="a PersistentVolumeClaim and where it is to lie; may be repeated",
    )
    job.add_argument("--format", choices=("jobset", "xpk"), default="jobset")
    _out(job)

    job = add("tpu-vm", "a script around gcloud for TPU VMs", _TPU_VM, _tpu_vm)
    job.add_argument("--name", required=True, help="of the queued resource and the TPU")
    job.add_argument("--zone", required=True)
    job.add_argument("--type", required=True, help="accelerator type, for example v5litepod-256")
    job.add_argument("--version", required=True, help="runtime version, for example v2-alpha-tpuv5-lite")
    job.add_argument("--project")
    job.add_argument("--spot", action="store_true", help="cheaper, can be preempted")
    job.add_argument("--setup", help="shell line on every VM before every start")
    job.add_argument("--max_restarts", type=int, default=50, help="after failures on a TPU that is well (%(default)s)")
    _out(job)
    return parser


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here instead of stdout")


def job_of(cls: type, arguments: argparse.Namespace):
    """The frozen description of a job from the parsed options of the same names."""
    return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})


def _local(arguments: argparse.Namespace, train: list[str]) -> int:
    from rynnvla_jax.launch import local

    if arguments.processes < 1 or (arguments.devices_per_process or 1) < 1:
        raise ConfigError("--processes and --devices_per_process must be at least 1")
    program = [sys.executable, "-m", "rynnvla_jax.cli", *train]
    return local.run(program, arguments.processes, arguments.devices_per_process)


def _slurm(arguments: argparse.Namespace, train: list[str]) -> int:
    return _write(
        slurm.render(job_of(slurm.SlurmJob, arguments), train), arguments.out, "sbatch {}", slurm.warning(train)
    )


def _gke(arguments: argparse.Namespace, train: list[str]) -> int:
    job = job_of(gke.GkeJob, arguments)
    if arguments.format == "jobset":
        return _write(gke.render(job, train), arguments.out, "kubectl apply -f {}", gke.warning(job, train))
    if job.mounts:
        raise ConfigError("--mount is for a JobSet; XPK mounts what `xpk storage attach` has attached to the cluster")
    return _write(
        f"# {gke.XPK_STORAGE}\n{gke.xpk(job, train)}\n", arguments.out, "bash {}", command.local_workdir(train)
    )


def _tpu_vm(arguments: argparse.Namespace, train: list[str]) -> int:
    text = tpu_vm.render(job_of(tpu_vm.TpuVmJob, arguments), train)
    return _write(text, arguments.out, "bash {}", command.local_workdir(train))


def _write(text: str, out: Path | None, submit: str, warning: str | None) -> int:
    if warning:
        print(warning, file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    how = submit.format(shlex.quote(str(out)) if out else "FILE")
    print(f"nothing was submitted; read it, then: {how}", file=sys.stderr)
    return 0
