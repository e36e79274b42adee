"""The one training loop: `rynnvla train --config configs/robot.py:tiny --workdir DIR`.

Reads top to bottom: assets, data, mesh, model, sharding, restore, step, loop. The same command resumes.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from etils import epath
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

import rynnvla_jax
from rynnvla_jax import assets as assets_lib
from rynnvla_jax import checkpoint, sharding
from rynnvla_jax.assets import VLA_STAGES, Assets
from rynnvla_jax.config import ConfigError, TrainConfig, from_dict
from rynnvla_jax.metrics import Clock, MetricsWriter
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.optimizer import make_optimizer, schedule
from rynnvla_jax.stages import STAGES, Frozen, Stage, to_unit_range, vqgan_graph

_CONFIG = config_flags.DEFINE_config_file("config", None, "Stage and size, for example configs/robot.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, assets and metrics go here; the same command resumes.")


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds."""

    params: dict[str, Any]
    opt_state: Any
    step: int


def train(config: TrainConfig, workdir: str | Path) -> dict[str, float]:
    """Runs one stage to `config.total_steps`, continuing whatever `workdir` already holds.

    Returns:
      The last logged metrics.

    Raises:
      ConfigError, CheckpointError, DataError: before the first step wherever it can be known.
    """
    workdir = Path(workdir).absolute()
    stage = STAGES[config.stage]
    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh)
    config, assets = assets_lib.prepare(config, stage, workdir)
    loader = make_loader(config, assets, workdir)
    assets_lib.write(config, stage, workdir, loader.statistics)
    manager = checkpoint.manager(str(workdir), config.checkpoint)
    with jax.set_mesh(mesh):
        frozen = load_frozen(assets, mesh)
        state, graphdef, optimizer = make_state(config, stage, mesh, manager)
        announce(config, mesh, state, loader, workdir)
        if state.step < config.total_steps:
            step = make_step(config, stage, graphdef, optimizer, state)
            metrics = run(config, mesh, manager, step, state, frozen, loader.batches(state.step), workdir)
        else:
            print(f"{workdir} is finished: step {state.step} of {config.total_steps}", file=sys.stderr)
            metrics = {}
    manager.close()
    return metrics


