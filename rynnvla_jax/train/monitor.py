"""The start-up message, and the bookkeeping after each finished step: skipped updates, metrics files, the watchdog.

The loop starts a step and handles the one `LAG` steps before it, so that the devices always have queued work.
"""

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import rynnvla_jax
from data_pipelines.loader import Loader
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.metric import higher_is_better
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.storage.logs import Logs
from rynnvla_jax.train import by_source, compiler_options, evaluation, hosts
from rynnvla_jax.train import metrics as metrics_lib
from rynnvla_jax.train import watchdog as watchdog_lib
from rynnvla_jax.train.bad_batches import LeftOutBatches
from rynnvla_jax.train.by_source import BySource
from rynnvla_jax.train.metrics import Clock, MetricsWriter
from rynnvla_jax.train.optimizer import describe, schedule
from rynnvla_jax.train.pictures import Artist, Shown
from rynnvla_jax.train.step import TrainState
from rynnvla_jax.train.watchdog import Watchdog

ALWAYS = ("attention_pairs", by_source.KEY, "grad_norm", "loss", "skipped", "tokens")  # what is read of every step
LAG = 2  # steps between the one that is started and the one that is handled


class Progress:
    """Follows the steps since the start or the last restore; a context manager."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        logs: Logs | None,
        step: int,
        left_out: LeftOutBatches,
        loader: Loader,
        watchdog: Watchdog,
    ):
        """`logs`: of process 0. A collective call."""
        self.config, self.left_out, self._loader = config, left_out, loader
        self.by_source = BySource.resumed(loader, workdir, step)
        self._hosts = hosts.Hosts(mesh, LAG)
        self._undrawn = 0  # pictures of evaluations since the start
        columns = loader.statistics.columns if loader.statistics else None
        vqgan = workdir / "assets" / "vqgan" if STAGES[config.stage].tokens else None
        self._artist = Artist(vqgan, config.sequence.views, columns)
        self.logged: dict[str, float] = {}  # the metrics of the last logged step
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._watchdog, self._heartbeat = watchdog, watchdog.heartbeat
        self._phases = contextlib.ExitStack()
        self._began = False  # a first batch came
        self._writer = MetricsWriter(logs.folder, step, config, workdir) if logs else None
        if self._heartbeat:
            self._heartbeat.begin(step)
        history = metrics_lib.read(logs.folder, "timing.jsonl") if logs else []
        self._clock = Clock(
            config,
            since=self._heartbeat.started if self._heartbeat else None,
            productive=history[-1].get("productive_seconds", 0.0) if history else 0.0,
            evaluation=history[-1].get("evaluation_seconds", 0.0) if history else 0.0,
        )
        self._bar = progress_bar(
            total=config.total_steps,
            initial=step,
            desc=config.stage,
            unit="step",
            show=multihost.primary(),
            skip_first=True,  # it compiles
        )

    def __enter__(self) -> "Progress":
        self._phases.enter_context(self._watchdog.phase(watchdog_lib.STEP))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close(failed=kind is not None)
        self._phases.close()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around fetching a batch."""
        busy = lambda: bool(self._pending) and not self._pending[-1][1]["loss"].is_ready()  # noqa: E731
        with self._first("first batch"), self._clock.waiting_for_data(busy):
            yield

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around the call that starts a step: the first one compiles."""
        with self._first("compile"):
            yield
        self._began = True

    def _first(self, phase: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._began else self._watchdog.phase(phase)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Around what is not a step, such as a save."""
        with self._watchdog.phase(phase), self._clock.stalled():
            yield

    def evaluate(self, done: int, evaluator: evaluation.Evaluator, params: Any, opt_state: Any) -> dict[str, float]:
        """The metrics of held-out data, logged as those after `done` steps, with pictures.

        Raises:
          BadBatches: as `started`, of steps before.
        """
        self.drain()
        with self._watchdog.phase("evaluate"), self._clock.evaluating():
            values = evaluator.of_state(params, opt_state)
            self._draw(done, evaluator.show(params))
        multihost.say(f"step {done}: on held-out data {evaluation.line(values)}")
        if self._writer:
            undrawn = {"undrawn_pictures": float(self._undrawn)} if self._undrawn else {}
            self._writer.write_evaluation(done, values, self._clock.totals() | undrawn)
        return values

    def _draw(self, done: int, shown: Shown) -> None:
        """Never stops a run: pictures that cannot be drawn or written are said and counted."""
        if not self._writer:
            return
        try:
            self._writer.write_pictures(done, self._artist(shown))
        except Exception as error:
            self._undrawn += 1
            multihost.say(
                f"step {done}: no pictures were drawn ({shorten(error)}); the run goes on, and "
                "config.evaluation.pictures=0 leaves them out"
            )

    def started(self, step: int, metrics: dict[str, Any]) -> None:
        """Step `step` (from 0 on) was started; handles an earlier one.

        Raises:
          BadBatches: too many updates in a row were not applied.
        """
        self._pending.append((step, metrics))
        self._look(LAG)

    def drain(self) -> None:
        """Waits for all started steps and handles them. Raises as `started` does."""
        self._look(0)

    def _timing(self, done: int) -> dict[str, float]:
        """What timing.jsonl gets after `done` steps; resets the rates. All processes call it."""
        memory = metrics_lib.peak_memory()
        self._hosts.send(done, {**self._clock.of_host(), **memory, "memory_gib": hosts.host_memory()})
        compared = self._hosts.read(done, last=done == self.config.total_steps)
        if compared and self._heartbeat:
            self._heartbeat.slowest = self._hosts.name(int(compared["hosts/slowest"]))
        return {**self._clock.read(), **memory, "damaged_examples": self._loader.damaged, **compared}

    def _look(self, keep: int) -> None:
        while len(self._pending) > keep:
            self._finished(*self._pending.popleft())

    def _finished(self, step: int, metrics: dict[str, Any]) -> None:
        done = step + 1
        logs = done % self.config.log_every == 0 or done == self.config.total_steps
        names = [name for name in sorted(metrics) if logs or name in ALWAYS]
        with self._clock.waiting_for_devices():
            found = jax.device_get({k: metrics[k] for k in names})
        of_sources = found.pop(by_source.KEY, {})
        values = {k: float(v) for k, v in found.items()}
        self._watchdog.beat(done)
        pairs = values.pop("attention_pairs", 0.0)
        self._clock.finished(values.get("tokens", 0.0), not values["skipped"], pairs)
        self.by_source.finished(step, of_sources, not values["skipped"])
        self.left_out.finished(step, values)
        if logs:
            # A mean over nothing is NaN: of a kind of token that no token of the batch was.
            values = {name: x for name, x in values.items() if "/" not in name or not math.isnan(x)}
            self.logged = {**values, "skipped_total": float(self.left_out.total(step)), **self.by_source.read(done)}
            timing = self._timing(done)
            if self._writer:
                self._writer.write(done, self.logged, timing)
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if self._heartbeat:
            self._heartbeat.beat(done, self._clock.goodput(), now=done == self.config.total_steps)
        self._bar.update()


