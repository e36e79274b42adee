"""Worker processes and the folder lock of recording and evaluation."""

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import IO


class WorkError(RuntimeError):
    """The work was interrupted or cannot start; the message says what to do."""


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Workers that end with this process, and immediately when the context ends with an error.

    Raises WorkError when one of them was killed.
    """
    context = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
    held, holding = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin, initargs=(held,))
    try:
        yield pool
    except BrokenProcessPool:
        raise WorkError("a worker was killed (too little memory?); the same command continues") from None
    except BaseException:
        holding.close()  # nobody waits for what is under way
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        holding.close()


def lock(file: IO, doing: str) -> None:
    """Locks `file` until it is closed or this process ends. Raises WorkError if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkError(f"another process is {doing}; wait until it ends, or choose another --out") from None


def _begin(held: Connection) -> None:
    """Prepares a worker: it ends when the other end of `held` is closed, and ignores Ctrl-C.

    It computes with one thread: sums in a different order would change the episodes.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        held.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
