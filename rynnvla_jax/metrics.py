"""Where numbers go: JSON lines and TensorBoard.

`metrics.jsonl` holds only what is a function of seed, data and step, so a resumed run rewrites it bit for bit;
`timing.jsonl` holds what the clock says.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from rynnvla_jax import flops
from rynnvla_jax.config import TrainConfig


class MetricsWriter:
    """Appends to a work dir; lines after `step` of an interrupted run are dropped first."""

    def __init__(self, workdir: Path, step: int):
        self.directory = Path(workdir)
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "timing.jsonl"):
            _truncate(self.directory / name, step)
        self.tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """One line in each file.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        for name, values in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
            with (self.directory / name).open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.tensorboard.add_scalar(f"{name.split('.')[0]}/{key}", value, step)
        self.tensorboard.flush()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss is {metrics['loss']} at step {step}; the last checkpoint is intact: lower "
                "config.optimizer.peak_lr or look at the data of this step"
            )


class Clock:
    """Rates since the last reading: steps/s, tokens/s, share of time spent waiting for data, FLOP utilisation.

    The utilisation is `flops.training_flops` over the time and the peak of all devices; it is left out where the
    peak is not known.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.peak = flops.peak_flops(jax.devices()[0].device_kind, config.peak_flops) * jax.device_count()
        self._restart()

    def _restart(self) -> None:
        self.since, self.steps, self.tokens, self.waited = time.monotonic(), 0, 0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around fetching a batch."""
        entered = time.monotonic()
        yield
        self.waited += time.monotonic() - entered

    def tick(self, tokens: int) -> None:
        """A step over `tokens` tokens (0: the stage has none) was started."""
        self.steps += 1
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """The rates; starts counting anew."""
        seconds = time.monotonic() - self.since
        values = {"steps_per_second": self.steps / seconds, "data_wait_share": self.waited / seconds}
        if self.tokens:
            values["tokens_per_second"] = self.tokens / seconds
        if self.tokens and self.peak:
            model = flops.training_flops(self.config.vla.transformer, self.tokens, self.config.sequence.length)
            values["model_flop_utilization"] = model / seconds / self.peak
        self._restart()
        return values


def read(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    """All lines of a run's file; none when it has not been written yet."""
    path = Path(workdir) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _truncate(path: Path, step: int) -> None:
    """Keeps whole lines up to `step`: a kill may have left later ones, or half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
