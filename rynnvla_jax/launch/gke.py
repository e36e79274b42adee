"""`rynnvla launch gke`: a JobSet for TPU slices on Google Kubernetes Engine, and the same with XPK.

Source: jobset.sigs.k8s.io (TPU multislice), cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, for the
table of types XPK's `system_characteristics.py` and for its storage `docs/usage/storage.md` (AI-Hypercomputer/xpk), for
mounted buckets GoogleCloudPlatform/gcs-fuse-csi-driver, for the Pods' account cloud.google.com/kubernetes-engine/docs/
concepts/workload-identity ("restrictions").
"""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from rynnvla_jax.config import ConfigError
from rynnvla_jax.launch import command

# family -> (value of the node label gke-tpu-accelerator, cores a chip: the number in the type counts cores, topologies)
_FAMILIES = {
    "v5litepod": ("tpu-v5-lite-podslice", 1, ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": (
        "tpu-v5p-slice",
        2,
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12")
        + ("8x8x16", "8x12x16", "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
    ),
    "v6e": ("tpu-v6e-slice", 1, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}
XPK_STORAGE = "It mounts what `xpk storage attach --auto-mount=true` has attached to the cluster before:"
_MOUNT = re.compile(r"([a-z0-9][-.a-z0-9]*):(/[^:]+)(:gcsfuse)?")
_PATH = re.compile(r"(?:--[\w.]+=)?(?:\w+:)?(/(?!/).*)")  # a word that is one absolute path, or KIND:PATH
SHARED_MEMORY = "/dev/shm"  # through which data.num_workers pass their batches
# Pods on their node's network do not use Workload Identity.
ACCOUNT = "the service account of the node pool (with the scope cloud-platform)"
CHIPS_PER_VM = 4  # of the machine types of multi-host slices: ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t


@dataclass(frozen=True)
class Slice:
    """One TPU slice as GKE names it."""

    accelerator: str  # node label cloud.google.com/gke-tpu-accelerator
    topology: str  # node label cloud.google.com/gke-tpu-topology
    vms: int


def _slices() -> dict[str, Slice]:
    table = {}
    for family, (accelerator, cores, topologies) in _FAMILIES.items():
        for topology in topologies:
            chips = math.prod(map(int, topology.split("x")))
            table[f"{family}-{chips * cores}"] = Slice(accelerator, topology, chips // CHIPS_PER_VM)
    return table


TPU_TYPES = _slices()


@dataclass(frozen=True)
class GkeJob:
    """A job for the cluster."""

    cluster: str
    """Name of the GKE cluster."""
    tpu_type: str
    """Type of the slices, for example v5litepod-256, v5p-128 or v6e-64."""
    image: str
    """Container image with this package and the configs."""
    num_slices: int = 1
    """Number of slices."""
    name: str = "rynnvla"
    """Name of the JobSet."""
    queue: str | None = None
    """Kueue's LocalQueue, if the cluster uses Kueue."""
    max_restarts: int = 50
    """Maximum number of restarts after failures."""
    grace_seconds: int = 120
    """Seconds from SIGTERM to SIGKILL, for the emergency save."""
    mount: tuple[str, ...] = ()
    """A PersistentVolumeClaim and its mount point in all Pods, as CLAIM:DIR; for a bucket that is mounted
    CLAIM:DIR:gcsfuse."""

    def __post_init__(self):
        if self.tpu_type not in TPU_TYPES:
            raise ConfigError(f"--tpu-type {self.tpu_type!r} is not known; choose one of {', '.join(TPU_TYPES)}")
        if self.num_slices < 1:
            raise ConfigError(f"--num-slices is {self.num_slices}; it must be at least 1")
        if self.num_slices > 1 and TPU_TYPES[self.tpu_type].vms == 1:
            raise ConfigError(
                f"--num-slices {self.num_slices}: GKE can only connect slices of several hosts; use a larger type"
            )
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ConfigError(f"--name {self.name!r} must be up to 40 of a-z, 0-9 and -, as Kubernetes requires")
        for mount in self.mount:
            if not _MOUNT.fullmatch(mount):
                raise ConfigError(
                    f"--mount {mount!r} is not like claim:/mnt/shared: the name of a PersistentVolumeClaim (a-z, 0-9 "
                    "and -), an absolute directory, followed by :gcsfuse for a bucket"
                )


def render(job: GkeJob, arguments: list[str]) -> str:
    """The YAML for `kubectl apply -f`."""
    header = [
        "Rendered by `rynnvla launch gke`: read it, then kubectl apply -f FILE.",
        "JAX finds the processes by the variables that GKE sets: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and MEGASCALE_*.",
        "GKE gives a spot VM about 30 s, whatever terminationGracePeriodSeconds says.",
        *command.needs_of_buckets(arguments, "The image", ACCOUNT),
        f"The same with XPK. {XPK_STORAGE}",
        *xpk(job, arguments).splitlines(),
    ]
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(
        manifest(job, arguments), sort_keys=False, width=10**6
    )


def manifest(job: GkeJob, arguments: list[str]) -> dict:
    """The JobSet: one Job per slice, one Pod per TPU VM; any failure restarts all slices."""
    slice_ = TPU_TYPES[job.tpu_type]
    metadata = {
        "name": job.name,
        # All Pods of one Job in one node pool, which is one slice.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    container = {
        "name": "train",
        "image": job.image,
        # Without a shell, so that SIGTERM reaches it; Kubernetes itself would expand $(NAME).
        "command": ["rynnvla", *(argument.replace("$(", "$$(") for argument in arguments)],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # TPU runtime, traffic between slices
        "securityContext": {"privileged": True},  # TPU devices and locked memory
        "resources": {"limits": {"google.com/tpu": CHIPS_PER_VM}},
    }
    mounts = [found.groups() for found in map(_MOUNT.fullmatch, job.mount) if found]  # all: __post_init__ checks them
    claims = {claim: f"claim-{i}" for i, claim in enumerate(dict.fromkeys(claim for claim, _, _ in mounts))}
    container["volumeMounts"] = [
        {"name": "shared-memory", "mountPath": SHARED_MEMORY},
        *({"name": claims[claim], "mountPath": directory} for claim, directory, _ in mounts),
    ]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": slice_.accelerator,
            "cloud.google.com/gke-tpu-topology": slice_.topology,
        },
        "containers": [container],
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # a container's own has 64 MiB
            *({"name": n, "persistentVolumeClaim": {"claimName": c}} for c, n in claims.items()),
        ],
    }
    template: dict[str, Any] = {"spec": pod}
    if any(bucket for _, _, bucket in mounts):
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}  # brings the sidecar that mounts it
    one_slice = {
        "parallelism": slice_.vms,
        "completions": slice_.vms,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts},
            "replicatedJobs": [{"name": "slice", "replicas": job.num_slices, "template": {"spec": one_slice}}],
        },
    }


