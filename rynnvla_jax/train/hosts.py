"""How the processes of a run compare: minimum, median and maximum of their times and memory, and the slowest host.

All processes wait for each other in every step, so their steps take equally long; a slow host is one that is busy for
longer in each step and waits less for the devices. The rows travel behind the steps that are queued on the devices, as
the flags of `preemption.Notice` do, and are read when these have finished: no step waits for them.
"""

import os
import resource
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost

NAMES = ("step_seconds", "busy_seconds", "data_wait_seconds", "memory_gib", "peak_memory_gib")
GIB = 2**30


def host_memory() -> float:
    """Resident memory of this process in GiB; where the system does not tell it, the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / GIB
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # bytes on macOS


def summary(rows: np.ndarray) -> dict[str, float]:
    """float [processes, len(NAMES)] -> values by name; what no process knows (NaN) is left out.

    `slowest` is the process that is busy for the longest time of a step.
    """
    values: dict[str, float] = {}
    for name, column in zip(NAMES, rows.T, strict=True):
        known = column[np.isfinite(column)]
        if known.size:
            spread = {"min": known.min(), "median": np.median(known), "max": known.max()}
            values |= {f"hosts/{name}/{key}": float(x) for key, x in spread.items()}
    return values | {"hosts/slowest": float(rows[:, NAMES.index("busy_seconds")].argmax())}


class Hosts:
    """Gathers a row of each process; all processes call it alike. With one process it does nothing."""

    def __init__(self, mesh: jax.sharding.Mesh, behind: int):
        """`behind`: steps that are queued on the devices when a row is sent. A collective call."""
        self._mesh, self._behind = mesh, behind
        self._sent: deque[tuple[int, jax.Array]] = deque()
        self._names = multihost.gather_text(socket.gethostname())
        whole = mesh_lib.replicated(mesh)
        self._gather = jax.jit(lambda x: x, out_shardings=whole)

    def send(self, done: int, row: Mapping[str, float]) -> None:
        """The row of this process after `done` steps."""
        if len(self._names) == 1:
            return
        own = np.array([[row.get(name, np.nan) for name in NAMES]], np.float32)
        sharding = mesh_lib.one_per_device(self._mesh)
        rows = jax.make_array_from_callback((self._mesh.size, len(NAMES)), sharding, lambda _: own)
        self._sent.append((done, self._gather(rows)))

    def read(self, done: int, last: bool) -> dict[str, float]:
        """The summary of the newest rows that have been gathered after `done` steps; `last`: of those just sent."""
        newest = None
        while self._sent and (last or self._sent[0][0] + self._behind < done):
            newest = self._sent.popleft()[1]
        if newest is None:
            return {}
        processes = [device.process_index for device in self._mesh.devices.flat]
        _, first = np.unique(processes, return_index=True)
        return summary(np.asarray(newest)[first])

    def name(self, process: int) -> str:
        """A process and its host, for people."""
        return f"process {process} on {self._names[process]}"
