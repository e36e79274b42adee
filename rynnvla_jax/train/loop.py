"""The one training loop: `rynnvla train --config configs/robot.py:tiny --workdir DIR`.

Reads top to bottom: assets, data, mesh, model, sharding, restore, step, loop. The same command resumes.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from data_pipelines.loader import Loader
from data_pipelines.stream import first_example
from rynnvla_jax.checkpoint import base as base_lib
from rynnvla_jax.checkpoint import manager, model_dir, provenance, reader
from rynnvla_jax.config import ConfigError, TrainConfig, to_dict
from rynnvla_jax.convert import starting_point
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost, preemption
from rynnvla_jax.models import lora
from rynnvla_jax.models.frozen import Frozen
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.storage import lease as lease_lib
from rynnvla_jax.storage.lease import Lease
from rynnvla_jax.storage.logs import Logs, kept_in
from rynnvla_jax.train import assets as assets_lib
from rynnvla_jax.train import evaluation, finetune, hub_pins, lowering
from rynnvla_jax.train.bad_batches import BadBatches, LeftOutBatches
from rynnvla_jax.train.codes_ahead import encode_ahead
from rynnvla_jax.train.compiler_options import use_compilation_cache
from rynnvla_jax.train.metrics import Heartbeat, check_wandb
from rynnvla_jax.train.monitor import Progress, announce, follows
from rynnvla_jax.train.optimizer import check_continues
from rynnvla_jax.train.profiler import Profiler
from rynnvla_jax.train.stages import OBJECTIVES, Objective
from rynnvla_jax.train.step import TrainState, abstract_state, fresh_state, make_now, make_step, with_counts
from rynnvla_jax.train.watchdog import Watchdog


def train(config: TrainConfig, workdir: str | Path) -> dict[str, float]:
    """Runs one stage to `config.total_steps`, continuing whatever `workdir` already holds.

    With several processes (call `distributed.initialize` first) all must call this with the same arguments, and
    `workdir` must be in a gs:// bucket or on a shared file system.

    Returns:
      The last logged metrics.

    Raises:
      ConfigError, CheckpointError, DataError, LeaseError: before the first step where possible.
      PeerError: one of these errors on another process.
      FloatingPointError: loss or gradient is not finite even after batches were left out.
      Preempted: after SIGTERM; the state is saved.
    """
    workdir = files.place(workdir).absolute()
    multihost.first(lambda: assets_lib.check_buckets(config, workdir))
    multihost.first(lambda: assets_lib.check_workdir(workdir, config.compilation_cache))
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.watchdog_seconds, workdir / f"stacks-{jax.process_index()}.txt"))
        lease = hold_workdir(config, workdir, stack)
        logs = stack.enter_context(kept_in(workdir)) if multihost.primary() else None
        return watched(config, workdir, watchdog, lease, logs)


def hold_workdir(config: TrainConfig, workdir: Path, stack: contextlib.ExitStack) -> Lease | None:
    """The lease of process 0, until `stack` closes; None where there is nothing to do, and on other processes.

    Raises LeaseError when another run holds the work dir, ConfigError when it cannot be written.
    """
    held: list[Lease] = []

    def take() -> None:
        if (reader.steps(workdir) or [0])[-1] >= config.total_steps:
            return
        try:
            held.append(stack.enter_context(lease_lib.hold(workdir, "training in", multihost.say)))
        except OSError as error:
            raise ConfigError(f"--workdir {workdir} cannot be created: {error}; use another directory") from None

    multihost.first(take)
    return held[0] if held else None


def watched(
    config: TrainConfig, workdir: Path, watchdog: Watchdog, lease: Lease | None, logs: Logs | None
) -> dict[str, float]:
    """`train` while `watchdog` knows the phases; process 0 has `logs`."""
    stage, objective = STAGES[config.stage], OBJECTIVES[config.stage]
    use_compilation_cache(config.compilation_cache, workdir)
    mesh = mesh_lib.make_mesh(config.mesh)
    check_batch(config, mesh)
    check_wandb(config)
    config, commits = hub_pins.pin(config, workdir)
    config, assets = assets_lib.prepare(config, workdir)
    abstract, graphdef, optimizer = abstract_state(config, objective, mesh)
    base = finetune.abstract_params(config, objective, mesh)[2]
    multihost.together(lambda: check_start(config, abstract, base, workdir))
    multihost.together(lambda: evaluation.check_keep_best(config, objective, graphdef, abstract, mesh))
    loader = assets_lib.make_loader(config, assets, mesh)
    evaluated = (
        multihost.together(lambda: evaluation.open_evaluated(config, loader.splits)) if config.evaluation.on else []
    )
    attempt = provenance.describe_run(config, loader.opened, commits)
    multihost.first(lambda: list(map(multihost.say, provenance.changes(workdir, attempt))))
    multihost.first(lambda: list(map(multihost.say, assets_lib.rate_warnings(assets.frozen, loader.sources))))
    seen = functools.partial(assets_lib.seen_warnings, config, assets.frozen, fresh=not reader.steps(workdir))
    multihost.first(lambda: list(map(multihost.say, seen())))
    left_out = LeftOutBatches(workdir, config.max_skipped_in_a_row, config.batch_size)
    if logs and (reader.steps(workdir) or [0])[-1] < config.total_steps:
        watchdog.heartbeat = Heartbeat(logs.folder)
    with watchdog.phase("compile"):
        step = lowering.compile_fitting(config, mesh, loader.frame_size)
    step = step or make_step(config, objective, graphdef, optimizer, abstract)
    assets = dataclasses.replace(assets, statistics=loader.statistics)
    examples = evaluation.make_loader(config, assets, mesh, evaluated) if evaluated else None
    if stage.tokens and config.data.frame_codes == "ahead":  # takes hours, so all else is checked before
        whole = loader.opened + [source for source, _ in evaluated if source.whole is None]
        with watchdog.phase("encode"):
            stores = encode_ahead(config.data, assets.frozen["vqgan"], whole, workdir)
        loader = assets_lib.make_loader(config, assets, mesh, loader.opened, stores[: len(loader.opened)])
        if evaluated:
            examples = evaluation.make_loader(config, assets, mesh, evaluated, list(zip(whole, stores, strict=True)))
    items = {"run": provenance.of_checkpoint(attempt), "config": to_dict(config)}
    base_folder = Path()
    if config.finetune.on:
        with watchdog.phase("restore"):
            base, description, base_folder = multihost.together(lambda: finetune.load_base(config, base, workdir))
        items["base"] = base_lib.to_json(description)
    may_write = lease.check if lease else lambda: None
    checkpoints = manager.Checkpointer(workdir, config.checkpoint, items, watchdog.phase, may_write)
    with jax.set_mesh(mesh), preemption.Notice(mesh) as notice:
        vocabulary = assets.tokenizer.vocabulary if assets.tokenizer else None
        with watchdog.phase("restore"):
            frozen = multihost.replicate(model_dir.load_frozen(assets.frozen, vocabulary), mesh_lib.replicated(mesh))
            frozen = dataclasses.replace(frozen, base=base or None)
            state = load_state(config, objective, abstract, optimizer, checkpoints, left_out, frozen)
        mesh_lib.check_placed(state.params, abstract.params)
        # Only now: a command that is refused, or has nothing to do, changes nothing.
        if state.step < config.total_steps:
            multihost.first(lambda: provenance.record_attempt(workdir, attempt))
            multihost.first(lambda: assets_lib.write(config, workdir, loader.statistics))
            if config.finetune.on:
                multihost.first(lambda: base_lib.record_path(workdir, base_folder))
        saved = model_dir.stored_config(workdir) if state.step else None
        if saved and state.step < config.total_steps:
            example = first_example(left_out.position(state.step), left_out.spans)
            told = follows(saved, config, state.step, example)
            multihost.first(lambda: list(map(multihost.say, told)))
        announce(config, mesh, state, loader, workdir, examples, frozen.base)
        evaluator = None
        if examples and state.step < config.total_steps:
            with watchdog.phase("evaluate"):
                evaluator = evaluation.Evaluator(config, objective, mesh, graphdef, frozen, examples)
        logged: dict[str, float] = {}
        while state.step < config.total_steps:
            try:
                # fmt: off
                logged = run(
                    config, mesh, checkpoints, step, state, frozen, loader, evaluator, left_out, notice, workdir,
                    watchdog, logs,
                )
                # fmt: on
                break
            except BadBatches:
                left_out.leave_out()
            with watchdog.phase("restore"):
                state = load_state(config, objective, abstract, optimizer, checkpoints, left_out, frozen)
    with watchdog.phase("final wait"):
        checkpoints.close()
    return logged


def check_batch(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError when a micro-batch does not divide over the mesh."""
    shards, micro = mesh_lib.batch_shards(mesh), config.batch_size // config.optimizer.accumulation
    if micro % shards:
        raise ConfigError(
            f"config.batch_size {config.batch_size} / optimizer.accumulation {config.optimizer.accumulation} = {micro} "
            f"is not a multiple of the {shards} batch shards of the mesh (replica x data x fsdp)"
        )


