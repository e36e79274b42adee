"""Ends a process that hangs, after printing the stacks of all threads, so that the scheduler restarts it."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

EXIT_CODE = 75  # EX_TEMPFAIL: the same command may work when it is started again
FACTOR = 10  # a step that takes longer than this many times the median hangs
RECENT = 50  # steps for the median
ENOUGH = 3  # steps that the median needs


class Watchdog:
    """A thread that ends the process when `beat` is not called in time; a context manager.

    It is inactive before a few steps have finished (the first compile) and inside `paused`.
    """

    def __init__(self, floor: float, stacks: Path):
        """`floor`: seconds that a step may always take (0: no watchdog); `stacks`: file for the stacks."""
        self._floor, self._stacks = floor, stacks
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._since: float | None = None  # when the last step ended; None: nothing is expected
        self._step = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._floor:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def beat(self, step: int) -> None:
        """Step number `step` has finished on the devices."""
        with self._lock:
            now = time.monotonic()
            if self._since is not None:
                self._durations.append(now - self._since)
            self._since, self._step = now, step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager around work of unlimited duration, such as a save."""
        with self._lock:
            before, self._since = self._since, None
        yield
        with self._lock:
            self._since = None if before is None else time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._floor / 10)):
            with self._lock:
                if self._since is None or len(self._durations) < ENOUGH:
                    continue
                median = statistics.median(self._durations)
                taken, step = time.monotonic() - self._since, self._step
            if taken > max(self._floor, FACTOR * median):
                self._end_process(step, taken, median)

    def _end_process(self, step: int, taken: float, median: float) -> None:
        message = (
            f"watchdog: no step has finished for {taken:.0f} s after step {step} (median {median:.3g} s per step); "
            f"stacks are in {self._stacks}; exiting with status {EXIT_CODE}, the same command continues"
        )
        try:
            print(message, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(2, all_threads=True)  # stderr
            with self._stacks.open("w", encoding="utf-8") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(EXIT_CODE)
