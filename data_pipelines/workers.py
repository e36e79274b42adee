"""Worker processes of the loader: they end with this process, and their batches must fit into shared memory."""

import contextlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grain

from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.stage import BatchSpec

SHARED_MEMORY = Path("/dev/shm")
BUFFER = 2  # batches that a worker makes ahead
_EACH, _MORE = 2 * BUFFER + 2, 2  # batches that exist at a time: of a worker, and in the hands of the loop; measured
_REMEDY = (
    f"mount a larger {SHARED_MEMORY} (docker run --shm-size; in Kubernetes an emptyDir with medium: Memory), or lower "
    "data.num_workers; 0 uses threads"
)


def prefetched(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """The elements of `dataset`, made by `count` worker processes."""
    _mark_flags_parsed()
    options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=BUFFER)
    return dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)


def check_shared_memory(spec: BatchSpec, rows: int, count: int) -> None:
    """Raises ConfigError when the batches of `count` workers, `rows` rows of `spec` each, do not fit into /dev/shm."""
    if not count or not SHARED_MEMORY.is_dir():
        return
    batch = sum(rows * math.prod(shape[1:]) * dtype().itemsize for shape, dtype in spec.values())
    needed, free = (count * _EACH + _MORE) * batch, shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ConfigError(
            f"data.num_workers {count} with batches of {batch / 2**20:.1f} MiB needs {math.ceil(needed / 2**20)} MiB "
            f"of shared memory, but {SHARED_MEMORY} has {free // 2**20} MiB free; {_REMEDY}"
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around taking batches. Raises DataError, which says why, when a worker was killed."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if not found:
            raise
        number = signal.Signals(int(found[1]))
        reason = {
            signal.SIGBUS: f"{SHARED_MEMORY} is full: {_REMEDY}",
            signal.SIGKILL: "if the machine ran out of memory, lower data.num_workers",
        }.get(number, "see its output above; data.num_workers=0 reads in this process")
        raise DataError(f"a worker process of data.num_workers was ended by {number.name}; {reason}") from error


def _end_with_parent(index: int, count: int) -> None:
    """Runs in a worker. PR_SET_PDEATHSIG would not do: it follows the thread that started us, which ends early."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()  # its end closes a pipe, however it ends
        os._exit(1)  # multiprocessing's resource tracker then removes what is left in /dev/shm

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which a program without absl's `app.run` never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