def check_start(config: TrainConfig, abstract: TrainState, base: dict[str, Any], workdir: Path) -> None:
    """Raises CheckpointError when a fresh run's `config.init_from` does not fit the model, ConfigError when the
    optimizer is not the one that the work dir has saved the state of; reads no weights."""
    saved = model_dir.stored_config(workdir)
    if saved and reader.steps(workdir)[-1] < config.total_steps:
        check_continues(saved.optimizer, config.optimizer, workdir)
    start = config.init_from
    if start.path and not reader.steps(workdir):
        folder = starting_point.model_dir(start.path, start.step, start.weights)
        stored = model_dir.stored_shapes(folder, reader.find_step(folder, start.step), start.weights)
        finetune.check_start(config, abstract.params, base, stored)


def load_state(
    config: TrainConfig,
    objective: Objective,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    checkpoints: manager.Checkpointer,
    left_out: LeftOutBatches,
    frozen: Frozen,
) -> TrainState:
    """The newest checkpoint of the work dir, else step 0 with the weights of `config.init_from`."""
    latest = checkpoints.latest()
    if latest is not None:
        train_state = {"opt_state": abstract.opt_state}
        params, train_state, data = checkpoints.restore(latest, abstract.params, train_state)
        left_out.resume(data)
        return TrainState(params, train_state["opt_state"], data["step"])
    left_out.resume({})
    loaded: dict[str, Any] = {}
    start = config.init_from
    if start.path:
        loaded, fresh = model_dir.load_params(
            starting_point.model_dir(start.path, start.step, start.weights),
            abstract.params,
            step=start.step,
            new=(*start.new, lora.PATHS) if config.finetune.on else start.new,
            weights=start.weights,
            part=config.finetune.on,
        )
        average = "average of the " if start.weights == "ema" else ""
        multihost.say(f"{average}weights from {start.path}; randomly initialised: {', '.join(fresh) or 'none'}")
    return fresh_state(config, objective, abstract, optimizer, loaded, frozen)


