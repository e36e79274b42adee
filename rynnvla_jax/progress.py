"""Progress of a long command: a bar if stderr is a terminal, otherwise (`kubectl logs`, Slurm) plain lines.

robot: step 40/120, loss 1.2345, 1.5 s/step, 2 min left
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

FIRST_LINE = 10.0  # seconds between two lines, and
SPARSER = 0.05  # of the time so far where that is more,
LONGEST = 60.0  # up to this many seconds
SHORT = 1.0  # what takes less writes nothing

_last_update = time.monotonic()


def last_update() -> float:
    """When (`time.monotonic`) any bar of this process moved: a long command that still makes progress."""
    return _last_update


def _note_update() -> None:
    global _last_update
    _last_update = time.monotonic()


class Lines:
    """The part of tqdm's interface that we use, as plain lines; a context manager. Writes lines at intervals."""

    def __init__(
        self,
        iterable: Iterable | None = None,
        *,
        desc: str,
        total: float | None = None,
        initial: float = 0,
        unit: str = "it",
        scale: bool = False,
        show: bool = True,
        skip_first: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """See `progress_bar`; `clock` is for tests."""
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._iterable, self._desc, self._unit, self._scale, self._clock = iterable, desc, unit, scale, clock
        self.total, self.n, self.disable = total, initial, not show
        self._start, self._initial, self._skip_first = clock(), initial, skip_first
        self._began, self._written, self._said = self._start, self._start, initial
        self._postfix = ""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        try:
            for item in self._iterable or ():
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float = 1) -> None:
        _note_update()
        self.n += n
        if self._skip_first and n:
            self._skip_first, self._start, self._initial = False, self._clock(), self.n
        self.refresh()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self._postfix = text

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        self._postfix = ", ".join(f"{name} {value}" for name, value in values.items())

    def refresh(self) -> None:
        """Writes a line if the interval has passed."""
        now = self._clock()
        if now - self._written >= min(max(FIRST_LINE, SPARSER * (now - self._began)), LONGEST):
            self._write(now)

    def close(self) -> None:
        """Writes the last line, once."""
        now = self._clock()
        if self.n != self._said and now - self._began >= SHORT:
            self._write(now)
        self.disable = True

    def write(self, text: str, file: Any = None) -> None:
        """Writes a separate line."""
        print(text, file=file or sys.stderr, flush=True)

    def _write(self, now: float) -> None:
        self._written, self._said = now, self.n
        if not self.disable:
            with contextlib.suppress(OSError):  # stderr may be a file on a disk that is full
                print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """The text of the line at time `now`."""
        done = f"{self._number(self.n)}/{self._number(self.total)}" if self.total else self._number(self.n)
        parts = [f"{self._desc}: {self._unit} {done}", self._postfix]
        count, seconds = self.n - self._initial, now - self._start
        if count > 0 and seconds > 0:
            each = seconds / count
            parts.append(f"{each:.1f} s/{self._unit}" if each >= 1 else f"{self._number(1 / each)} {self._unit}/s")
            if self.total and self.n < self.total:
                parts.append(f"{duration(each * (self.total - self.n))} left")
        return ", ".join(filter(None, parts))

    def _number(self, value: float) -> str:
        return tqdm.format_sizeof(value) if self._scale else f"{value:.4g}" if value != int(value) else str(int(value))


class _Tqdm(tqdm):
    def update(self, n: float | None = 1) -> bool | None:
        _note_update()
        return super().update(n)


Bar = Lines  # or a _Tqdm, which has these methods too, but brings no types


def progress_bar(
    iterable: Iterable | None = None,
    *,
    desc: str,
    total: float | None = None,
    initial: float = 0,
    unit: str = "it",
    scale: bool = False,
    leave: bool = True,
    show: bool = True,
    average: bool = False,
    skip_first: bool = False,
) -> Bar:
    """Shows progress over `iterable`, or by calls of `update`, on stderr.

    Args:
      total, initial: in `unit`s; `initial` were done before.
      scale: with k, M, G.
      leave: a bar stays when it is full. Lines always do.
      show: False for processes that should print nothing.
      average: the time left follows from all units since the start, for few and long ones; else a bar looks at the
        latest only.
      skip_first: the first unit takes long for a reason of its own, such as a compilation; lines leave it out.
    """
    if not show or not sys.stderr.isatty():
        return Lines(
            iterable,
            desc=desc,
            total=total,
            initial=initial,
            unit=unit,
            scale=scale,
            show=show,
            skip_first=skip_first,
        )
    return _Tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        leave=leave,
        mininterval=0.5,
        maxinterval=0.5 if average else 10.0,
        smoothing=0.0 if average else 0.3,
    )


def duration(seconds: float) -> str:
    """5 s, 3 min, 2 h 10 min, 3 days."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours / 24:.0f} days"
