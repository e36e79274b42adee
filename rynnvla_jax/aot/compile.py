"""Compiles a stage's train step for a pod that you do not have, and reports what it needs.

The TPU compiler runs on any Linux machine (`pip install 'rynnvla_jax[tpu]'` installs libtpu), and its program is the
one that the pod would run. The command is in `cli/aot.py`.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rynnvla_jax.aot import estimate as timing
from rynnvla_jax.aot import hlo, pods
from rynnvla_jax.aot import schedule as scheduling
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.errors import shorten
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train import flops, lowering
from rynnvla_jax.train.stages import OBJECTIVES
from rynnvla_jax.train.step import abstract_state


@dataclass(frozen=True)
class CompileReport:
    """The compiler's report of one train step; bytes and FLOPs are per chip and update.

    Unknown values are None: a program that does not fit has only its peak, one lowered for GPUs only its arguments, and
    one that is only scheduled its peak but not the parts of it.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    stage: str
    parameters: int
    trained: int  # of these
    batch_size: int
    per_chip_batch: float
    sequence: int
    remat: str
    compiler_options: str  # config.compiler_options: "none" leaves out those that every run has
    options: dict[str, str | bool]  # of the compiler, beyond those
    whole: bool  # False: compiled only as far as the schedule, see `schedule`
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
    estimate: timing.Estimate | None

    @property
    def seconds_per_token(self) -> float:
        """By which settings are compared: the middle of the estimate, per token and chip.

        Raises:
          ValueError: the step does not fit or was not compiled.
        """
        if self.estimate is None:
            raise ValueError(f"a step that was not compiled for {self.topology} has no time")
        return sum(self.estimate.seconds) / 2 / (self.per_chip_batch * self.sequence)


def compile_report(
    config: TrainConfig,
    topology: str,
    slices: int = 1,
    options: Mapping[str, str | bool] | None = None,
    whole: bool = True,
) -> tuple[CompileReport, str]:
    """Compiles the train step for a pod. Returns the report, and the scheduled program ("" when it does not fit).

    Args:
      options: of the compiler, beyond those that every run has.
      whole: False stops at the schedule, after seconds instead of minutes. The peak is then exact to 0.3 GiB,
        and products are timed at a share of the peak.

    Raises:
      ConfigError: unknown topology or compiler option, or a mesh or batch that does not fit it.
    """
    mesh = mesh_lib.make_mesh(config.mesh, pods.pod(topology, slices))
    shards = mesh_lib.batch_shards(mesh) * config.optimizer.accumulation
    if config.batch_size % shards:
        raise ConfigError(f"batch {config.batch_size} is not a multiple of {shards} (batch shards x accumulation)")
    abstract, _, _ = abstract_state(config, OBJECTIVES[config.stage], mesh)
    frozen = lowering.abstract_frozen(config, mesh)
    chips, gpu = mesh.devices.size, pods.kind(topology) in pods.GPUS
    started = time.monotonic()
    text, memory, peak, held = "", None, None, None
    if gpu:
        lowering.lower(config, mesh, platform="cuda")
        inputs = (
            abstract.params,
            abstract.opt_state,
            frozen,
            lowering.abstract_batch(config, mesh),
        )
        held = mesh_lib.bytes_per_device(inputs)
    else:
        try:
            if whole:
                compiled = lowering.lower(config, mesh).compile(compiler_options=dict(options or {}))
                memory, text = compiled.memory_analysis(), compiled.as_text() or ""
                peak = memory.peak_memory_in_bytes if memory else None
            else:
                scheduled = scheduling.schedule(config, topology, slices, options)
                text, peak = scheduled.text, scheduled.peak_bytes
        except RuntimeError as error:  # also what the compiler raises
            if options and str(error).startswith("INVALID_ARGUMENT"):
                raise ConfigError(f"--option: {shorten(error).removeprefix('INVALID_ARGUMENT: ')}") from error
            peak = lowering.needed_bytes(str(error))
    traffic = hlo.collectives(text) if text else None
    tokens = config.batch_size * config.sequence.length
    model_flops = (
        flops.training_flops(config.vla.transformer, tokens, tokens * config.sequence.length / 2, config.finetune.on)
        / chips
        if STAGES[config.stage].model == "vla"
        else None
    )
    report = CompileReport(
        topology=topology,
        slices=slices,
        chips=chips,
        mesh=mesh_lib.sizes(mesh),
        stage=config.stage,
        parameters=params_lib.count((abstract.params, frozen.base)),
        trained=params_lib.count(abstract.params),
        batch_size=config.batch_size,
        per_chip_batch=config.batch_size / chips,
        sequence=config.sequence.length,
        remat=config.remat,
        compiler_options=config.compiler_options,
        options=dict(options or {}),
        whole=whole,
        fits=None if gpu else bool(text),
        capacity_bytes=pods.GPUS[pods.kind(topology)] if gpu else pods.CHIPS[pods.kind(topology)].hbm,
        peak_bytes=peak,
        argument_bytes=memory.argument_size_in_bytes if memory else held,
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes if memory else None,
        compile_seconds=time.monotonic() - started,
        model_flops=model_flops,
        executed_flops=hlo.dot_flops(text) if text else None,
        collective_bytes=traffic.by_kind if traffic else None,
        synchronous_collective_bytes=traffic.synchronous if traffic else None,
        dcn_bytes=traffic.dcn if traffic else None,
        largest_buffers=[dataclasses.asdict(b) for b in hlo.largest_buffers(text)] if text else [],
        overlap=hlo.overlap(text, 8) if text else [],
        estimate=timing.estimate(text, topology, model_flops) if text else None,
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
