"""`rynnvla launch slurm`: an sbatch script.

Source: sbatch(1), srun(1), scancel(1), scontrol(1); containers: pyxis.
"""

import shlex
from dataclasses import dataclass

from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command

LOCAL = ("/tmp/", "/var/tmp/", "/dev/shm/")


@dataclass(frozen=True)
class SlurmJob:
    """A job for Slurm."""

    nodes: int
    """Number of nodes."""
    gpus_per_node: int
    """GPUs per node, with one process per GPU."""
    job_name: str = "rynnvla"
    """Name of the job, and of its log."""
    partition: str | None = None
    """Partition; by default the cluster's."""
    time: str | None = None
    """Time limit as Slurm writes it: 24:00:00 or 2-00:00:00."""
    cpus_per_task: int | None = None
    """CPU cores per process."""
    container: str | None = None
    """Image or .sqsh file to run in; needs pyxis on the cluster."""
    container_mounts: str | None = None
    """Mounts of the container, for pyxis: /data:/data,..."""
    setup: str | None = None
    """Shell line that runs on the first node before srun, for example 'module load cuda'."""
    grace_seconds: int = 120
    """Seconds before the time limit at which SIGTERM is sent, for the emergency save."""
    max_restarts: int = 10
    """Maximum number of restarts after failures; the time limit and preemption do not count."""

    def __post_init__(self):
        if min(self.nodes, self.gpus_per_node) < 1:
            raise ConfigError("--nodes and --gpus-per-node must be at least 1")
        if self.container_mounts and not self.container:
            raise ConfigError("--container-mounts needs --container")


def warning(arguments: list[str]) -> str | None:
    """A relative work dir is under the directory of submission, which Slurm clusters share."""
    flag, workdir = command.written(arguments)
    if workdir.startswith(LOCAL):
        return f"warning: {flag} {workdir} is local to one node; use a directory that all nodes share"
    return None


def render(job: SlurmJob, arguments: list[str]) -> str:
    """The script for `rynnvla` with `arguments`."""
    options = {
        "job-name": job.job_name,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "partition": job.partition,
        "time": job.time,
        "requeue": True,
        "open-mode": "append",
        "signal": f"B:TERM@{job.grace_seconds}",
        "output": "%x-%j.log",
    }
    # JAX ends the peers of a dead process by itself; an immediate kill could hit another one's emergency save.
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=300", "--label"]
    if job.cpus_per_task:
        srun.append(f"--cpus-per-task={job.cpus_per_task}")  # srun does not inherit it from sbatch since Slurm 22.05
    if job.container:
        srun.append(f"--container-image={job.container}")
    if job.container_mounts:
        srun.append(f"--container-mounts={job.container_mounts}")
    needs = command.needs_of_buckets(arguments, "The environment", "every node")
    lines = [f"#SBATCH --{key}" + ("" if v is True else f"={v}") for key, v in options.items() if v is not None]
    return _SCRIPT.format(
        options="\n".join(lines),
        setup=f"{job.setup}\n" if job.setup else "",
        srun=shlex.join(srun),
        command=command.shell(arguments),
        max_restarts=job.max_restarts,
        needs="".join(f"# {line}\n" for line in needs),
    )


_SCRIPT = """\
#!/bin/bash
# Rendered by `rynnvla launch slurm`: read it, then submit it with sbatch.
# One process per GPU: JAX reads SLURM_* by itself and gives each process the GPU of its local rank, which is
# why there is no --gpus-per-task (it would hide the other GPUs and shift the numbers).
{needs}{options}

export PYTHONUNBUFFERED=1
{setup}
stopping=
stop() {{  # the time limit is near: the emergency save, then the queue again
    stopping=1
    scancel --signal=TERM "$SLURM_JOB_ID"  # reaches the processes only; srun would turn a SIGTERM into SIGKILL
}}
trap stop TERM

{srun} \\
    {command} &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do  # the signal ended `wait`, not the step
    wait "$step"
    status=$?
done

# A job that somebody cancelled is COMPLETING by now and stays so.
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    if [ -n "$stopping" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
        echo "exit status $status: restarting from the newest checkpoint" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
"""
