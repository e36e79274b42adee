"""Writes metrics as JSON lines, to TensorBoard and, if configured, to Weights & Biases.

`metrics.jsonl` has only values that are a function of seed, data and step, so a resumed run rewrites it bit for bit;
`eval.jsonl` has those of held-out data, likewise; `timing.jsonl` has times and rates, `heartbeat.json` shows that the
run is alive. Only process 0 writes them.
"""

import contextlib
import importlib.metadata
import io
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from PIL import Image

from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.config import ConfigError, TrainConfig, to_dict
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.metric import EVAL
from rynnvla_jax.storage import files
from rynnvla_jax.train import flops

HEARTBEAT_SECONDS = 5  # between two writes of heartbeat.json


class MetricsWriter:
    """Appends to the logs of a work dir; lines after `step` of an interrupted run are dropped first."""

    def __init__(self, directory: Path, step: int, config: TrainConfig | None = None, workdir: Path | None = None):
        """Continues after `step`. Weights & Biases is used only if `config` is given and asks for it.

        Args:
          directory: of this machine (`storage.logs`); `workdir` (None: the same) may be in a bucket.

        Raises:
          ConfigError: Weights & Biases does not start.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        files.remove_partial(self.directory)
        for name in ("metrics.jsonl", "timing.jsonl"):
            _truncate(self.directory / name, step)
        # The loop evaluates the weights that it starts from again: a run may have stopped before it did.
        _truncate(self.directory / "eval.jsonl", step - 1 if config and config.evaluation.due(step) else step)
        self._waiting: list[tuple[int, dict[str, dict[str, float]]]] = []  # (step, values by file) not written yet
        self._refused = False  # the disk did so, and it was said
        self._stale = False  # TensorBoard's thread may have ended then, and new values would block
        self.tensorboard = start_tensorboard(self.directory / "tensorboard", step + 1)
        asked = config is not None and config.wandb.project
        self.wandb = start_wandb(config, self.directory, workdir or self.directory) if config and asked else None

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """Appends one line to each file; while the disk refuses them, lines are kept, and written later in order."""
        self._write(step, metrics=metrics, timing=timing)

    def write_evaluation(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        """As `write`, to eval.jsonl and timing.jsonl."""
        self._write(step, eval=values, timing=timing)

    def write_pictures(self, step: int, drawn: Mapping[str, bytes]) -> None:
        """PNG files by name, as pictures/NAME_STEP.png and to TensorBoard and Weights & Biases. Raises OSError."""
        for name, content in drawn.items():
            (self.directory / "pictures").mkdir(exist_ok=True)
            files.write_bytes(self.directory / "pictures" / f"{name}_{step:08d}.png", content)
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            self.tensorboard.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")
            if self.wandb:
                import wandb

                self.wandb.log({f"pictures/{name}": wandb.Image(pixels)}, step=step)

    def _write(self, step: int, **groups: dict[str, float]) -> None:
        self._waiting.append((step, groups))
        if self.wandb:
            self.wandb.log(_scalars(**groups), step=step)
        self._write_waiting()

    def _write_waiting(self) -> None:
        written = len(self._waiting)
        try:
            while self._waiting:
                step, values = self._waiting[0]
                for name in list(values):  # what is written is taken out, so that it is not written twice
                    files.append_lines(self.directory / f"{name}.jsonl", [{"step": step, **values[name]}])
                    if self._stale:
                        self.tensorboard = start_tensorboard(self.directory / "tensorboard", step)
                        self._stale = False
                    for key, value in _scalars(**{name: values.pop(name)}).items():
                        self.tensorboard.add_scalar(key, value, step)
                self._waiting.pop(0)
            self.tensorboard.flush()
        except OSError as error:
            if not self._refused:
                multihost.say(
                    f"{self.directory} cannot be written ({shorten(error)}): metrics are kept in memory until it can; "
                    "make room"
                )
            self._refused = self._stale = True
            return
        if self._refused:
            multihost.say(f"{self.directory} can be written again: the metrics of {written} steps were kept")
        self._refused = False

    def close(self, failed: bool = False) -> None:
        """Ends the TensorBoard file and the W&B run's attempt."""
        self._write_waiting()
        if self._waiting:
            multihost.say(f"{self.directory} cannot be written: the metrics of {len(self._waiting)} steps are lost")
        with contextlib.suppress(OSError):
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(failed))


def _scalars(**groups: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}


def check_wandb(config: TrainConfig) -> None:
    """Raises ConfigError when Weights & Biases is asked for and not installed."""
    if not config.wandb.project:
        return
    try:  # no import: it takes seconds, and a folder of that name in the current directory can be imported, too
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"config.wandb.project is {config.wandb.project!r} but wandb is not installed: "
            "pip install 'rynnvla_jax[wandb]', or leave config.wandb.project empty"
        ) from None