def check_batch(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError when a micro-batch does not divide over the mesh."""
    shards, micro = sharding.batch_shards(mesh), config.batch_size // config.optimizer.accumulation
    if micro % shards:
        raise ConfigError(
            f"config.batch_size {config.batch_size} / optimizer.accumulation {config.optimizer.accumulation} = {micro} "
            f"is not a multiple of the {shards} batch shards of the mesh (data x fsdp)"
        )


def make_loader(config: TrainConfig, assets: Assets, workdir: Path):
    """The data of this process; frames are encoded first when `data.frame_codes` is 'ahead'."""
    from data_pipelines.loader import Loader, open_episodes

    episodes = open_episodes(config)
    codes = None
    if config.stage in VLA_STAGES and config.data.frame_codes == "ahead":
        codes = encode_ahead(config, assets, episodes, workdir)
    return Loader(
        config,
        tokenizer=assets.tokenizer,
        statistics=assets.statistics,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        codes=codes,
        episodes=episodes,
    )


def load_frozen(assets: Assets, mesh: jax.sharding.Mesh) -> Frozen:
    """Frozen models, replicated over the mesh."""
    trees = {name: checkpoint.load_params(path)[0] for name, path in assets.frozen.items()}
    if assets.tokenizer is not None:
        trees["code_to_token"] = assets.tokenizer.vocabulary.code_to_token.astype(np.int32)
    return jax.device_put(Frozen(**trees), sharding.replicated(mesh))


def make_state(
    config: TrainConfig, stage: Stage, mesh: jax.sharding.Mesh, manager
) -> tuple[TrainState, nnx.GraphDef, optax.GradientTransformation]:
    """A fresh, inherited or resumed state, every array created on its own shards."""

    def build() -> nnx.Module:
        return stage.build(config, nnx.Rngs(config.seed))

    abstract_model = nnx.eval_shape(build)
    graphdef, shapes = params_lib.split(abstract_model)
    shardings = sharding.param_shardings(params_lib.axes(abstract_model), shapes, mesh)
    optimizer = make_optimizer(config.optimizer, config.total_steps, stage.untrained)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        opt_shapes,
        shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )

    def abstract(tree, places):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    latest = manager.latest_step()
    if latest is not None:
        params, train_state, step = checkpoint.restore(
            manager, latest, abstract(shapes, shardings), {"opt_state": abstract(opt_shapes, opt_shardings)}
        )
        return TrainState(params, train_state["opt_state"], step), graphdef, optimizer

    loaded: dict[str, Any] = {}
    if config.init_from.path:
        loaded, fresh = checkpoint.load_params(
            config.init_from.path,
            abstract(shapes, shardings),
            step=config.init_from.step,
            new=config.init_from.new,
        )
        print(f"weights from {config.init_from.path}; new: {', '.join(fresh) or 'none'}", file=sys.stderr)
    # Only what is new is drawn: the compiler drops the rest, so nothing is ever held twice.
    drawn = jax.jit(lambda: without(params_lib.split(build())[1], loaded), out_shardings=without(shardings, loaded))()
    params = merged(shapes, drawn, loaded)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    return TrainState(params, opt_state, 0), graphdef, optimizer


def without(tree: dict[str, Any], drop: dict[str, Any]) -> dict[str, Any]:
    """`tree` less the leaves that `drop` has."""
    return {
        k: without(v, drop.get(k, {})) if isinstance(v, dict) else v
        for k, v in tree.items()
        if isinstance(v, dict) or k not in drop
    }


def merged(tree: dict[str, Any], *sources: dict[str, Any]) -> dict[str, Any]:
    """A tree of the shape of `tree`, every leaf from the one source that has it."""
    return {
        k: merged(v, *(s.get(k, {}) for s in sources)) if isinstance(v, dict) else next(s[k] for s in sources if k in s)
        for k, v in tree.items()
    }


def make_step(config: TrainConfig, stage: Stage, graphdef: nnx.GraphDef, optimizer, state: TrainState):
    """The jitted update: (params, opt_state, step, frozen, batch) -> (params, opt_state, metrics)."""
    rate = schedule(config.optimizer, config.total_steps)

    def update(params, opt_state, step, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        grads, metrics = gradients(config, stage, graphdef, params, frozen, batch, key)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["learning_rate"] = rate(step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    places = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
    return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*places, None))


def gradients(config: TrainConfig, stage: Stage, graphdef: nnx.GraphDef, params, frozen: Frozen, batch, key):
    """Gradient and metrics of a whole batch, in `optimizer.accumulation` micro-batches.

    Losses are divided by the counts of the whole batch, so micro-batches add up to the exact mean.
    """
    counts = stage.counts(batch)

    def loss(params, micro, key):
        total, metrics = stage.loss(nnx.merge(graphdef, params), frozen, micro, counts, key, config)
        return total, {"loss": total, **metrics}

    grad = jax.grad(loss, has_aux=True)
    parts = config.optimizer.accumulation
    if parts == 1:
        return grad(params, batch, key)

    def cut(x):  # every shard keeps its own rows
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def body(total, piece):
        micro, index = piece
        return jax.tree.map(jnp.add, total, grad(params, micro, jax.random.fold_in(key, index))), None

    micro = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro), key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zero, (micro, jnp.arange(parts)))[0]


def run(config: TrainConfig, mesh, manager, step_fn, state: TrainState, frozen, batches: Iterator, workdir: Path):
    """Steps, metrics, checkpoints."""
    primary = jax.process_index() == 0
    writer = MetricsWriter(workdir, state.step) if primary else None
    place = sharding.batch_sharding(mesh)
    clock = Clock(config)
    params, opt_state, logged = state.params, state.opt_state, {}
    bar = tqdm(
        total=config.total_steps,
        initial=state.step,
        desc=config.stage,
        unit="step",
        disable=not primary,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    for step in range(state.step, config.total_steps):
        with clock.waiting_for_data():
            batch = next(batches)
        tokens = batch["tokens"].size * jax.process_count() if "tokens" in batch else 0
        batch = {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}
        params, opt_state, metrics = step_fn(params, opt_state, jnp.int32(step), frozen, batch)
        clock.tick(tokens)
        done = step + 1
        if done % config.log_every == 0 or done == config.total_steps:
            logged = {k: float(v) for k, v in sorted(metrics.items())}
            if writer:
                writer.write(done, logged, clock.read())
            bar.set_postfix(loss=f"{logged['loss']:.4f}", refresh=False)
        bar.update()
        if done % config.checkpoint.every_steps == 0 or done == config.total_steps:
            checkpoint.save(manager, done, params, {"opt_state": opt_state})
    bar.close()
    manager.wait_until_finished()
    return logged


def encode_ahead(config: TrainConfig, assets: Assets, episodes: list, workdir: Path):
    """VQ codes of every frame, made once and kept in `workdir/codes`; a restart continues or reuses them."""
    from data_pipelines.codes import encode_all

    params, _ = checkpoint.load_params(assets.frozen["vqgan"])
    graphdef = vqgan_graph(config)
    encode = jax.jit(lambda params, pixels: nnx.merge(graphdef, params).codes(to_unit_range(pixels)))
    fingerprint = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()
    return encode_all(
        episodes, lambda pixels: encode(params, pixels), config.data.image, workdir / "codes", fingerprint
    )


def announce(config: TrainConfig, mesh, state: TrainState, loader, workdir: Path) -> None:
    """Says what will happen, once."""
    if jax.process_index():
        return
    size = params_lib.count(state.params)
    held = sharding.bytes_per_device((state.params, state.opt_state)) / 2**20
    axes = " ".join(f"{k}={v}" for k, v in mesh.shape.items())
    start = f"resuming at step {state.step}" if state.step else "starting"
    lines = [
        f"rynnvla_jax {rynnvla_jax.__version__}: stage {config.stage}, {start}, {config.total_steps} steps "
        f"of {config.batch_size} examples",
        f"  devices    {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es), "
        f"mesh {axes}",
        f"  parameters {size / 1e6:.2f} M, {held:.1f} MiB of weights and optimizer state a device, "
        f"compute {config.compute_dtype}, remat {config.remat}",
        f"  data       {loader.describe()}",
        f"  writes     {workdir}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    machine = json.dumps({"devices": lines[1].removeprefix("  devices    ")})
    checkpoint.write_text(epath.Path(workdir / "assets" / "machine.json"), machine)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    for name in ("config", "workdir"):
        if flags.FLAGS[name].value is None:
            example = "rynnvla train --config configs/robot.py:tiny --workdir runs/robot"
            raise app.UsageError(f"--{name} is required, for example: {example}")
    logging.set_verbosity(logging.ERROR)  # Orbax and Grain talk a lot
    from data_pipelines.episode import DataError

    try:
        train(from_dict(TrainConfig, _CONFIG.value.to_dict()), _WORKDIR.value)
    except (ConfigError, DataError, checkpoint.CheckpointError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def help_text() -> str:
    """What `rynnvla train --help` prints."""

    def lines(config: Any, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from lines(value, f"{prefix}.{field.name}")
            else:
                yield f"  --{prefix}.{field.name}={value!r}"

    return "\n".join(
        [
            "usage: rynnvla train --config FILE[:SIZE] --workdir DIR [--config.KEY=VALUE ...]",
            "",
            "Trains one stage on all devices; the same command continues after any interruption.",
            "",
            "  --config   configs/{action_vae,vqgan}.py:{tiny,full} or",
            "             configs/{video,trajectory,robot}.py:{tiny,1b,7b,34b}",
            "  --workdir  checkpoints, assets, metrics.jsonl, timing.jsonl and TensorBoard files go here",
            "",
            "Every key of a config can be overridden. The keys, with their defaults before a config file sets its own:",
            *lines(TrainConfig(stage="robot"), "config"),
        ]
    )


def command_line(argv: list[str]) -> None:
    """`rynnvla train` and `python -m rynnvla_jax.train`."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    sys.argv = ["rynnvla train", *argv]  # ml_collections reads overrides from sys.argv
    app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parsing, with one line instead of a trace for a key or value that the config does not take."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError, flags.Error) as error:
        lines = str(error).replace("\\n", " ").strip().splitlines()
        message = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 else lines[0]  # between them: a trace
        sys.exit(f"rynnvla train: {type(error).__name__}: {message}. `rynnvla train --help` lists the keys")


if __name__ == "__main__":
    command_line(sys.argv[1:])
