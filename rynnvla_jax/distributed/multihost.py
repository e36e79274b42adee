"""Coordinates several processes on one shared work dir: who writes, who waits, which rows of a batch are local.

For a single process all functions are no-ops or trivial.
"""

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

T = TypeVar("T")

PATIENCE = 24 * 3600  # seconds that processes wait for one that prepares something, for example codes made ahead
GOODBYE = 10  # seconds that a process which stops gives the others to stop too
_MESSAGE = 1024  # bytes of a text that is sent to the others

_waiting = False  # in a barrier
_count = itertools.count()  # of barriers: each has a name of its own, and all processes count alike


class PeerError(RuntimeError):
    """Another process of the run failed; the message is that of its error."""


def primary() -> bool:
    """Whether this process is the one that writes shared files: process 0."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints one message on stderr, on process 0 only."""
    if primary():
        with contextlib.suppress(OSError):  # stderr may be a file on a disk that is full
            print(text, file=sys.stderr, flush=True)


def waiting() -> bool:
    """Whether this process waits for others that prepare something."""
    return _waiting


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every process, waits for all, and returns its result; a collective call.

    Raises:
      PeerError: it failed on another process. An error of this process is raised as it is.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        # The others may wait for hours here: a barrier of the coordinator allows it, a collective of the devices not.
        _wait()
        messages = gather_text(f"{type(error).__name__}: {error}" if error else "")
        failed = [f"process {i} stopped: {m}" for i, m in enumerate(messages) if m]
        if failed and error is None:
            raise PeerError("; ".join(failed))
    if error is not None:
        raise error
    return result


def gather_text(text: str) -> list[str]:
    """The texts of all processes, in their order, each cut at _MESSAGE bytes; a collective call."""
    if jax.process_count() == 1:
        return [text]
    # Always _MESSAGE bytes: what processes gather must have one shape on all of them.
    own = np.frombuffer(text.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0"), np.uint8)
    gathered = multihost_utils.process_allgather(own)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in np.asarray(gathered)]


def _wait() -> None:
    global _waiting
    _waiting = True
    try:
        multihost.get_barrier_sync_fn()(key=f"rynnvla_{next(_count)}", timeout_ms=PATIENCE * 1000)
    finally:
        _waiting = False


def first(work: Callable[[], Any]) -> None:
    """Runs `work` on process 0 only, while the others wait. Raises as `together` does."""
    together(work if primary() else lambda: None)


def told(work: Callable[[], str]) -> str:
    """The text that `work` returns on process 0, on every process; a collective call. Raises as `together` does."""
    found: list[str] = []
    first(lambda: found.append(work()))
    if jax.process_count() == 1:
        return found[0]
    text = np.frombuffer(found[0].encode() if found else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = text if found else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8).tobytes().decode()


def batch_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Rows of the global batch that the devices of this process hold, ascending.

    Processes that differ only along `tensor` or `sequence` hold the same rows.
    """
    every = np.arange(batch_size)
    return np.unique(
        np.concatenate([every[i] for i in sharding.addressable_devices_indices_map((batch_size,)).values()])
    )


def global_batch(
    batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding, rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
    """Arrays [batch_size, ...] from the rows of this process: row r is the same example for any number of processes."""

    def one(local: np.ndarray) -> jax.Array:
        def cut(index):
            start, stop, _ = index[0].indices(batch_size)
            here = int(np.searchsorted(rows, start))  # a shard's rows are neighbours in `rows` too
            return local[here : here + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, cut)

    return {k: one(v) for k, v in batch.items()}


def replicate(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Host or local arrays, the same on every process, as arrays replicated on every device."""

    def one(x):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def leave(message: str) -> NoReturn:
    """Ends this process with one line and status 1, even when the others hang in a collective.

    The others end as well: a process that disappears ends them (`distributed.initialize`).
    """
    if not jax.distributed.is_initialized():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    timer = threading.Timer(GOODBYE, os._exit, (1,))
    timer.daemon = True
    timer.start()
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()  # returns at once when the others stop as well
    os._exit(1)  # threads of Orbax and Grain may wait for a dead process: do not join them


def leave_at_once(message: str) -> NoReturn:
    """As `leave`, when a peer has died or this process cannot continue."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
