"""What recording and evaluation share: processes that do the episodes, and one command at a time in a folder."""

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
    """The work was interrupted or cannot begin; the message names the remedy."""


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Workers that end with this process, and at once when the context ends by an error.

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
    """Until `file` is closed or this process ends, however it does. Raises WorkError when another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkError(f"another process is {doing}; let it end, or choose another --out") from None


def _begin(held: Connection) -> None:
    """A worker ends when the other end of `held` is closed, and leaves Ctrl-C to its parent.

    It computes with one thread: sums in another order would make other episodes.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        held.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
