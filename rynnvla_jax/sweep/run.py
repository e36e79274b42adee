"""Runs points of a sweep on this machine, several at a time: slots, retries, signals, one line when a point ends.

`OUT/status.jsonl` logs starts and ends with times; only the work dirs determine which points are finished.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import platform as platform_lib
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rynnvla_jax import children
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.progress import Bar, progress_bar
from rynnvla_jax.storage import files
from rynnvla_jax.sweep.plan import Definition, Point, check_vacant
from rynnvla_jax.train import metrics as metrics_lib

POLL = 0.2  # seconds between two looks at the processes
PROGRAM = children.module("rynnvla_jax.cli")
_NOT_RESULTS = ("step", "learning_rate", "skipped", "skipped_total", "grad_norm")


class Interrupted(Exception):
    """SIGTERM or SIGINT was received; the runs have saved and exited."""

    def __init__(self, number: int):
        super().__init__(f"received {signal.Signals(number).name}")
        self.status = 128 + number


@dataclass
class RunningPoint:
    """One point that is running or waiting."""

    point: Point
    attempt: int = 0
    slot: int = -1
    process: subprocess.Popen | None = field(default=None, repr=False)
    stopped: bool = False  # we told it to leave

    @property
    def child(self) -> subprocess.Popen:
        """The process of what `Machine.start` started."""
        assert self.process is not None
        return self.process

    def kill(self) -> None:
        self.child.kill()


class Machine:
    """Runs points in slots, each with its share of the cores or GPUs. A context manager; its exit ends the runs.

    Ctrl-C and SIGTERM are passed on as SIGTERM to the runs, which save and exit; a second one kills them.
    """

    def __init__(self, definition: Definition, out: Path, lock: int, parallel: int, platform: str, devices: int):
        self.definition, self.out, self._lock = definition, out, lock
        self._environments = [_environment(i, out, parallel, platform, devices) for i in range(parallel)]
        self._cores = [_cores(i, parallel) if platform == "cpu" else None for i in range(parallel)]
        self.running: list[RunningPoint] = []
        self._signal = 0

    def __enter__(self) -> "Machine":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for run in self.running:
            self.stop(run)
        for run in self.running:
            run.child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def free(self) -> bool:
        return len(self.running) < len(self._environments)

    def start(self, run: RunningPoint) -> None:
        """Starts a run, or starts it again, in a free slot."""
        taken = {other.slot for other in self.running}
        run.slot = next(i for i in range(len(self._environments)) if i not in taken)
        run.attempt, run.stopped = run.attempt + 1, False
        with log(self.out, run.point).open("a", encoding="utf-8") as file:
            file.write(f"--- attempt {run.attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            run.process = subprocess.Popen(
                [*PROGRAM, *run.point.arguments(self.definition, self.out)],
                env=self._environments[run.slot],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,  # Ctrl-C is for us
                pass_fds=(self._lock,),  # a run that outlives a killed sweep keeps others off
            )
        if cores := self._cores[run.slot]:
            os.sched_setaffinity(run.process.pid, cores)
        self.running.append(run)
        self.note(run.point, "started", attempt=run.attempt, pid=run.process.pid)

    def stop(self, run: RunningPoint) -> None:
        """Asks a run to save and exit."""
        if not run.stopped:
            run.stopped = True
            run.child.terminate()

    def ended(self) -> list[RunningPoint]:
        """Runs that have ended since the last call, after a short wait.

        Raises:
          Interrupted: after all runs have exited.
        """
        time.sleep(POLL)
        if self._signal:
            for run in self.running:
                self.stop(run)
            for run in self.running:
                run.child.wait()
                self.note(run.point, "finished" if run.point.finished(self.out) else "interrupted")
            self.running = []
            raise Interrupted(self._signal)
        gone = [run for run in self.running if run.child.poll() is not None]
        self.running = [run for run in self.running if run not in gone]
        return gone

    def note(self, point: Point, event: str, **more) -> None:
        """Appends one line to `status.jsonl`."""
        line = {"time": time.time(), "point": point.name, "event": event, **more}
        files.append_lines(self.out / "status.jsonl", [line])

    def _handle(self, number: int, _) -> None:
        if self._signal:
            for run in self.running:
                run.kill()
            return
        self._signal = number
        for run in self.running:
            self.stop(run)
        os.write(2, b"\nthe runs save and leave; once more ends them at once\n")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Locks OUT/lock; the runs inherit its file descriptor. In a bucket nothing is locked: only job files are written.

    Raises:
      ConfigError: another sweep, or runs that a killed one left, use the directory; or it is not of a sweep.
    """
    check_vacant(out)
    if files.is_bucket(out):
        yield -1
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            if owner and Path(f"/proc/{owner}").exists():
                text = (
                    f"another sweep (process {owner}) is running in {out}; wait until it ends, or choose another --out"
                )
                raise ConfigError(text) from None
            raise ConfigError(
                f"runs of a killed sweep are still running in {out} (processes {', '.join(_left(out))}); wait until "
                "they end, or send them SIGTERM: they save and exit"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def run_all(machine: Machine, points: Sequence[Point], retries: int) -> dict[str, str]:
    """Runs all points that are not finished. Returns the reasons of failed points, by name.

    Raises:
      Interrupted.
    """
    done = [p for p in points if p.finished(machine.out)]
    waiting = deque(RunningPoint(p) for p in points if p not in done)
    failed: dict[str, str] = {}
    with bar(len(points), len(done)) as shown, machine:
        while waiting or machine.running:
            while waiting and machine.free:
                machine.start(waiting.popleft())
            show_running(shown, machine)
            for run in machine.ended():
                if outcome(machine, run, retries, shown):
                    shown.update()
                elif run.attempt <= retries:
                    waiting.append(run)
                else:
                    failed[run.point.name] = reason(machine.out, run)
    return failed


def outcome(machine: Machine, run: RunningPoint, retries: int, shown: Bar) -> bool:
    """Logs and prints how a run has ended. Returns whether it is finished."""
    if run.point.finished(machine.out):
        machine.note(run.point, "finished")
        shown.write(f"{run.point.name}: {results(last(machine.out, run.point))}", file=sys.stderr)
        return True
    machine.note(run.point, "failed", attempt=run.attempt, status=run.child.returncode)
    again = "again" if run.attempt <= retries else f"see {log(machine.out, run.point)}"
    shown.write(f"{run.point.name}: failed, {reason(machine.out, run)}; {again}", file=sys.stderr)
    return False


def bar(total: int, initial: int) -> Bar:
    return progress_bar(total=total, initial=initial, desc="sweep", unit="point", average=True)


def show_running(shown: Bar, machine: Machine) -> None:
    """The running points and their progress."""
    parts = [f"{r.point.name} {_step(machine.out, r.point)}/{r.point.config.total_steps}" for r in machine.running]
    shown.set_postfix_str("; ".join(parts), refresh=False)
    shown.update(0)


def log(out: Path, point: Point) -> Path:
    return out / f"{point.name}.log"


def last(out: Path, point: Point) -> dict[str, float]:
    """The last logged metrics of a point, those of held-out data too; {} before the first."""
    trained, held_out = metrics_lib.read(out / point.name)[-1:], metrics_lib.read(out / point.name, "eval.jsonl")[-1:]
    return {key: x for line in metrics_lib.with_held_out(trained, held_out) for key, x in line.items()}


def results(metrics: dict[str, float]) -> str:
    """`loss 0.123, ...`."""
    return ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k not in _NOT_RESULTS) or "no metrics"