def follows(saved: TrainConfig, config: TrainConfig, step: int, example: int) -> list[str]:
    """What changes for a run that continues after `step` with other settings; [] where nothing does.

    Args:
      saved: the config that the step was saved with.
      example: number of the first example of the next batch.
    """
    changes = []
    before = float(schedule(saved.optimizer, saved.total_steps)(max(step - 1, 0)))
    after = float(schedule(config.optimizer, config.total_steps)(step))
    if (saved.optimizer, saved.total_steps) != (config.optimizer, config.total_steps):
        changes.append(f"learning rate {before:.3g} -> {after:.3g}")
    if saved.batch_size != config.batch_size:
        sizes = f"batches of {saved.batch_size} -> {config.batch_size} examples"
        changes.append(f"{sizes}, data position {example} -> {example}: none is skipped or repeated")
    return [f"what follows step {step}: {', '.join(changes)}"] if changes else []


def announce(config: TrainConfig, mesh, state: TrainState, loader, workdir: Path, examples=None, base=None) -> None:
    """Prints the start-up message: devices, mesh, size of the model, data, intervals. `examples` is the loader
    of those that are evaluated, if there are any, `base` the weights that do not train."""
    if not multihost.primary():
        return
    size = params_lib.count(state.params)
    memory = mesh_lib.bytes_per_device((state.params, state.opt_state)) / 2**20
    start = f"resuming at step {state.step}" if state.step else "starting"
    if state.step >= config.total_steps:
        start = "finished already"
    lines = [
        f"rynnvla_jax {rynnvla_jax.__version__}: stage {config.stage}, {start}, {config.total_steps} steps "
        f"of {config.batch_size} examples",
        f"  devices    {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es), "
        f"mesh {mesh_lib.axes_line(mesh)}",
        f"  parameters {size / 1e6:.2f} M, {memory:.1f} MiB of weights and optimizer state per device, "
        f"compute {config.compute_dtype}, remat {config.remat}",
        *([f"  frozen     {_base(config, base)}"] if base else []),
        f"  optimizer  {describe(config.optimizer, config.total_steps)}",
        *(f"  compiler   {line}" for line in compiler_options.describe(config, mesh.devices.flat[0])),
        *(f"  data       {line}" for line in loader.describe()),
        *(f"  held out   {part.said}" for part in loader.splits),
        *([f"  evaluates  {evaluation.describe(config.evaluation, examples)}"] if examples else []),
        *(f"  ?          {line}" for line in loader.questions()),
        f"  writes     {workdir}, {_checkpoint_interval(config)}",
        f"  safety     {config.max_skipped_in_a_row} skipped updates in a row restore the last checkpoint; "
        + (
            f"a step longer than {config.watchdog_seconds:g} s and 10 times the median ends the run"
            if config.watchdog_seconds
            else "no watchdog"
        ),
    ]
    large = mesh_lib.describe(state.params, mesh_lib.LARGE) if mesh.size > 1 else []
    lines += ["  shards     of the large parameters, on one device:", *(f"    {x}" for x in large)] if large else []
    print("\n".join(lines), file=sys.stderr, flush=True)
    machine = json.dumps({"devices": lines[1].removeprefix("  devices    ")})
    files.write_text(workdir / "assets" / "machine.json", machine)


def _base(config: TrainConfig, base) -> str:
    """The weights that do not train, in words."""
    size, memory = params_lib.count(base) / 1e6, mesh_lib.bytes_per_device(base) / 2**20
    return (
        f"{size:.2f} M parameters of {config.init_from.path}, {memory:.1f} MiB per device; checkpoints do not contain "
        "them: keep that directory"
    )


def _checkpoint_interval(config: TrainConfig) -> str:
    """When checkpoints are saved, in words."""
    steps, minutes = config.checkpoint.every_steps, config.checkpoint.every_minutes
    parts = [f"{steps} steps" if steps else "", f"{minutes:g} minutes" if minutes else ""]
    text = f"a checkpoint every {' or '.join(filter(None, parts))}"
    if metric := config.checkpoint.keep_best:
        text += f", and at the best {metric}, where {'higher' if higher_is_better(metric) else 'lower'} is better"
    return text