def start_tensorboard(directory: Path, step: int):
    """A tensorboardX.SummaryWriter; earlier events from `step` on are hidden."""
    # tensorboardX imports PyTorch where that is installed, which takes longer than all else a start imports; numbers do
    # not need it. None in sys.modules makes `import torch` an ImportError, which tensorboardX expects.
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), purge_step=step)


def start_wandb(config: TrainConfig, directory: Path, workdir: Path) -> Any:
    """The W&B run of a work dir, started or continued: its id is in `WORKDIR/wandb/run_id`.

    W&B accepts no step twice: steps that are repeated after a kill keep their first values. All its local files are in
    `directory`, see MetricsWriter.

    Raises:
      ConfigError: it does not start.
    """
    folder = directory / "wandb"
    folder.mkdir(exist_ok=True)
    for name in ("cache", "data"):  # else in the home directory
        os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(folder / name))
    import wandb

    file = folder / "run_id"
    if not file.exists():
        files.write_text(file, secrets.token_hex(8))
    try:
        return wandb.init(
            project=config.wandb.project,
            mode=cast(Literal["online", "offline"], config.wandb.mode),
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            name=workdir.name,
            dir=directory,
            config={**to_dict(config), "run": (provenance.attempts(workdir) or [{}])[-1]},
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases does not start: {error}; log in (`wandb login`, or WANDB_API_KEY), or set "
            "config.wandb.mode=offline and send the files later (`wandb sync`)"
        ) from None


class Clock:
    """Rates since the last reading, and goodput.

    steps/s, tokens/s (padding is none), share of time spent waiting for data, FLOP utilisation: `flops.training_flops`
    over the time and the peak of all devices, left out where the peak is not known.

    goodput: productive seconds / seconds since the work dir was first started, pauses between attempts included.
    Productive is the time from the end of one step to the end of the next, if that one updated the weights; less saves
    and profiling, less waits for data while the devices had nothing to do. The first step after a start or a restore,
    which compiles, does not count, and steps that are repeated after a restore count once. evaluation_share: the share
    of the same time that went into evaluations.
    """

    def __init__(
        self, config: TrainConfig, since: float | None = None, productive: float = 0.0, evaluation: float = 0.0
    ):
        """`since` is when the work dir was first started (Unix time; None: now), `productive` and `evaluation` its
        seconds so far."""
        self.config, self.evaluation = config, evaluation
        self.peak = flops.peak_flops(jax.devices()[0].device_kind, config.peak_flops) * jax.device_count()
        # The wall clock is read once, because it may be set back during the run, as it may have been before.
        self.before = productive if since is None else max(time.time() - since, productive)
        self.created, self.productive = time.monotonic(), productive
        self.ended: float | None = None  # when the last step did
        self.stall = 0.0  # since then
        self._restart()

    def _restart(self) -> None:
        self.since, self.steps, self.waited, self.blocked = time.monotonic(), 0, 0.0, 0.0
        self.tokens = self.pairs = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Around fetching a batch; `busy`: whether the devices still have work when it is there."""
        entered = time.monotonic()
        yield
        waited = time.monotonic() - entered
        self.waited += waited
        if not busy():
            self.stall += waited

    @contextlib.contextmanager
    def waiting_for_devices(self) -> Iterator[None]:
        """Around reading what a step returns."""
        entered = time.monotonic()
        yield
        self.blocked += time.monotonic() - entered

    def of_host(self) -> dict[str, float]:
        """Seconds of a step since the last reading: in all, those in which this process did not wait for the devices,
        and of these the ones in which it waited for data."""
        seconds, steps = time.monotonic() - self.since, max(self.steps, 1)
        parts = {"step": seconds, "busy": seconds - self.blocked, "data_wait": self.waited}
        return {f"{name}_seconds": x / steps for name, x in parts.items()}

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Context manager around work that is not a step."""
        entered = time.monotonic()
        yield
        self.stall += time.monotonic() - entered

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        entered = time.monotonic()
        with self.stalled():
            yield
        self.evaluation += time.monotonic() - entered

    def finished(self, tokens: float, trained: bool, pairs: float = 0.0) -> None:
        """A step has ended.

        Args:
          tokens: without padding; 0: the stage has none.
          trained: the weights were updated.
          pairs: of a token and one that it attends to.
        """
        now = time.monotonic()
        if self.ended is not None and trained:
            self.productive += max(0.0, now - self.ended - self.stall)
        self.ended, self.stall = now, 0.0
        self.steps += 1
        self.tokens += tokens
        self.pairs += pairs

    def goodput(self) -> float:
        """Share of the time since the work dir was first started."""
        return self.productive / self._elapsed()

    def _elapsed(self) -> float:
        return max(self.before + time.monotonic() - self.created, 1e-9)

    def totals(self) -> dict[str, float]:
        """Shares and seconds since the work dir was first started."""
        values = {"goodput": self.goodput(), "productive_seconds": self.productive}
        if self.config.evaluation.on:
            values |= {
                "evaluation_share": self.evaluation / self._elapsed(),
                "evaluation_seconds": self.evaluation,
            }
        return values

    def read(self) -> dict[str, float]:
        """The rates and goodput; resets the counters of the rates."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        values = {"steps_per_second": self.steps / seconds, "data_wait_share": self.waited / seconds}
        if self.tokens:
            values["tokens_per_second"] = self.tokens / seconds
        if self.tokens and self.peak:
            model = flops.training_flops(self.config.vla.transformer, self.tokens, self.pairs, self.config.finetune.on)
            values["model_flop_utilization"] = model / seconds / self.peak
        values |= self.totals()
        self._restart()
        return values


def peak_memory() -> dict[str, float]:
    """The most memory that a device of this process has held so far, in GiB; {} where devices do not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return {"peak_memory_gib": max(peaks) / 2**30} if peaks else {}


