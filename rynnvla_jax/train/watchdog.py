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

from rynnvla_jax import progress
from rynnvla_jax.distributed import multihost
from rynnvla_jax.storage import files
from rynnvla_jax.train.metrics import Heartbeat

EXIT_CODE = 75  # EX_TEMPFAIL: the same command may work when it is started again
FACTOR = 10  # a step that takes longer than this many times the median hangs
RECENT = 50  # steps for the median
ENOUGH = 3  # steps that the median needs
STEP = "step"
# Seconds that phases may always take whose duration grows with the model or the data. The steps of a progress bar each
# have that long.
_LONG = ("start-up", "compile", "encode", "restore", "evaluate", "waiting to save again")
AT_LEAST = dict.fromkeys(_LONG, 3600)
DUMP_SECONDS = 10  # for writing the stacks: perhaps it is the disk that hangs


class Watchdog:
    """A thread that ends the process when the current phase takes too long; a context manager.

    Phases are start-up, encode, compile, restore, first batch, step, evaluate, save, read-back and final wait. A step
    may take `floor` seconds and FACTOR times the median of the last steps; before there are ENOUGH of these, and in any
    other phase, FACTOR times `floor`, or AT_LEAST. Waiting for other processes has no limit here: each has its own
    watchdog.
    """

    def __init__(self, floor: float, stacks: Path):
        """`floor`: seconds that a step may always take (0: no watchdog); `stacks`: file for the stacks."""
        self.heartbeat: Heartbeat | None = None  # is told the phases
        self._floor, self._stacks = floor, stacks
        self._phase, self._since, self._step = "start-up", time.monotonic(), 0
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._beaten = False  # since this phase began: the time since then is that of whole steps
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._floor:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._enter("finished" if kind is None else "stopped")
        self._closed.set()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager around a phase, perhaps inside another one, whose time starts anew afterwards."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, name: str) -> None:
        with self._lock:
            self._phase, self._since, self._beaten = name, time.monotonic(), False
        if self.heartbeat:
            self.heartbeat.enter(name)

    def beat(self, step: int) -> None:
        """Step number `step` has finished on the devices."""
        with self._lock:
            now = time.monotonic()
            if self._beaten:
                self._durations.append(now - self._since)
            self._since, self._step, self._beaten = now, step, True

    def overdue(self) -> str | None:
        """What takes too long, and how long it has taken; None while nothing does."""
        with self._lock:
            if multihost.waiting():
                self._since = time.monotonic()
            taken = time.monotonic() - max(self._since, progress.last_update())
            limit = FACTOR * self._floor
            if self._phase != STEP:
                limit = max(limit, AT_LEAST.get(self._phase, 0))
                told = f"{self._phase} has not finished for {taken:.0f} s (limit {limit:.0f} s) after step {self._step}"
            elif len(self._durations) < ENOUGH:
                told = f"no step has finished for {taken:.0f} s after step {self._step} (limit {limit:.0f} s)"
            else:
                median = statistics.median(self._durations)
                limit = max(self._floor, FACTOR * median)
                told = f"no step has finished for {taken:.0f} s after step {self._step} (median {median:.3g} s a step)"
        return told if taken > limit else None

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._floor / 10)):
            if told := self.overdue():
                self._end_process(told)

    def _end_process(self, told: str) -> None:
        message = (
            f"watchdog: {told}; stacks are in {self._stacks}; exiting with status {EXIT_CODE}, the same command "
            "continues; if that needs longer, raise config.watchdog_seconds"
        )
        writer = threading.Thread(target=self._dump, args=(message,), daemon=True)
        writer.start()
        writer.join(DUMP_SECONDS)
        os._exit(EXIT_CODE)

    def _dump(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)  # stderr
        with (
            contextlib.suppress(OSError),
            files.replacing(self._stacks) as partial,
            partial.open("w", encoding="utf-8") as file,
        ):
            file.write(message + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
