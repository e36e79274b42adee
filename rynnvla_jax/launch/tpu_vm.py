"""`rynnvla launch tpu-vm`: a shell script around gcloud that keeps one TPU slice training until the run is finished.

Source: cloud.google.com/tpu/docs/queued-resources and .../run-code-on-tpu-vm-slices.
"""

import shlex
from dataclasses import dataclass

from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command


@dataclass(frozen=True)
class TpuVmJob:
    """A job for Google Cloud."""

    name: str
    """Name of the queued resource and of the TPU."""
    zone: str
    """Zone of Google Cloud, for example us-west4-a."""
    type: str
    """Accelerator type, for example v5litepod-256."""
    version: str
    """Runtime version, for example v2-alpha-tpuv5-lite."""
    project: str | None = None
    """Project of Google Cloud; by default gcloud's."""
    service_account: str | None = None
    """Service account of the VMs, which may use the run's buckets; by default Compute Engine's own."""
    spot: bool = False
    """Request a spot TPU, which is cheaper and can be preempted."""
    setup: str | None = None
    """Shell line that runs on every VM before every start."""
    max_restarts: int = 50
    """Maximum number of restarts after failures on the same TPU; preemption does not count."""

    def __post_init__(self):
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts is {self.max_restarts}; it must not be negative")


def render(job: TpuVmJob, arguments: list[str]) -> str:
    """The script for `rynnvla` with `arguments` on every VM of the slice."""
    where = [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]
    create = [
        f"--node-id={job.name}",
        f"--accelerator-type={job.type}",
        f"--runtime-version={job.version}",
        *([f"--service-account={job.service_account}"] if job.service_account else []),
        *(["--spot"] if job.spot else []),
    ]
    needs = command.needs_of_buckets(arguments, "What --setup installs", "the service account of the VMs")
    remote = "export PYTHONUNBUFFERED=1; " + (f"{job.setup} && " if job.setup else "") + command.shell(arguments)
    return _SCRIPT.format(
        name=shlex.quote(job.name),
        where=shlex.join(where),
        create=shlex.join(create),
        remote=shlex.quote(remote),
        max_restarts=job.max_restarts,
        needs="".join(f"# {line}\n" for line in needs),
    )


_SCRIPT = """\
#!/bin/bash
# Rendered by `rynnvla launch tpu-vm`: read it, then run it with bash on a machine that stays up (tmux, a small VM).
# It requests the TPU, runs the command on all its VMs until it exits with 0, and requests another after preemption.
# The TPU stays allocated, and is billed, until: gcloud compute tpus queued-resources delete {name} {where} --force
{needs}set -u
name={name}
where=({where})
remote={remote}

state() {{
    gcloud compute tpus queued-resources describe "$name" "${{where[@]}}" --format='value(state.state)' 2>/dev/null
}}

asked= failures=0
while :; do
    state=$(state)
    case "$state" in
    "")  # it is not there; or only the question failed, then this fails too and the next round asks again
        gcloud compute tpus queued-resources create "$name" "${{where[@]}}" {create} || [ -n "$asked" ] || exit 1
        ;;
    ACTIVE)
        # On a slice JAX finds the other VMs by the metadata server.
        if gcloud compute tpus tpu-vm ssh "$name" "${{where[@]}}" --worker=all --command="$remote"; then
            exit 0
        fi
        state=$(state)
        if [ "$state" = ACTIVE ]; then
            failures=$((failures + 1))
            if [ "$failures" -gt {max_restarts} ]; then
                echo "failed $failures times on a healthy TPU; giving up" >&2
                exit 1
            fi
        fi
        echo "failed, TPU $state: restarting from the newest checkpoint" >&2
        ;;
    SUSPENDING | SUSPENDED | FAILED)
        echo "TPU $state: deleting it to request another" >&2
        gcloud compute tpus queued-resources delete "$name" "${{where[@]}}" --force --quiet
        ;;
    esac
    asked=1
    sleep 30
done
"""
