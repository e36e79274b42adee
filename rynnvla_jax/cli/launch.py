"""`rynnvla launch local | slurm | gke | tpu-vm ... -- train --config ... --workdir ...`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rynnvla_jax import children
from rynnvla_jax.cli.arguments import T, parse
from rynnvla_jax.cli.main import Command, dispatch
from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command, gke, slurm, tpu_vm

_ABOUT = """\
Starts one run of several processes, or writes a job file for it. The train command comes after `--` and is the same
for every launcher. The processes find each other by RYNNVLA_COORDINATOR, RYNNVLA_NUM_PROCESSES and
RYNNVLA_PROCESS_ID, or by the variables of Slurm, Open MPI, Cloud TPU and GKE. Only `local` starts processes; the
others write a file for you to read and submit.
"""
COMMANDS = {
    "local": Command("processes on this machine", __name__, function="local"),
    "slurm": Command("an sbatch script", __name__, function="to_slurm"),
    "gke": Command("a JobSet for TPU slices on Kubernetes, or the XPK command", __name__, function="to_gke"),
    "tpu-vm": Command("a script around gcloud for TPU VMs", __name__, function="to_tpu_vm"),
}
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Local:
    """Starts N processes on this machine and waits for them.

    Every line of output begins with the number of its process. SIGTERM and SIGINT are passed on. When one process
    fails, the others get a minute to exit and are then killed; the exit status and the last lines say which process
    failed and how.

      rynnvla launch local --processes 2 --devices-per-process 4 \\
          -- train --config configs/robot.py:tiny --workdir runs/two
    """

    processes: Annotated[int, tyro.conf.arg(metavar="N")]
    """Processes to start."""
    devices_per_process: Annotated[int | None, tyro.conf.arg(metavar="D")] = None
    """Devices per process: virtual ones on the CPU, or visible NVIDIA GPUs. By default every process sees all."""


@dataclass(frozen=True)
class Slurm(slurm.SlurmJob):
    """Writes an sbatch script: one process per GPU.

    The processes get SIGTERM some time before the time limit, save a checkpoint, and the job requeues itself; so it
    does after preemption, a lost node, and, a limited number of times, a failure. The log is JOB_NAME-JOB_ID.log; its
    lines begin with the process number.

      rynnvla launch slurm --nodes 4 --gpus-per-node 8 --time 24:00:00 --out run.sbatch \\
          -- train --config configs/robot.py:7b --workdir runs/robot
    """

    out: File = None
    """Where to write the script; by default stdout."""


@dataclass(frozen=True)
class Gke(gke.GkeJob):
    """Writes a JobSet (YAML) for TPU slices on GKE: one Job per slice, one Pod per TPU VM; a failure restarts them all.

    The image must contain this package with the extras tpu and gcs, with `rynnvla` on its PATH, and the config file. A
    Pod keeps no files: give work dir, data and models as gs://... (docs/pods.md says what the service account of the
    node pool needs). Or put them on a PersistentVolumeClaim of the cluster that all Pods can write, with --mount:
    Filestore, Lustre, or a bucket (CLAIM:DIR:gcsfuse; its volume needs hostNetworkPodKSA: "true").

      rynnvla launch gke --cluster pod --tpu-type v5p-128 --num-slices 2 --image IMAGE --out run.yaml \\
          -- train --config configs/robot.py:7b --workdir gs://BUCKET/robot
    """

    format: Literal["jobset", "xpk"] = "jobset"
    """A JobSet, or the equivalent XPK command."""
    out: File = None
    """Where to write it; by default stdout."""


@dataclass(frozen=True)
class TpuVm(tpu_vm.TpuVmJob):
    """Writes a shell script that runs the command on all VMs of a TPU slice over ssh.

    The script requests the slice as a queued resource, repeats the command until it exits with 0, and requests another
    slice after preemption. --setup must put `rynnvla` (with the extras tpu and gcs) on the PATH.

      rynnvla launch tpu-vm --name pod --zone us-west4-a --type v5litepod-256 --version v2-alpha-tpuv5-lite --spot \\
          --service-account ACCOUNT --setup 'cd rynnvla_jax && . .venv/bin/activate' --out run.sh \\
          -- train --config configs/robot.py:7b --workdir gs://BUCKET/robot
    """

    out: File = None
    """Where to write the script; by default stdout."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    return dispatch("rynnvla launch", COMMANDS, argv, _ABOUT)


def parsed(cls: type[T], name: str, argv: Sequence[str]) -> tuple[T, list[str]]:
    """The arguments of a launcher, and the checked command after `--`."""
    options, train = command.split(list(argv))
    arguments = parse(cls, f"rynnvla launch {name}", options)
    command.check(train)
    return arguments, train


def local(argv: Sequence[str]) -> int:
    """`rynnvla launch local`. Returns the exit status of the run."""
    arguments, train = parsed(Local, "local", argv)
    from rynnvla_jax.launch import local

    if arguments.processes < 1 or (arguments.devices_per_process or 1) < 1:
        raise ConfigError("--processes and --devices-per-process must be at least 1")
    program = [*children.module("rynnvla_jax.cli"), *train]
    return local.run(program, arguments.processes, arguments.devices_per_process)


def to_slurm(argv: Sequence[str]) -> int:
    """`rynnvla launch slurm`. Returns the exit status."""
    arguments, train = parsed(Slurm, "slurm", argv)
    text = slurm.render(job_of(slurm.SlurmJob, arguments), train)
    return _write(text, arguments.out, "sbatch {}", slurm.warning(train))


def to_gke(argv: Sequence[str]) -> int:
    """`rynnvla launch gke`. Returns the exit status."""
    arguments, train = parsed(Gke, "gke", argv)
    job = job_of(gke.GkeJob, arguments)
    if arguments.format == "jobset":
        return _write(gke.render(job, train), arguments.out, "kubectl apply -f {}", gke.warning(job, train))
    if job.mount:
        raise ConfigError("--mount is for a JobSet; XPK mounts what `xpk storage attach` has attached to the cluster")
    text = f"# {gke.XPK_STORAGE}\n{gke.xpk(job, train)}\n"
    return _write(text, arguments.out, "bash {}", command.local_workdir(train))


def to_tpu_vm(argv: Sequence[str]) -> int:
    """`rynnvla launch tpu-vm`. Returns the exit status."""
    arguments, train = parsed(TpuVm, "tpu-vm", argv)
    text = tpu_vm.render(job_of(tpu_vm.TpuVmJob, arguments), train)
    return _write(text, arguments.out, "bash {}", command.local_workdir(train))


def job_of(cls: type[T], arguments: Any) -> T:
    """The frozen description of a job from the options of the same names."""
    return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _write(text: str, out: Path | None, submit: str, warning: str | None) -> int:
    if warning:
        print(warning, file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    how = submit.format(shlex.quote(str(out)) if out else "FILE")
    print(f"nothing was submitted; read the file, then run: {how}", file=sys.stderr)
    return 0
