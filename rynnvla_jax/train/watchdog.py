"""Ends a process that hangs, with the stacks of all its threads, so that the scheduler starts it again."""

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
FACTOR = 10  # a step that takes so many times the median hangs
RECENT = 50  # steps that the median is taken of
ENOUGH = 3  # steps before there is a median


class Watchdog:
    """A thread that expects `beat` often enough; a context manager.

    Nothing is expected before a few steps have finished (the first compile) nor inside `paused`.
    """

    def __init__(self, floor: float, stacks: Path):
        """Seconds that a step may always take (0: no watchdog), and the file that the stacks go to."""
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
        """Around what may take any time, such as a save."""
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
                self._bite(step, taken, median)

    def _bite(self, step: int, taken: float, median: float) -> None:
        message = (
            f"watchdog: no step has finished for {taken:.0f} s after step {step} (median {median:.3g} s a step); "
            f"stacks are in {self._stacks}; leaving with status {EXIT_CODE}, the same command continues"
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
