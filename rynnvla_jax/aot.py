"""Compile a stage's train step for a pod you do not have, and say what it needs.

The TPU compiler runs on any machine (`pip install 'rynnvla_jax[tpu]'` brings libtpu); what it says of memory and of
communication is what the pod will do. The command is in `aot_cli.py`.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from rynnvla_jax import flops, hlo, sharding
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.vqgan import VQGAN
from rynnvla_jax.stages import STAGES, Frozen, Stage, build_action_vae
from rynnvla_jax.step import abstract_state, make_step

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Source: HBM is what libtpu 0.0.42 names when a program does not fit; rates are Google's published ones."""

    topology: str  # the compiler's name of the generation
    peak: str  # its key in `flops.PEAK_FLOPS`
    hbm: float  # bytes a program may use
    wires: float  # bytes/s a chip sends to its neighbours, all links


CHIPS = {
    "v4": Chip("v4", "TPU v4", 31.75 * GIB, 300e9),
    "v5e": Chip("v5e", "TPU v5e", 15.75 * GIB, 200e9),
    "v5p": Chip("v5", "TPU v5p", 95.74 * GIB, 600e9),
    "v6e": Chip("v6e", "TPU v6", 31.25 * GIB, 448e9),
}
GPUS = {"a100": 80 * GIB, "h100": 80 * GIB, "h200": 141 * GIB}  # memory as sold; lowered, never compiled


@dataclass(frozen=True)
class Report:
    """What the compiler says of one train step; bytes and FLOPs are of one chip and one update.

    None is what nobody said: a program that does not fit has only its peak, one lowered for GPUs only its arguments.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    stage: str
    parameters: int
    batch_size: int
    per_chip_batch: float
    sequence: int
    remat: str
    fits: bool | None
    capacity_bytes: float
    peak_bytes: int | None
    argument_bytes: int | None
    temp_bytes: int | None
    host_bytes: int | None
    compile_seconds: float
    model_flops: float | None  # by formula (`flops.training_flops`); None: the stage has no transformer
    executed_flops: float | None  # products in the program, recomputation included, Pallas kernels not
    collective_bytes: dict[str, float] | None
    synchronous_collective_bytes: dict[str, float] | None
    dcn_bytes: float | None
    largest_buffers: list[dict[str, Any]]
    overlap: list[str]

    @property
    def seconds_per_token(self) -> tuple[float, float]:
        """Lower bounds by which settings are compared: products at peak rate, and bytes at the full rate of the wires.

        Kernels of attention are in neither.
        """
        chip = CHIPS[kind(self.topology)]
        tokens = self.per_chip_batch * self.sequence
        wires = sum(self.collective_bytes.values()) / chip.wires
        return self.executed_flops / flops.PEAK_FLOPS[chip.peak] / tokens, wires / tokens


def kind(topology: str) -> str:
    """v5e of v5e:4x4."""
    return topology.partition(":")[0]


def pod(topology: str, slices: int = 1) -> list[Any]:
    """Devices of a pod that is not there, for example v5e:16x16 or v5p:4x4x4; all slices.

    Raises:
      ConfigError: libtpu is missing, it does not know the topology, or `slices` is no number of them.
    """
    if slices < 1:
        raise ConfigError(f"--slices is {slices}; it must be at least 1")
    name, _, shape = topology.partition(":")
    if name in GPUS and shape.isdigit():
        if slices != 1:
            raise ConfigError(f"--slices is of TPU pods; topology {topology!r} says how many GPUs there are")
        if len(jax.devices()) < int(shape):
            raise ConfigError(
                f"topology {topology!r} needs {shape} virtual devices: --xla_force_host_platform_device_count"
            )
        return jax.devices()[: int(shape)]
    if name not in CHIPS or not shape:
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"topology {topology!r} is not KIND:AxB or KIND:AxBxC with KIND one of {known}, nor GPU:COUNT with one of "
            f"{', '.join(GPUS)}"
        )
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{CHIPS[name].topology}:{shape}", **options)
    except Exception as error:  # libtpu's errors have no common type
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"topology {topology!r}: {reason} (is libtpu installed? pip install 'rynnvla_jax[tpu]')"
        ) from error
    return list(found.devices)


def abstract_batch(
    config: TrainConfig, mesh: jax.sharding.Mesh, frame_size: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch as `data_pipelines.loader.Loader` yields it; frames are square unless given."""
    c, B = config, config.batch_size
    T, S = c.sequence.num_frames * c.sequence.clips, c.sequence.length
    C, A = c.data.chunk, c.vla.state_dim if c.vla.actions == "raw" else c.action_vae_model.action_dim
    frame = (*(frame_size or (c.data.image.shortest_edge,) * 2), 3)
    if c.stage == "vqgan":
        shapes = {"images": ((B, *frame), np.uint8)}
    elif c.stage == "action_vae":
        shapes = {"actions": ((B, C, A), np.float32), "actions_pad": ((B, C), bool)}
    else:
        shapes = {"tokens": ((B, S), np.int32), "loss_mask": ((B, S), bool)}
        if c.sequence.clips > 1:
            shapes |= {name: ((B, S), np.int32) for name in ("positions", "segments")}
        if c.data.frame_codes == "step":
            views = ("front", "wrist") if c.sequence.use_wrist_frame else ("front",)
            shapes |= {view: ((B, T, *frame), np.uint8) for view in views}
    if c.stage in ("trajectory", "robot"):
        shapes |= {"state": ((B, T, c.vla.state_dim), np.float32), "actions": ((B, T, C, A), np.float32)}
        shapes |= {"actions_pad": ((B, T, C), bool)}
        shapes |= {name: ((B, T), np.int32) for name in ("state_positions", "action_positions")}
    place = sharding.batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for k, (shape, dtype) in shapes.items()}


