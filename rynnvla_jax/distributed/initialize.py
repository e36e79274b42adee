"""Connects the processes of one run: `initialize()`, before any use of a JAX backend."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NotRequired, TypedDict

import jax
from jax._src.distributed import global_state  # says who we are without starting a backend

from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "RYNNVLA_COORDINATOR", "RYNNVLA_NUM_PROCESSES", "RYNNVLA_PROCESS_ID"

START_SECONDS = 300  # hosts of a pod may come up minutes apart
HEARTBEAT_SECONDS = 30  # a peer that is silent for so long is dead, and JAX ends the others
SHUTDOWN_SECONDS = 30  # a process that leaves early waits so long for the others, then ends them

_JAX_NAMES = {  # cluster -> JAX's `cluster_detection_method`
    "Open MPI": "ompi",
    "Slurm": "slurm",
    "GKE TPU": "gketpu",
    "Cloud TPU": "gcetpu",
    "Kubernetes": None,  # has no name in JAX; nothing that comes before it is present when we get here
}
_BY_HAND = f"or set {COORDINATOR}=host:port, {NUM_PROCESSES} and {PROCESS_ID} for every process"


class Arguments(TypedDict):
    """Arguments of `jax.distributed.initialize`."""

    cluster_detection_method: str | None
    coordinator_address: NotRequired[str]
    num_processes: NotRequired[int]
    process_id: NotRequired[int]


def initialize() -> None:
    """Joins the run of this process, and prints on stderr what was detected; does nothing for a single process.

    The variables RYNNVLA_COORDINATOR, RYNNVLA_NUM_PROCESSES and RYNNVLA_PROCESS_ID come first, then what JAX itself
    detects: Open MPI, Slurm, Cloud TPU, Kubernetes. RYNNVLA_NUM_PROCESSES=1 alone switches detection off.

    Raises:
      ConfigError: contradictory or incomplete variables, a cluster that JAX cannot use, an unreachable coordinator.
    """
    if jax.distributed.is_initialized():
        return
    if NUM_PROCESSES in os.environ or COORDINATOR in os.environ or PROCESS_ID in os.environ:
        found, arguments = "environment", _from_environment(os.environ)
        if arguments is None:
            return
    else:
        cluster = detect(os.environ, jax.config.values["jax_platforms"])
        if cluster is None:
            return
        found, arguments = cluster, {"cluster_detection_method": _JAX_NAMES[cluster]}
    try:
        with _deadline():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=2 * START_SECONDS,  # not reached: JAX ends with a core dump instead of a word
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        if found == "Cloud TPU" and isinstance(error, ValueError):
            return  # TPU chips, but Google's metadata server knows of no slice: a lone machine
        raise ConfigError(_failure(found, error)) from error
    print(
        f"process {global_state.process_id} of {global_state.num_processes}, coordinator "
        f"{global_state.coordinator_address}, found by {found}",
        file=sys.stderr,
        flush=True,
    )


def detect(environ: Mapping[str, str], platforms: str | None) -> str | None:
    """The cluster of `_JAX_NAMES` that started this process, None for a single process.

    JAX's own detection also reports one process inside a larger allocation, and silently nothing when something is
    missing; both would be wrong here, because several single processes would write the same work dir.

    Args:
      platforms: `jax.config.jax_platforms`; importing jax puts "tpu" there on a machine with TPU chips and libtpu.
    Raises:
      ConfigError: an invalid number; a launcher that JAX does not support.
    """
    if (_integer(environ, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise ConfigError(f"JAX does not detect Open MPI 5 and newer: start with srun, {_BY_HAND}")
        return "Open MPI"
    if "SLURM_JOB_ID" in environ and (_integer(environ, "SLURM_NTASKS") or 1) > 1:
        if {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environ.keys():
            return "Slurm"
        print(
            f"a single process, although SLURM_NTASKS is {environ['SLURM_NTASKS']}: to use all, start with srun",
            file=sys.stderr,
        )
        return None
    if not platforms or "tpu" in platforms:
        workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))  # as GKE sets them
        if workers is not None:
            several = "," in workers or (_integer(environ, "MEGASCALE_NUM_SLICES") or 1) > 1
            return "GKE TPU" if several else None
        if platforms and "TPU_SKIP_MDS_QUERY" not in environ:
            return "Cloud TPU"  # only the metadata server knows the other workers
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return None


def _from_environment(environ: Mapping[str, str]) -> Arguments | None:
    """Arguments of `jax.distributed.initialize` from our three variables; None for a single process."""
    count, index, address = _integer(environ, NUM_PROCESSES), _integer(environ, PROCESS_ID), environ.get(COORDINATOR)
    if count == 1 and not index:
        return None
    if not address or count is None or index is None:
        missing = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if not environ.get(name)]
        raise ConfigError(
            f"{' and '.join(missing)} missing: set all of {COORDINATOR}=host:port, {NUM_PROCESSES} and {PROCESS_ID}, "
            f"or only {NUM_PROCESSES}=1"
        )
    if count < 1:
        raise ConfigError(f"{NUM_PROCESSES} is {count}; it must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"{PROCESS_ID} is {index}; with {NUM_PROCESSES}={count} it must be 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{COORDINATOR} is {address!r}; it must be host:port of process 0, for example 10.0.0.1:8476")
    if index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # JAX would crash without a word
            raise ConfigError(
                f"{COORDINATOR}: port {port} is not free here ({error.strerror}); choose another"
            ) from error
    elif not _resolves(host):  # JAX would try for START_SECONDS
        raise ConfigError(
            f"{COORDINATOR}: the host {host!r} is not known here; give a name or an address of process 0's host that "
            "all hosts can resolve"
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",  # else a Slurm shell around us would hide all GPUs but one
    }


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    if not environ.get(name):
        return None
    try:
        return int(environ[name])
    except ValueError as error:
        raise ConfigError(f"{name} is {environ[name]!r}; it must be a number") from error


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Ends this process with one line if not all other processes have joined after START_SECONDS.

    A coordinator that is not known here is named at once: its name may still appear, as those of pods do.
    """
    joined = threading.Event()

    def watch():
        if (host := _coordinator(joined)) and not _resolves(host):
            print(
                f"the coordinator's host {host!r} is not known here yet; waiting up to {START_SECONDS} s for it",
                file=sys.stderr,
                flush=True,
            )
        if joined.wait(START_SECONDS):
            return
        address, me = global_state.coordinator_address, global_state.process_id
        where = "" if address is None else f" at the coordinator {address} (this is process {me})"
        print(
            f"ConfigError: not all processes of this run connected{where} within {START_SECONDS} s. Check that "
            "every process was started, and that the host and port of process 0 can be reached from all of them",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread hangs inside JAX

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _coordinator(joined: threading.Event) -> str | None:
    """The coordinator's host as soon as JAX has found it; None for the coordinator itself."""
    while (address := global_state.coordinator_address) is None:
        if joined.wait(0.1):
            return None
    return address.rpartition(":")[0] if global_state.process_id else None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except OSError:
        return False
    return True


def _failure(found: str, error: Exception) -> str:
    remedy = {
        "Kubernetes": "pip install 'jax[k8s]' and let the service account read pods and jobs",
        "GKE TPU": "pip install 'rynnvla_jax[tpu]' and request google.com/tpu chips",
        "Cloud TPU": "let this machine reach Google's metadata server, or set TPU_SKIP_MDS_QUERY=1 for a single host",
    }.get(found, "check its variables")
    return f"JAX could not join the processes by {found} ({shorten(error, 200)}): {remedy}, {_BY_HAND}"