def reason(out: Path, run: RunningPoint) -> str:
    """How the process of a run ended, and the last line that it printed."""
    code = run.child.returncode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if code == 0:
        how = f"ended without a verified checkpoint of step {run.point.config.total_steps}"
    said = [
        line for line in log(out, run.point).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    return f"{how}: {shorten(said[-1], 300)}" if said and not said[-1].startswith("--- attempt") else how


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def final_table(points: Sequence[Point], out: Path, failed: dict[str, str], metric: str) -> str:
    """Numbers, names and final metrics of all points, with `metric` as the first metric."""
    found = [last(out, p) for p in points]
    names = list(dict.fromkeys(k for line in found for k in line if k not in _NOT_RESULTS))
    names.sort(key=lambda name: (name != metric, name != "loss", name))
    rows = [["point", "step", *names]]
    for point, line in zip(points, found, strict=True):
        values = [f"{line[n]:.5g}" if n in line else "" for n in names]
        rows.append([point.name, str(line.get("step", 0)), *values])
    text = [table(rows)]
    text += [f"FAILED {name}: {why}\n  {out / name}.log" for name, why in failed.items()]
    return "\n".join(text)


def _step(out: Path, point: Point) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return files.read_json(out / point.name / "heartbeat.json")["step"]
    return 0


def _cores(slot: int, parallel: int) -> list[int]:
    """The share of the cores of a slot; slots that are more than cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // parallel)
    return [cores[(slot * size + i) % len(cores)] for i in range(size)]


def _environment(slot: int, out: Path, parallel: int, platform: str, devices: int) -> dict[str, str]:
    environment = {**os.environ, "RYNNVLA_NUM_PROCESSES": "1", "PYTHONUNBUFFERED": "1"}
    if platform == "cpu":  # elsewhere runs share a cache anyway, see `train.compiler_options`
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "compiled" / _processor()))
    if platform == "gpu" and parallel > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        share = math.floor(devices / parallel)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[slot * share : (slot + 1) * share])
    return environment


def _processor() -> str:
    """Identifies the kind of processor: XLA's programs for a CPU use what it has, and run on no other."""
    told = [platform_lib.machine()]
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _left(out: Path) -> list[str]:
    """Processes in `status.jsonl` that still run."""
    events = files.read_log(out / "status.jsonl")
    return [str(e["pid"]) for e in events if "pid" in e and Path(f"/proc/{e['pid']}").exists()]
