"""Traces the steps of `config.profile_steps`, for XProf (`xprof WORKDIR/profile`) or TensorBoard's profile tab."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files
from rynnvla_jax.train.monitor import Progress


class Profiler:
    """Traces the steps `first` to `last` (as numbered in metrics.jsonl) into a directory; a context manager."""

    def __init__(self, steps: tuple[int, ...], directory: Path, progress: Progress):
        """Nothing is traced when `steps` is empty."""
        self._first, self._last = steps or (0, 0)
        self._directory, self._progress = directory, progress
        self._aside = tempfile.TemporaryDirectory(prefix="rynnvla-") if files.is_bucket(directory) else None
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()
        if self._aside:
            self._aside.cleanup()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager around a whole step."""
        if self._first <= number <= self._last and not self._running:
            self._progress.drain()  # what was started before is not part of the trace
            with self._progress.paused("profile"):
                jax.profiler.start_trace(self._aside.name if self._aside else self._directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if self._running and number == self._last:
            self._progress.drain()
            self._stop()

    def _stop(self) -> None:
        with self._progress.paused("profile"):
            jax.profiler.stop_trace()
            self._running = False
            if self._aside:
                try:
                    files.copy_folder(Path(self._aside.name), self._directory)
                except OSError as error:  # no reason to end the run
                    multihost.say(f"the profile cannot be written to {self._directory}: {shorten(error)}")
                    return
        multihost.say(
            f"profile of steps {self._first} to {self._last} is in {self._directory}; view it with "
            f"`xprof {self._directory}`"
        )
