"""Job files for the points of a sweep: `OUT/jobs/<point>.sbatch` or `.yaml`, and `OUT/submit.sh`. Submits nothing.

sbatch and kubectl read files of this machine: those of a sweep in gs://BUCKET/NAME are in BUCKET-NAME/.
"""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rynnvla_jax.launch import gke, slurm
from rynnvla_jax.storage import files
from rynnvla_jax.sweep.plan import Definition, Point

_SUBMIT = """\
#!/bin/sh
# Written by `rynnvla sweep`: read it, then run it. Repeat the sweep command to write it for unfinished points only.
{note}set -e
"""
_OF_GKE = "# A failed JobSet does not restart: run `kubectl delete -f` with its file before you apply it again.\n"


def devices(launched: slurm.SlurmJob | gke.GkeJob) -> int:
    """The number of devices of one run."""
    if isinstance(launched, slurm.SlurmJob):
        return launched.nodes * launched.gpus_per_node
    return launched.num_slices * gke.TPU_TYPES[launched.tpu_type].vms * gke.CHIPS_PER_VM


def folder(out: Path) -> Path:
    """Where the job files of a sweep are, on this machine."""
    return Path("-".join(out.parts[2:])) if files.is_bucket(out) else out


def write(
    definition: Definition, points: Sequence[Point], out: Path, launched: slurm.SlurmJob | gke.GkeJob
) -> tuple[Path, str | None]:
    """Writes the files for `points`. Returns submit.sh, and a warning if the hosts do not share the work dir."""
    jobs, lines, warning = folder(out) / "jobs", [], None
    folder_hash = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:6]  # so that sweeps do not share JobSets
    jobs.mkdir(parents=True, exist_ok=True)
    for point in points:
        train = point.arguments(definition, out)
        if isinstance(launched, slurm.SlurmJob):
            # Slurm never runs two jobs of a name at a time (singleton), so submitting twice does no harm.
            own = f"{launched.job_name}-{re.sub(r'[^A-Za-z0-9_-]+', '-', out.resolve().name)}-{point.number:03d}"
            file, text = jobs / f"{point.name}.sbatch", slurm.render(dataclasses.replace(launched, job_name=own), train)
            lines.append(f"sbatch --dependency=singleton {shlex.quote(str(file))}\n")
            warning = slurm.warning(train)
        else:
            own = f"{launched.name[:28]}-{folder_hash}-{point.number:03d}"
            file, text = jobs / f"{point.name}.yaml", gke.render(dataclasses.replace(launched, name=own), train)
            lines.append(f"kubectl apply -f {shlex.quote(str(file))}\n")
            warning = gke.warning(launched, train)
        files.write_text(file, text)
    submit = folder(out) / "submit.sh"
    note = _OF_GKE if isinstance(launched, gke.GkeJob) else ""
    files.write_text(submit, _SUBMIT.format(note=note) + "".join(lines))
    return submit, warning
