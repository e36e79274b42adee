"""Compiles a stage's train step for a pod that you do not have, and reports what it needs.

The TPU compiler runs on any Linux machine (`pip install 'rynnvla_jax[tpu]'` installs libtpu), and its program is the
one that the pod would run. The command is in `cli/aot.py`.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from rynnvla_jax.aot import hlo, pods
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train import flops, lowering
from rynnvla_jax.train.stages import OBJECTIVES
from rynnvla_jax.train.step import abstract_state


@dataclass(frozen=True)
class CompileReport:
    """The compiler's report of one train step; bytes and FLOPs are per chip and update.

    Unknown values are None: a program that does not fit has only its peak, one lowered for GPUs only its arguments.
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
        assert self.collective_bytes is not None and self.executed_flops is not None, "only of a program that fits"
        chip = pods.CHIPS[pods.kind(self.topology)]
        tokens = self.per_chip_batch * self.sequence
        wires = sum(self.collective_bytes.values()) / chip.wires
        return self.executed_flops / flops.PEAK_FLOPS[chip.peak] / tokens, wires / tokens


def compile_report(config: TrainConfig, topology: str, slices: int = 1) -> tuple[CompileReport, str]:
    """Compiles the train step for a pod. Returns the report, and the scheduled program ("" when it does not fit).

    Raises:
      ConfigError: unknown topology, or a mesh or batch that does not fit it.
    """
    mesh = mesh_lib.make_mesh(config.mesh, pods.pod(topology, slices))
    shards = mesh_lib.batch_shards(mesh) * config.optimizer.accumulation
    if config.batch_size % shards:
        raise ConfigError(f"batch {config.batch_size} is not a multiple of {shards} (batch shards x accumulation)")
    abstract, _, _ = abstract_state(config, OBJECTIVES[config.stage], mesh)
    chips, gpu = mesh.devices.size, pods.kind(topology) in pods.GPUS
    lowered = lowering.lower(config, mesh, platform="cuda" if gpu else None)
    started = time.monotonic()
    text, memory, needed, held = "", None, None, None
    if gpu:
        inputs = (
            abstract.params,
            abstract.opt_state,
            lowering.abstract_frozen(config, mesh),
            lowering.abstract_batch(config, mesh),
        )
        held = mesh_lib.bytes_per_device(inputs)
    else:
        try:
            compiled = lowered.compile()
            memory, text = compiled.memory_analysis(), compiled.as_text() or ""
        except jax.errors.JaxRuntimeError as error:
            needed = lowering.needed_bytes(str(error))
    traffic = hlo.collectives(text) if text else None
    tokens = config.batch_size * config.sequence.length
    report = CompileReport(
        topology=topology,
        slices=slices,
        chips=chips,
        mesh=mesh_lib.sizes(mesh),
        stage=config.stage,
        parameters=params_lib.count(abstract.params),
        batch_size=config.batch_size,
        per_chip_batch=config.batch_size / chips,
        sequence=config.sequence.length,
        remat=config.remat,
        fits=None if gpu else memory is not None,
        capacity_bytes=pods.GPUS[pods.kind(topology)] if gpu else pods.CHIPS[pods.kind(topology)].hbm,
        peak_bytes=memory.peak_memory_in_bytes if memory else needed,
        argument_bytes=memory.argument_size_in_bytes if memory else held,
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes if memory else None,
        compile_seconds=time.monotonic() - started,
        model_flops=(
            flops.training_flops(config.vla.transformer, tokens, config.sequence.length) / chips
            if STAGES[config.stage].model == "vla"
            else None
        ),
        executed_flops=hlo.dot_flops(text) if text else None,
        collective_bytes=traffic.by_kind if traffic else None,
        synchronous_collective_bytes=traffic.synchronous if traffic else None,
        dcn_bytes=traffic.dcn if traffic else None,
        largest_buffers=[dataclasses.asdict(b) for b in hlo.largest_buffers(text)] if text else [],
        overlap=hlo.overlap(text, 8) if text else [],
    )
    return report, text


def without_assets(config: TrainConfig) -> TrainConfig:
    """A config completed without assets: with the vocabulary of Chameleon."""
    transformer, stage = config.vla.transformer, STAGES[config.stage]
    if transformer.vocab_size == 0:
        transformer = dataclasses.replace(transformer, vocab_size=65540)
    state_dim = 0 if stage.tokens and not stage.state else config.vla.state_dim
    vla = dataclasses.replace(config.vla, transformer=transformer, state_dim=state_dim)
    return dataclasses.replace(config, vla=vla)


def best_fit(config: TrainConfig, topology: str, slices: int, tried: Callable[[CompileReport], None]) -> CompileReport:
    """The remat policy and batch with the lowest bound on seconds per token among those that fit.

    Policies are tried from the one that keeps most to the one that keeps least, each with batch 1 per chip, doubled
    while it fits and improves. Once computation is the bottleneck, policies that recompute more cannot be better.

    Args:
      tried: called with the report of every attempt.

    Raises:
      ConfigError: nothing fits.
    """
    chips = len(pods.pod(topology, slices))
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
