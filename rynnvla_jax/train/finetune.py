"""Which parameters train (`config.finetune`). The others are the base: those of `config.init_from`, an input of the
jitted step that is not differentiated. Gradients, moments, averages and checkpoints hold what trains alone.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.checkpoint import base as base_lib
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.base import BLOCKS, MATRICES, Base
from rynnvla_jax.checkpoint.manager import fingerprints
from rynnvla_jax.checkpoint.reader import CheckpointError, find_step, step_folder
from rynnvla_jax.config import ConfigError, FinetuneConfig, TrainConfig
from rynnvla_jax.convert import starting_point
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.errors import did_you_mean, listing
from rynnvla_jax.models import lora
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.train.stages import Objective

Tree = dict[str, Any]


def trains(config: FinetuneConfig, name: str) -> bool:
    """Whether the parameter of a dotted path trains."""
    patterns = (*config.train, lora.PATHS)
    return not config.on or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def split(config: FinetuneConfig, tree: Tree) -> tuple[Tree, Tree]:
    """(what trains, the base) of a nested dict of all parameters."""
    parts: tuple[Tree, Tree] = {}, {}
    for path, leaf in params_lib.flat(tree):
        *groups, name = path
        node = parts[not trains(config, ".".join(path))]
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return parts


def abstract_params(
    config: TrainConfig, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Tree, Tree, Tree]:
    """(graph definition, what trains, the base, logical axes of what trains); the middle two are `ShapeDtypeStruct`s
    with shardings. The base's matrices are in `finetune.base_dtype`.

    Raises:
      ConfigError: a dimension that the mesh does not divide, or patterns of `finetune` that do not fit the model.
    """
    model = nnx.eval_shape(lambda: objective.build(config, nnx.Rngs(config.seed)))
    graphdef, shapes = params_lib.split(model)
    axes = params_lib.axes(model)
    check_patterns(config.finetune, [".".join(path) for path, _ in params_lib.flat(shapes)])
    shardings = mesh_lib.param_shardings(axes, shapes, mesh)
    names = {".".join(path): axes for path, axes in params_lib.flat(axes)}

    def one(path, x, sharding):
        name = path_string(path)
        matrix = "embed" in names[name]  # used in the compute dtype; norms and biases are used in float32
        kept = matrix and not trains(config.finetune, name)
        dtype = jnp.dtype(config.finetune.base_dtype) if kept else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

    trained, base = split(config.finetune, jax.tree_util.tree_map_with_path(one, shapes, shardings))
    return graphdef, trained, base, split(config.finetune, axes)[0]


def check_patterns(config: FinetuneConfig, names: list[str]) -> None:
    """Raises ConfigError when a pattern of `finetune.train` matches nothing, or they leave nothing to the base."""
    own = [name for name in names if not fnmatch.fnmatchcase(name, lora.PATHS)]
    for pattern in config.train:
        if not fnmatch.filter(own, pattern):
            hint = did_you_mean(pattern, own, otherwise=f" Parameters: {listing(own, 12)}.")
            raise ConfigError(f"finetune.train: {pattern!r} matches no parameter; correct it or leave it out.{hint}")
    if config.on and all(trains(config, name) for name in own):
        raise ConfigError(
            "finetune.train matches every parameter; set finetune.train=() and finetune.lora.rank=0, which trains all"
        )
    for name in config.lora.adapted:
        matrix = BLOCKS + MATRICES[name][0]
        if trains(config, matrix):
            raise ConfigError(
                f"{matrix} would train and have an adapter as well; leave it out of finetune.train, or {name!r} out of "
                "finetune.lora.targets"
            )


def check_start(config: TrainConfig, trained: Tree, base: Tree, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the stored shapes of `init_from` with the parameters.

    Raises:
      CheckpointError: they do not fit.
      ConfigError: weights of the base would be random.
    """
    start = config.init_from
    adapters = (lora.PATHS,) if config.finetune.lora.rank else ()
    model_dir.check_tree(stored, params_lib.joined(trained, base), start.path, (*start.new, *adapters))
    names = [".".join(path) for path, _ in params_lib.flat(base)]
    if random := [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in start.new)]:
        raise ConfigError(
            f"{listing(random, 4)} would be random and stay so: config.init_from.new names them, and "
            "config.finetune.train does not; add them there, or leave them out of init_from.new"
        )


def load_base(config: TrainConfig, base: Tree, workdir: Path) -> tuple[Tree, Base, Path]:
    """Reads the base of a run onto the shardings of the abstract tree `base`, describes it for the checkpoints, and
    tells where it is.

    Raises:
      CheckpointError, ConfigError: it is not there, or not the one that the run was started from.
    """
    start, before = config.init_from, base_lib.of_run(workdir)
    try:
        folder = starting_point.model_dir(start.path, start.step, start.weights)
    except ConfigError as error:
        raise ConfigError(f"config.init_from.path, the base of {workdir}: {error}") from None
    step = find_step(folder, start.step) if before is None else before.step
    if before is not None and step not in reader.readable_steps(folder):
        raise CheckpointError(
            f"step {step} of config.init_from.path {start.path}, the base of {workdir}, is not there; set the key to "
            "where the base is now, or restore it from a copy"
        )
    loaded, _ = model_dir.load_params(folder, base, step=step, weights=start.weights, part=True)
    dtypes = {path_string(path): x.dtype.name for path, x in jax.tree_util.tree_leaves_with_path(loaded)}
    arrays = {name: (dtypes[name], number) for name, number in fingerprints(loaded).items()}
    if before is not None and (wrong := before.differences(arrays)):
        raise CheckpointError(
            f"step {step} of config.init_from.path {start.path} is not the base that {workdir} was started from: "
            f"{listing(wrong, 3)} of {len(arrays)} arrays differ; set the key to where that base is now"
        )
    digest = base_lib.files_digest(step_folder(folder, step), start.weights)
    return loaded, Base(step, start.weights, config.finetune.lora.scale, digest, arrays), folder


def whole(config: TrainConfig) -> TrainConfig:
    """The config of the same model with merged weights, all of which train."""
    return dataclasses.replace(config, finetune=FinetuneConfig())