class Heartbeat:
    """`heartbeat.json`: step, time and first start of the work dir (Unix seconds), steps/s, goodput, phase."""

    def __init__(self, directory: Path):
        self.file = directory / "heartbeat.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        before: dict[str, Any] = files.read_status(self.file, {}, _is_heartbeat)
        self.started = before.get("started", time.time())
        self.phase, self.rate, self.goodput = "start-up", 0.0, before.get("goodput", 0.0)
        self.slowest = ""  # of several hosts
        self.begin(before.get("step", 0))

    def begin(self, step: int) -> None:
        """Steps after `step` follow."""
        self.written, self.step = time.monotonic(), step
        self._write()

    def enter(self, phase: str) -> None:
        """The run is in this phase from now on, see `train.watchdog`."""
        self.phase = phase
        self._write()

    def beat(self, step: int, goodput: float, now: bool = False) -> None:
        """Step `step` has finished; written every few seconds, or `now`."""
        seconds = time.monotonic() - self.written
        if seconds >= HEARTBEAT_SECONDS or now:
            self.rate = (step - self.step) / max(seconds, 1e-9)
            self.written, self.step, self.goodput = time.monotonic(), step, goodput
            self._write()

    def _write(self) -> None:
        content: dict[str, Any] = {
            "step": self.step,
            "time": time.time(),
            "steps_per_second": self.rate,
            "goodput": self.goodput,
        }
        content |= {"phase": self.phase, **({"slowest": self.slowest} if self.slowest else {})}
        with contextlib.suppress(OSError):  # a full disk is said by those whose content would be missed
            files.write_json(self.file, {**content, "started": self.started}, indent=None)


def read(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The complete lines of a run's file, which may still grow; an empty list when the file does not exist yet."""
    return files.read_log(files.place(workdir) / name)


def series(workdir: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in a run's logs so far; "eval/NAME" is one of held-out data."""
    name = metric.removeprefix(EVAL)
    lines = read(workdir, "metrics.jsonl" if name == metric else "eval.jsonl")
    return [(int(line["step"]), line[name]) for line in lines if name in line]


def with_held_out(lines: Sequence[dict[str, float]], evaluations: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Lines of metrics.jsonl and of eval.jsonl as those of one log, in which the latter's means are "eval/NAME"."""
    means = [
        {"step": line["step"], **{f"{EVAL}{key}": x for key, x in line.items() if key != "step" and "/" not in key}}
        for line in evaluations
    ]
    return [*lines, *means]


def final(values: Sequence[float]) -> float:
    """Mean of the last tenth (at least one) of the logged values of a metric: one batch alone is noisy.

    Values that are not finite are left out; NaN if all are.
    """
    last = [value for value in values[-math.ceil(len(values) / 10) :] if math.isfinite(value)]
    return sum(last) / len(last) if last else math.nan


def _truncate(path: Path, step: int) -> None:
    """Keeps complete lines up to `step`: a killed run may have left later ones, or an incomplete line.

    A damaged line costs that line only: it is left out, and how many there were is printed.
    """
    if not path.exists():
        return
    kept, damaged = [], 0
    for _, line, value in files.raw_lines(path):
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            if line.endswith(b"\n") and value["step"] <= step:
                kept.append(line)
        elif not (isinstance(value, files.DamagedFileError) and value.unfinished):
            damaged += 1
    if damaged:
        print(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out", file=sys.stderr, flush=True)
    files.write_bytes(path, b"".join(kept))


def _is_heartbeat(content: Any) -> bool:
    numbers = ("started", "goodput", "step")
    return isinstance(content, dict) and all(isinstance(content.get(name, 0), int | float) for name in numbers)