def warning(job: GkeJob, arguments: list[str]) -> str | None:
    """A warning about paths outside of mounts and buckets: a Pod loses all files that it writes elsewhere."""
    flag, directory = command.written(arguments)
    named = [directory, *(found[1] for word in arguments if (found := _PATH.fullmatch(word)))]
    mounted = [mount.split(":")[1] for mount in job.mount]
    kept = lambda path: "://" in path or any(map(PurePosixPath(path).is_relative_to, mounted))  # noqa: E731
    lost = [path for path in dict.fromkeys(named) if not kept(path)]
    if not lost:
        return None
    return (
        f"warning: not under any --mount: {', '.join(lost)}; a Pod has only its image and the mounts, and all need "
        f"the same {flag}: use a bucket (gs://...), or --mount CLAIM:DIR"
    )


def xpk(job: GkeJob, arguments: list[str]) -> str:
    """The command for XPK, which renders and submits a JobSet of its own."""
    options = {
        "workload": job.name,
        "cluster": job.cluster,
        "tpu-type": job.tpu_type,
        "num-slices": job.num_slices,
        "docker-image": job.image,
        "max-restarts": job.max_restarts,
        "termination-grace-period-seconds": job.grace_seconds,
        "command": command.shell(arguments),
    }
    return shlex.join(["xpk", "workload", "create", *(f"--{key}={value}" for key, value in options.items())])