def run(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: manager.Checkpointer,
    step_fn,
    state: TrainState,
    frozen: Frozen,
    loader: Loader,
    evaluator: evaluation.Evaluator | None,
    left_out: LeftOutBatches,
    notice: preemption.Notice,
    workdir: Path,
    watchdog: Watchdog,
    logs: Logs | None,
) -> dict[str, float]:
    """Steps, metrics, evaluations, checkpoints, from `state` to the end. The random key of a step is a function of its
    number.

    Raises:
      BadBatches, Preempted.
    """
    sharding, now = mesh_lib.batch_sharding(mesh), make_now(config, mesh)
    params, opt_state, saved = state.params, state.opt_state, state.step
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config, mesh, workdir, logs, state.step, left_out, loader, watchdog))
        profiler = stack.enter_context(Profiler(config.profile_steps, workdir / "profile", progress))
        if evaluator and state.step and config.evaluation.due(state.step):  # perhaps it was stopped before
            checkpoints.evaluated(state.step, progress.evaluate(state.step, evaluator, params, opt_state))
        batches = stack.enter_context(
            contextlib.closing(loader.batches(state.step, left_out.positions, left_out.spans))
        )
        for step in range(state.step, config.total_steps):
            done = step + 1
            with profiler.step(done):
                with progress.waiting_for_data():
                    local = next(batches)
                batch = multihost.global_batch(local, sharding, loader.rows, config.batch_size)
                with progress.starting():
                    params, opt_state, metrics = step_fn(params, opt_state, now(np.int32(step)), frozen, batch)
                progress.started(step, metrics)
            due, leave, finished = checkpoints.due(done), notice.came(), done == config.total_steps
            if evaluator and (finished or (config.evaluation.due(done) and not leave)):  # before it is saved
                values = progress.evaluate(done, evaluator, params, opt_state)
                due |= checkpoints.evaluated(done if finished else left_out.saved_step(done), values)
            if due or leave or finished:
                # Whether the latest updates were applied decides the label and what the checkpoint says was left out.
                progress.drain()
                label = done if finished else left_out.saved_step(done)
                data = left_out.data(label) | progress.by_source.data(label)
                item = label, params, {"opt_state": with_counts(opt_state, label - done)}, data
                with progress.paused("save"):
                    if logs:
                        logs.flush()  # first: no step is saved whose lines could be lost
                    if label != saved:
                        checkpoints.save(*item)
                        saved = label
                    if leave or finished:
                        checkpoints.finish(*item)
            if leave and not finished:
                multihost.say(f"saved step {label} on SIGTERM; the same command continues")
                raise preemption.Preempted
    return progress.logged
