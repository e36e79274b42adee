"""Evaluates a checkpoint of a work dir on its held-out data, or on any other: `rynnvla evaluate-loss`."""

import dataclasses
from pathlib import Path

import jax

from data_pipelines import checks, held_out
from data_pipelines.sources import open_sources
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.config import ConfigError, EvaluationConfig, MeshConfig, OptimizerConfig, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost
from rynnvla_jax.train import assets as assets_lib
from rynnvla_jax.train import evaluation, finetune
from rynnvla_jax.train.evaluation import Evaluator, Weighted
from rynnvla_jax.train.stages import OBJECTIVES
from rynnvla_jax.train.step import abstract_state


def evaluate_saved(
    workdir: Path,
    step: int = -1,
    sources: tuple[str, ...] = (),
    examples: int = 0,
    mesh: MeshConfig | None = None,
    batch_size: int = 0,
    weights: str = "raw",
) -> tuple[int, dict[str, float]]:
    """(step, metrics) of a checkpoint (-1: the newest), as training logs them in eval.jsonl.

    Args:
      sources: data to evaluate on; (): what the run held out, or its `evaluation.sources`.
      examples: 0: as the run's `evaluation.examples`; `batch_size` 0: a micro-batch of the run; `mesh` None: all
        devices along fsdp.
      weights: "raw", or "ema", their average.

    Raises:
      CheckpointError, ConfigError, DataError: the checkpoint or the data cannot be used.
    """
    step = reader.find_step(workdir, step)
    config = model_dir.read_train_config(workdir)
    own = config.evaluation
    if not (sources or own.share or own.sources):
        raise ConfigError(f"{workdir} has no held-out data (config.evaluation.share was 0); name data with --source")
    wanted = EvaluationConfig(sources=sources) if sources else own
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(wanted, examples=examples or own.examples),
        mesh=mesh or MeshConfig(),
        batch_size=batch_size or config.batch_size // config.optimizer.accumulation,
        optimizer=OptimizerConfig(),
    )
    config, assets = assets_lib.load(config, workdir)
    config = finetune.whole(config)  # only now: `load` compares it with the run's
    objective, devices = OBJECTIVES[config.stage], mesh_lib.make_mesh(config.mesh)
    shards = mesh_lib.batch_shards(devices)
    config = dataclasses.replace(config, batch_size=-(-config.batch_size // shards) * shards)
    data = multihost.together(lambda: _opened(config))
    stored = [checks.tokenized_corpus(source) is not None for source, _ in data]
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, frame_codes="ahead" if any(stored) else "step")
    )
    if any(stored) and not all(stored):
        raise ConfigError("some of the data to evaluate on hold VQ codes and others frames; evaluate them one by one")
    loader = evaluation.make_loader(config, assets, devices, data)
    multihost.say(f"step {step} of {workdir}, {evaluation.extent(config.evaluation, loader)}")
    with jax.set_mesh(devices):
        abstract, graphdef, _ = abstract_state(config, objective, devices)
        vocabulary = assets.tokenizer.vocabulary if assets.tokenizer else None
        frozen = multihost.replicate(model_dir.load_frozen(assets.frozen, vocabulary), mesh_lib.replicated(devices))
        params, _ = model_dir.load_params(workdir, abstract.params, step=step, weights=weights)
        return step, Evaluator(config, objective, devices, graphdef, frozen, loader)(params)


def _opened(config: TrainConfig) -> Weighted:
    if config.evaluation.share:
        return evaluation.open_evaluated(config, held_out.split(open_sources(config), config.evaluation))
    return evaluation.open_others(config)
