"""The one training loop: `rynnvla train --config configs/robot.py:tiny --workdir DIR`.

Reads top to bottom: assets, data, mesh, model, sharding, restore, step, loop. The same command resumes.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
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
from rynnvla_jax.stages import STAGES, Frozen, Stage, to_unit_range, vqgan_graph
from rynnvla_jax.step import TrainState, abstract_state, fresh_state, make_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Stage and size, for example configs/robot.py:tiny.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, assets and metrics go here; the same command resumes.")


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
        abstract, graphdef, optimizer = abstract_state(config, stage, mesh)
        state = load_state(config, stage, abstract, optimizer, manager)
        announce(config, mesh, state, loader, workdir)
        if state.step < config.total_steps:
            step = make_step(config, stage, graphdef, optimizer, abstract)
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


def load_state(
    config: TrainConfig, stage: Stage, abstract: TrainState, optimizer: optax.GradientTransformation, manager
) -> TrainState:
    """The newest checkpoint of the work dir, else step 0 with the weights of `config.init_from`."""
    latest = manager.latest_step()
    if latest is not None:
        train_state = {"opt_state": abstract.opt_state}
        params, train_state, step = checkpoint.restore(manager, latest, abstract.params, train_state)
        return TrainState(params, train_state["opt_state"], step)
    loaded: dict[str, Any] = {}
    if config.init_from.path:
        loaded, fresh = checkpoint.load_params(
            config.init_from.path, abstract.params, step=config.init_from.step, new=config.init_from.new
        )
        print(f"weights from {config.init_from.path}; new: {', '.join(fresh) or 'none'}", file=sys.stderr)
    return fresh_state(config, stage, abstract, optimizer, loaded)


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