def abstract_frozen(config: TrainConfig, stage: Stage, mesh: jax.sharding.Mesh) -> Frozen:
    """Shapes of the frozen models of a stage."""
    place = sharding.replicated(mesh)
    build = {
        "vqgan": lambda config, rngs: VQGAN(config.vqgan_model, rngs=rngs, decoder=False),
        "action_vae": build_action_vae,
    }

    def shapes(name: str):
        _, tree = params_lib.split(nnx.eval_shape(lambda: build[name](config, nnx.Rngs(0))))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    trees = {name: shapes(name) for name in stage.frozen(config)}
    if stage.kind == "vla":
        trees["code_to_token"] = jax.ShapeDtypeStruct((config.vqgan_model.num_codes,), jnp.int32, sharding=place)
    return Frozen(**trees)


def lower(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    frame_size: tuple[int, int] | None = None,
    platform: str | None = None,
) -> jax.stages.Lowered:
    """The actual train step of `config.stage`, lowered for the devices of `mesh` or for another `platform` (cuda)."""
    stage = STAGES[config.stage]
    abstract, graphdef, optimizer = abstract_state(config, stage, mesh)
    step = make_step(config, stage, graphdef, optimizer, abstract)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    frozen, batch = abstract_frozen(config, stage, mesh), abstract_batch(config, mesh, frame_size)
    with jax.set_mesh(mesh):  # nothing may run in here: the devices may not exist
        traced = step.trace(abstract.params, abstract.opt_state, number, frozen, batch)
        return traced.lower(lowering_platforms=None if platform is None else (platform,))


def memory_limit(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes a program may use on a device of this process; None where the devices do not say (CPU)."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def compile_fitting(
    config: TrainConfig, mesh: jax.sharding.Mesh, frame_size: tuple[int, int] | None
) -> jax.stages.Compiled | None:
    """The train step compiled for the devices at hand, before anything is loaded; None where these have no limit.

    Raises:
      ConfigError: it would not fit; with a table of what it needs.
    """
    limit = memory_limit(mesh)
    if limit is None:
        return None
    compiled, needed, parts = None, 0, ""
    try:
        compiled = lower(config, mesh, frame_size).compile()
        memory = compiled.memory_analysis()
        needed = memory.peak_memory_in_bytes
        parts = (
            f"  arguments     {memory.argument_size_in_bytes / GIB:8.2f} GiB (weights, moments, frozen models, batch)\n"
            f"  temporaries   {memory.temp_size_in_bytes / GIB:8.2f} GiB (activations, gradients)\n"
        )
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
    if needed <= limit:
        return compiled
    axes = ", ".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1) or "one device"
    raise ConfigError(
        f"the train step does not fit a {mesh.devices.flat[0].device_kind}:\n{parts}"
        f"  needed        {needed / GIB:8.2f} GiB\n  there is      {limit / GIB:8.2f} GiB\n"
        f"with config.batch_size={config.batch_size} on mesh {axes}, sequence.length={config.sequence.length}, "
        f"remat={config.remat}. Use a smaller batch_size or optimizer.accumulation, remat=full or offload, "
        "optimizer.offload, or more devices; `rynnvla aot --fit` searches"
    )


