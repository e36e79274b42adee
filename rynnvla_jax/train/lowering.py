"""Lowers the train step from shapes alone, and checks before anything is loaded that it fits the devices."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.vqgan import VQGAN
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train import finetune
from rynnvla_jax.train.stages import OBJECTIVES, Frozen, build_action_vae
from rynnvla_jax.train.step import abstract_now, abstract_state, make_step

GIB = 2**30


def abstract_batch(
    config: TrainConfig, mesh: jax.sharding.Mesh, frame_size: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch (`Stage.batch_spec`); frames are square unless given."""
    spec = STAGES[config.stage].batch_spec(config, frame_size)
    sharding = mesh_lib.batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for k, (shape, dtype) in spec.items()}


def abstract_frozen(config: TrainConfig, mesh: jax.sharding.Mesh) -> Frozen:
    """Shapes of the frozen models of the stage, and of the weights that do not train."""
    stage = STAGES[config.stage]
    sharding = mesh_lib.replicated(mesh)
    build = {
        "vqgan": lambda config, rngs: VQGAN(config.vqgan_model, rngs=rngs, decoder=False),
        "action_vae": build_action_vae,
    }

    def shapes(name: str):
        _, tree = params_lib.split(nnx.eval_shape(lambda: build[name](config, nnx.Rngs(0))))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    trees = {name: shapes(name) for name in stage.frozen(config)}
    if stage.tokens:
        size = config.vla.transformer.vocab_size
        trees["kinds"] = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
        trees["code_to_token"] = jax.ShapeDtypeStruct((config.vqgan_model.num_codes,), jnp.int32, sharding=sharding)
    if config.finetune.on:
        trees["base"] = finetune.abstract_params(config, OBJECTIVES[config.stage], mesh)[2]
    return Frozen(**trees)


def lower(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    frame_size: tuple[int, int] | None = None,
    platform: str | None = None,
) -> jax.stages.Lowered:
    """The train step of `config.stage`, lowered for the devices of `mesh` or for another `platform` (cuda)."""
    objective = OBJECTIVES[config.stage]
    abstract, graphdef, optimizer = abstract_state(config, objective, mesh)
    step = make_step(config, objective, graphdef, optimizer, abstract)
    frozen, batch = abstract_frozen(config, mesh), abstract_batch(config, mesh, frame_size)
    with jax.set_mesh(mesh):  # nothing may run in here: the devices may not exist
        traced = step.trace(abstract.params, abstract.opt_state, abstract_now(mesh), frozen, batch)
        return traced.lower(lowering_platforms=None if platform is None else (platform,))


def memory_limit(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a program may use on a device of this process; None where the devices report no limit (CPU)."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def compile_fitting(
    config: TrainConfig, mesh: jax.sharding.Mesh, frame_size: tuple[int, int] | None
) -> jax.stages.Compiled | None:
    """The train step compiled for the present devices, before anything is loaded; None where these have no limit.

    Raises:
      ConfigError: it does not fit; the message has a table of the memory that it needs.
    """
    limit = memory_limit(mesh)
    if limit is None:
        return None
    compiled, needed, parts = None, 0, ""
    try:
        compiled = lower(config, mesh, frame_size).compile()
        memory = compiled.memory_analysis()
        if memory is None:  # a back end that does not report it
            return compiled
        needed = memory.peak_memory_in_bytes
        parts = (
            f"  arguments     {memory.argument_size_in_bytes / GIB:8.2f} GiB (weights, moments, frozen models, batch)\n"
            f"  temporaries   {memory.temp_size_in_bytes / GIB:8.2f} GiB (activations, gradients)\n"
        )
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
    if needed <= limit:
        return compiled
    raise ConfigError(
        f"the train step does not fit a {mesh.devices.flat[0].device_kind}:\n{parts}"
        f"  needed        {needed / GIB:8.2f} GiB\n  available     {limit / GIB:8.2f} GiB\n"
        f"with config.batch_size={config.batch_size} on mesh {mesh_lib.axes_line(mesh)}, "
        f"sequence.length={config.sequence.length}, remat={config.remat}. Use a smaller batch_size or "
        "optimizer.accumulation, remat=full or offload, optimizer.offload, or more devices; `rynnvla aot --fit` "
        "searches for a setting that fits"
    )


def needed_bytes(message: str) -> int:
    """HBM that the compiler says a program would need.

    Raises:
      RuntimeError: the compiler failed for another reason.
    """
    found = re.search(
        r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)", message
    )
    if not found:
        raise RuntimeError(f"the compiler failed: {message}")
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
