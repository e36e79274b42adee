"""Checks the points of a sweep before any of them runs: devices, shapes, files, and memory on a pod.

`sweep/run.py` starts `python -m rynnvla_jax.sweep.check` as a separate process, because a process that has initialised
its devices keeps them, and the runs need them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rynnvla_jax import children
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    InitFromConfig,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files as storage

GIB = 2**30
FAULTS = (ConfigError, CheckpointError, TypeError, ValueError, ZeroDivisionError)  # what a wrong model raises


@dataclass(frozen=True)
class Pod:
    """Devices of a pod, named as for `rynnvla aot`."""

    topology: str
    slices: int = 1


@dataclass(frozen=True)
class Verdict:
    """The result of checking one point without running it."""

    faults: list[str]
    metrics: list[str]  # that it will log, those of eval.jsonl as "eval/NAME"; none where it has faults
    hbm: float | None = None  # GiB of a chip of the pod
    chip_hours: tuple[float, float] | None = None  # on a TPU pod, as `aot.estimate` has it: fastest, slowest
    chip_hours_at_peak: float | None = None  # on GPUs, when every FLOP takes its time at peak rate


@dataclass(frozen=True)
class Found:
    """The result of `ask`."""

    platform: str  # of the devices here: cpu, gpu or tpu
    devices: int
    verdicts: list[Verdict]


def ask(
    configs: Sequence[TrainConfig],
    workdirs: Sequence[Path],
    parallel: int = 1,
    pod: Pod | None = None,
    files: bool = True,
    devices: int | None = None,
) -> Found:
    """Runs `check` in another process, for the local devices, a pod, or a number of devices of unknown kind.

    Raises:
      ConfigError: a fault of the pod or the devices, which concerns all points.
    """
    question = {
        "configs": [to_dict(c) for c in configs],
        "workdirs": list(map(str, workdirs)),
        "parallel": parallel,
        "pod": asdict(pod) if pod else None,
        "files": files,
        "devices": devices,
    }
    command = children.module("rynnvla_jax.sweep.check")
    process = subprocess.run(command, input=json.dumps(question), stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ConfigError(f"the check of the points failed (status {process.returncode}); its error is above")
    answer = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise ConfigError(answer["error"])
    verdicts = [{**v, "chip_hours": v["chip_hours"] and tuple(v["chip_hours"])} for v in answer["verdicts"]]
    return Found(answer["platform"], answer["devices"], [Verdict(**v) for v in verdicts])


def main() -> None:
    """Reads the request of `ask` from stdin; the result is the last line of stdout."""
    question = json.loads(sys.stdin.read())
    pod = Pod(**question["pod"]) if question["pod"] else None
    configs = [from_dict(TrainConfig, values) for values in question["configs"]]
    workdirs = list(map(storage.place, question["workdirs"]))
    if pod:
        from rynnvla_jax.aot.environment import prepare_compiler

        prepare_compiler(pod.topology)
    elif count := question["devices"]:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    import jax

    try:
        devices = share(jax.devices(), question["parallel"])
        if pod:
            from rynnvla_jax.aot import pods

            devices = pods.pod(pod.topology, pod.slices)
        verdicts = check(configs, workdirs, devices, pod, question["files"])
        answer = {
            "platform": jax.default_backend(),
            "devices": jax.device_count(),
            "verdicts": [asdict(v) for v in verdicts],
        }
    except ConfigError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def share(devices: list, parallel: int) -> list:
    """The devices of each of `parallel` runs at a time.

    Raises:
      ConfigError: they cannot be divided.
    """
    platform = devices[0].platform
    if platform == "cpu" or parallel == 1:
        return devices
    if platform == "tpu":
        raise ConfigError(f"--parallel {parallel}: one process uses all TPU chips of a machine; leave --parallel out")
    if len(devices) < parallel:
        raise ConfigError(f"--parallel {parallel} needs as many GPUs; there are {len(devices)}")
    return devices[: len(devices) // parallel]


def check(
    configs: Sequence[TrainConfig], workdirs: Sequence[Path], devices: list, pod: Pod | None = None, files: bool = True
) -> list[Verdict]:
    """One verdict per config. Each distinct program is traced, and compiled for a pod, once.

    Args:
      devices: those of one run.
      files: whether data and models are on this machine; otherwise they are not checked, and started work dirs
        need no models.
    """
    known: dict[tuple, Verdict] = {}
    verdicts = []
    for config, workdir in zip(configs, workdirs, strict=True):
        faults: list[str] = []
        weights = None
        try:
            if files:
                answering(config)
                faults = missing_data(config)
                config, weights = inherit(config, workdir)
        except FAULTS as error:
            verdicts.append(Verdict([*faults, first_line(error)], []))
            continue
        key = (program(config), weights)
        if key not in known:
            known[key] = trace(config, devices, pod, weights)
        traced = known[key]
        steps = config.total_steps
        hours = traced.chip_hours and (traced.chip_hours[0] * steps, traced.chip_hours[1] * steps)
        at_peak = traced.chip_hours_at_peak and traced.chip_hours_at_peak * steps
        found = [*faults, *traced.faults]
        verdicts.append(replace(traced, faults=found, chip_hours=hours, chip_hours_at_peak=at_peak))
    return verdicts


def answering(config: TrainConfig) -> None:
    """Raises ConfigError when a bucket with data or models cannot be read, before anything waits for it."""
    from rynnvla_jax.train import assets

    try:
        assets.check_buckets(config, Path())
    except OSError as error:
        raise ConfigError(str(error)) from None


def missing_data(config: TrainConfig) -> list[str]:
    """Faults of the data sources that can be found without opening them."""
    from data_pipelines.sources import KINDS, mixture

    try:
        sources = [source for source, _ in mixture(config.data)]
    except ConfigError as error:
        return [str(error)]
    faults = []
    for source in sources:
        kind, _, path = source.partition(":")
        if kind not in KINDS or not path:
            faults.append(f"data source {source!r} is not KIND:PATH; KIND is one of {', '.join(KINDS)}")
        elif not storage.place(path).exists():
            faults.append(f"data source {source!r}: {path} does not exist; correct the path")
    if config.data.exclude and not storage.place(config.data.exclude).exists():
        faults.append(f"config.data.exclude {config.data.exclude} does not exist")
    return faults


def inherit(config: TrainConfig, workdir: Path) -> tuple[TrainConfig, tuple | None]:
    """The config completed by its tokenizer and frozen models, and the weights that it starts from (directory, ...).

    Raises:
      ConfigError, CheckpointError: one of them does not exist, or they do not fit together.
    """
    from rynnvla_jax.checkpoint import reader
    from rynnvla_jax.convert import starting_point
    from rynnvla_jax.train import assets
    from rynnvla_jax.vocabulary import TextTokenizer

    if reader.steps(workdir):  # it has its own copies
        return config, None
    found = assets.find(config)
    if "tokenizer" in found:
        frozen = {name: path for name, path in found.items() if name != "tokenizer"}
        config = assets.fit_models(config, TextTokenizer(found["tokenizer"]), frozen)
    start = config.init_from
    if not start.path:
        return config, None
    folder = starting_point.model_dir(start.path, start.step, start.weights)
    return config, (folder, reader.find_step(folder, start.step), start.new, start.weights)


def trace(config: TrainConfig, devices: list, pod: Pod | None, weights: tuple | None) -> Verdict:
    """Traces the shapes of a train step on a mesh of `devices`; compiles it for a pod. Hours are for one step."""
    import jax

    from rynnvla_jax.aot.compile import without_assets
    from rynnvla_jax.checkpoint import model_dir
    from rynnvla_jax.distributed import mesh as mesh_lib
    from rynnvla_jax.train import evaluation, finetune, lowering
    from rynnvla_jax.train.loop import check_batch
    from rynnvla_jax.train.stages import OBJECTIVES
    from rynnvla_jax.train.step import abstract_now, abstract_state, make_step

    config, objective = without_assets(config), OBJECTIVES[config.stage]
    try:
        mesh = mesh_lib.make_mesh(config.mesh, devices)
        check_batch(config, mesh)
        abstract, graphdef, optimizer = abstract_state(config, objective, mesh)
        if weights:
            directory, step, _, kind = weights
            base = finetune.abstract_params(config, objective, mesh)[2]
            finetune.check_start(config, abstract.params, base, model_dir.stored_shapes(directory, step, kind))
        evaluation.check_keep_best(config, objective, graphdef, abstract, mesh)
        update = make_step(config, objective, graphdef, optimizer, abstract)
        inputs = lowering.abstract_frozen(config, mesh), lowering.abstract_batch(config, mesh)
        with jax.set_mesh(mesh):
            _, _, metrics = jax.eval_shape(update, abstract.params, abstract.opt_state, abstract_now(mesh), *inputs)
        held_out = evaluation.names(config, objective, graphdef, abstract, mesh)
        needed = memory(config, pod) if pod else (None, None, None)
    except FAULTS as error:
        return Verdict([first_line(error)], [])
    return Verdict([], sorted([*metrics, "skipped_total", *held_out]), *needed)


def memory(config: TrainConfig, pod: Pod) -> tuple[float, tuple[float, float] | None, float | None]:
    """GiB per chip of a pod, and chip hours of one update: of a TPU estimated, of GPUs (which are not compiled for) at
    peak rate, None where the stage has no transformer.

    Raises:
      ConfigError: it does not fit into a chip's memory.
    """
    from rynnvla_jax.aot import compile as aot_compile
    from rynnvla_jax.aot import pods
    from rynnvla_jax.train import flops

    print(f"compiling stage {config.stage} for {pod.slices} x {pod.topology}", file=sys.stderr, flush=True)
    gpu = pods.kind(pod.topology) in pods.GPUS
    report, _ = aot_compile.compile_report(
        replace(config, attention="xla") if gpu else config, pod.topology, pod.slices
    )
    needed = report.argument_bytes if gpu else report.peak_bytes
    assert needed is not None  # `compile_report` sets the one or the other
    if needed > report.capacity_bytes:
        raise ConfigError(
            f"needs {needed / GIB:.2f} of {report.capacity_bytes / GIB:.2f} GiB per chip of {pod.topology}; use a "
            "smaller batch_size or larger optimizer.accumulation, remat=full, or more chips (`rynnvla aot --fit`)"
        )
    if report.estimate:
        fast, slow = (seconds * report.chips / 3600 for seconds in report.estimate.seconds)
        return needed / GIB, (fast, slow), None
    peak = flops.PEAK_FLOPS[f"NVIDIA {pods.kind(pod.topology).upper()}"]
    return needed / GIB, None, report.model_flops and report.model_flops * report.chips / peak / 3600


def program(config: TrainConfig) -> str:
    """A key that is equal for configs whose steps have the same shapes and need the same memory."""
    data, optimizer = config.data, config.optimizer
    same = replace(
        config,
        seed=0,
        total_steps=1,
        log_every=1,
        tokenizer="",
        vqgan="",
        action_vae="",
        data=DataConfig(chunk=data.chunk, frame_codes=data.frame_codes, image=replace(data.image, jitter=0.0)),
        optimizer=OptimizerConfig(accumulation=optimizer.accumulation, offload=optimizer.offload),
        checkpoint=CheckpointConfig(keep_best=config.checkpoint.keep_best),
        init_from=InitFromConfig(),
        codes_like_codebook=False,
        action_loss_weight=1.0,
    )
    return json.dumps(to_dict(same), sort_keys=True)


def first_line(error: Exception) -> str:
    text = shorten(error)
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