def compile_report(config: TrainConfig, topology: str, slices: int = 1) -> tuple[Report, str]:
    """Compiles the train step for a pod. Returns what it needs, and the scheduled program ("" when it does not fit).

    Raises:
      ConfigError: unknown topology, or a mesh or batch that does not go with it.
    """
    mesh = sharding.make_mesh(config.mesh, pod(topology, slices))
    shards = sharding.batch_shards(mesh) * config.optimizer.accumulation
    if config.batch_size % shards:
        raise ConfigError(f"batch {config.batch_size} is not a multiple of {shards} (batch shards x accumulation)")
    abstract, _, _ = abstract_state(config, STAGES[config.stage], mesh)
    chips, gpu = mesh.devices.size, kind(topology) in GPUS
    lowered = lower(config, mesh, platform="cuda" if gpu else None)
    started = time.monotonic()
    text, memory, needed, held = "", None, None, None
    if gpu:
        stage = STAGES[config.stage]
        inputs = abstract.params, abstract.opt_state, abstract_frozen(config, stage, mesh), abstract_batch(config, mesh)
        held = sharding.bytes_per_device(inputs)
    else:
        try:
            compiled = lowered.compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
    traffic = hlo.collectives(text) if text else None
    tokens = config.batch_size * config.sequence.length
    report = Report(
        topology=topology,
        slices=slices,
        chips=chips,
        mesh=dict(mesh.shape),
        stage=config.stage,
        parameters=params_lib.count(abstract.params),
        batch_size=config.batch_size,
        per_chip_batch=config.batch_size / chips,
        sequence=config.sequence.length,
        remat=config.remat,
        fits=None if gpu else memory is not None,
        capacity_bytes=GPUS[kind(topology)] if gpu else CHIPS[kind(topology)].hbm,
        peak_bytes=memory.peak_memory_in_bytes if memory else needed,
        argument_bytes=memory.argument_size_in_bytes if memory else held,
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes if memory else None,
        compile_seconds=time.monotonic() - started,
        model_flops=(
            flops.training_flops(config.vla.transformer, tokens, config.sequence.length) / chips
            if STAGES[config.stage].kind == "vla"
            else None
        ),
        executed_flops=hlo.dot_flops(text) if text else None,
        collective_bytes=traffic.by_kind if traffic else None,
        synchronous_collective_bytes=traffic.synchronous if traffic else None,
        dcn_bytes=traffic.dcn if traffic else None,
        largest_buffers=[b._asdict() for b in hlo.largest_buffers(text)] if text else [],
        overlap=hlo.overlap(text, 8) if text else [],
    )
    return report, text


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


def best_fit(config: TrainConfig, topology: str, slices: int, tried: Callable[[Report], None]) -> Report:
    """The remat policy and batch with the lowest bound on seconds a token among those that fit.

    Policies go from the one that keeps most to the one that keeps least, each with batch 1 a chip, doubled while it
    fits and pays. Once the products, not the wires, set the pace, policies that compute more cannot be better.

    Args:
      tried: is told of every attempt.

    Raises:
      ConfigError: nothing fits.
    """
    chips = len(pod(topology, slices))
    best = None
    for remat in ("projections", "attention", "full", "offload"):
        before = None
        for batch in (1, 2, 4, 8, 16, 32, 64):
            setting = dataclasses.replace(config, remat=remat, batch_size=batch * chips)
            report, _ = compile_report(setting, topology, slices)
            tried(report)
            if not report.fits:
                break
            if best is None or max(report.seconds_per_token) < max(best.seconds_per_token):
                best = report
            if before and max(report.seconds_per_token) > 0.99 * max(before.seconds_per_token):
                break
            before = report
        if best and best.seconds_per_token[0] > best.seconds_per_token[1]:
            return best
    if best is None:
        raise ConfigError(
            f"nothing fits {topology}: use more chips, mesh.sequence or mesh.tensor, or shorter sequences"
        )
    return best
