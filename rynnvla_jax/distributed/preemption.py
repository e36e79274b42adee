"""Handles SIGTERM, the signal of preemption and TPU maintenance: all processes save the same step and exit.

A second SIGTERM ends a process immediately; so does SIGINT (Ctrl-C) at any time.
"""

import os
import signal
import threading
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rynnvla_jax.distributed import mesh as mesh_lib

# 128 + SIGTERM. Not 0: schedulers (Kubernetes, Slurm with --requeue, `launch local`) take 0 for a finished run.
EXIT_CODE = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """Exits with `EXIT_CODE`; everything has been saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Notice:
    """Tells whether to save and exit, the same on every process; a context manager.

    JAX has a service for this (`reached_preemption_sync_point`), which asks the coordinator: in our drill it answered
    after 3 to 30 seconds, and once not at all. Here the devices add up the flags of all processes after each step.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh, self._signalled = mesh, False
        self._before: Any = None  # the handler of SIGTERM
        self._sums: deque[jax.Array] = deque()
        self._sum = jax.jit(jnp.sum, out_shardings=mesh_lib.replicated(mesh))

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():  # Python lets no other one handle signals
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def came(self) -> bool:
        """Whether SIGTERM came; every process must call it after each step. With several processes, one step late."""
        if jax.process_count() == 1:
            return self._signalled
        flag = np.array([self._signalled], np.int32)
        flags = jax.make_array_from_callback((self._mesh.size,), mesh_lib.one_per_device(self._mesh), lambda _: flag)
        self._sums.append(self._sum(flags))
        # The sum of the step before: to read this one's would wait until the devices have done all that is queued.
        return len(self._sums) > 1 and bool(self._sums.popleft())

    def _handle(self, *_) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that a second one ends the process
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"SIGTERM: finishing and saving the current step; a second SIGTERM ends at once\n")
