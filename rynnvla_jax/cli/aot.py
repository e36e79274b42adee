"""`rynnvla aot --config configs/robot.py:7b --topology v5p:4x4x4`: what a step needs on a pod that you do not have."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.aot.environment import prepare_compiler
from rynnvla_jax.cli.arguments import ConfigName, parse_with_overrides
from rynnvla_jax.config import ConfigError, MeshConfig, TrainConfig

PROGRAM = "rynnvla aot"


@dataclass(frozen=True)
class Aot:
    """Compiles the train step of a stage for a TPU pod that you do not need to have, and prints the compiler's report.

    The report has memory per chip, FLOPs, bytes sent between chips, how many of those are not overlapped with
    computation, and the largest buffers.

      rynnvla aot --config configs/robot.py:7b --topology v5p:4x4x4
      rynnvla aot --config configs/video.py:7b --topology v5e:16x16 --slices 2 --remat full --per-chip-batch 2 --json
      rynnvla aot --config configs/robot.py:7b --topology v6e:8x8 --fit

    Topologies: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB. The mesh, from config.mesh or --mesh, covers all chips. For
    h100:8 (or a100, h200) the step is only lowered for CUDA, with XLA's attention: the memory of weights, optimizer
    state and batch is exact, the rest is not known. --config.data.frame_codes=ahead leaves the VQGAN out of the step.
    A 7B step compiles in one to five minutes and needs 2 GB. The exit status is 1 when the step does not fit or the
    request is wrong.
    """

    config: ConfigName
    """Config file, for example configs/robot.py:7b."""
    topology: str
    """The pod, for example v5e:16x16 or v5p:4x4x4."""
    slices: int = 1
    """Number of such pods, connected by the data-centre network."""
    sequence: int | None = None
    """Tokens per sequence; by default config.sequence.length."""
    per_chip_batch: float = 1.0
    """Examples per chip and update; replaces config.batch_size."""
    remat: Literal["none", "projections", "attention", "full", "offload"] | None = None
    """What a layer keeps for its gradient; by default config.remat."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=N,...")] = None
    """For example fsdp=16,tensor=4; one axis may be -1, for all remaining chips. By default config.mesh."""
    fit: bool = False
    """Search for the best batch size and remat policy that fit."""
    json: bool = False
    """Print one JSON object on stdout."""
    hlo: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the scheduled program to this file."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments, overrides = parse_with_overrides(Aot, PROGRAM, argv)
    prepare_compiler(arguments.topology)
    from rynnvla_jax.aot import compile as aot_compile
    from rynnvla_jax.aot import pods

    config = configured(arguments, overrides)
    if (arguments.fit or arguments.hlo) and pods.kind(arguments.topology) in pods.GPUS:
        raise ConfigError("--fit and --hlo need a TPU topology: programs for GPUs are not compiled here")
    if arguments.hlo and arguments.fit:
        raise ConfigError(
            "--hlo writes one program but --fit compiles many; run --fit first, then --hlo with the setting it finds"
        )
    if arguments.hlo and (arguments.hlo.is_dir() or not arguments.hlo.parent.is_dir()):
        raise ConfigError(f"--hlo {arguments.hlo} is not a file in a directory that exists")
    if arguments.fit:
        report = aot_compile.best_fit(config, arguments.topology, arguments.slices, lambda r: say(line(r)))
    else:
        say(f"compiling stage {config.stage} for {arguments.slices} x {arguments.topology}: one to five minutes")
        report, text = aot_compile.compile_report(config, arguments.topology, arguments.slices)
        if arguments.hlo:
            arguments.hlo.write_text(text, encoding="utf-8")
    print(json.dumps(as_json(report)) if arguments.json else table(report))
    return 1 if report.fits is False else 0


def configured(arguments: Aot, overrides: list[str]) -> TrainConfig:
    """The `TrainConfig` of the command line.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    from rynnvla_jax import config_file
    from rynnvla_jax.aot import compile as aot_compile
    from rynnvla_jax.aot import pods

    config = config_file.load(arguments.config, overrides).build()
    changes: dict = {"remat": arguments.remat} if arguments.remat else {}
    if arguments.sequence:
        changes["sequence"] = dataclasses.replace(config.sequence, length=arguments.sequence)
    if arguments.mesh:
        try:
            axes = {k: int(v) for k, v in (item.split("=") for item in arguments.mesh.split(","))}
            changes["mesh"] = MeshConfig(**axes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--mesh {arguments.mesh!r} is not like fsdp=16,tensor=4") from error
    if pods.kind(arguments.topology) in pods.GPUS:
        changes["attention"] = "xla"  # cuDNN's looks for the library
    chips = len(pods.pod(arguments.topology, arguments.slices))
    batch = arguments.per_chip_batch * chips
    if batch != int(batch):
        raise ConfigError(f"--per-chip-batch {arguments.per_chip_batch} x {chips} chips is not a whole number")
    return dataclasses.replace(aot_compile.without_assets(config), batch_size=int(batch), **changes)


def as_json(report) -> dict:
    """Totals under the plain names, and the values by kind under `*_by_kind`."""
    values = dataclasses.asdict(report)
    for name in ("collective_bytes", "synchronous_collective_bytes"):
        kinds = values[name]
        values[f"{name}_by_kind"] = kinds
        values[name] = None if kinds is None else sum(kinds.values())
    return values


def line(report) -> str:
    """One attempt as one line of text."""
    gib = 2**30
    fits = "fits" if report.fits else "does not fit"
    return (
        f"batch {report.per_chip_batch:g} per chip, remat {report.remat}: {report.peak_bytes / gib:.2f} of "
        f"{report.capacity_bytes / gib:.2f} GiB, {fits} ({report.compile_seconds:.0f} s)"
    )


def table(report) -> str:
    """The report as a text table."""
    gib, r = 2**30, report
    mesh = " ".join(f"{k}={v}" for k, v in r.mesh.items() if v > 1) or "one device"
    pods = f"{r.slices} x {r.topology}" if r.slices > 1 else r.topology
    lines = [
        f"stage {r.stage}, {r.parameters / 1e9:.2f} G parameters, {pods} = {r.chips} chips, mesh {mesh}",
        f"  batch        {r.batch_size} ({r.per_chip_batch:g} per chip) of {r.sequence} tokens, remat {r.remat}",
    ]
    if r.fits is None:
        held = (
            f"{r.argument_bytes / gib:.2f} of {r.capacity_bytes / gib:.0f} GiB for weights, optimizer state and batch"
        )
        return "\n".join([*lines, f"  lowered      for CUDA, not compiled: {held}, plus activations and gradients"])
    lines.append(
        f"  HBM per chip {r.peak_bytes / gib:.2f} of {r.capacity_bytes / gib:.2f} GiB: "
        + ("fits" if r.fits else "DOES NOT FIT; use a smaller batch, --remat full or offload, or more chips")
    )
    if not r.fits:
        return "\n".join(lines)
    lines[-1] += f" (arguments {r.argument_bytes / gib:.2f}, temporaries {r.temp_bytes / gib:.2f})"
    if r.host_bytes:
        lines.append(f"  host RAM     {r.host_bytes / gib:.2f} GiB per chip")
    lines.append(f"  compiled in  {r.compile_seconds:.0f} s")
    if r.model_flops:
        lines.append(f"  model FLOPs  {r.model_flops / 1e12:.1f} T per chip and update, by formula")
    lines.append(f"  collectives  {'GB per chip and update':<22}{'sent':>9}{'synchronous':>13}")
    for name, sent in sorted(r.collective_bytes.items(), key=lambda item: -item[1]):
        exposed = r.synchronous_collective_bytes.get(name, 0.0)
        lines.append(f"               {name:<22}{sent / 1e9:>9.2f}{exposed / 1e9:>13.2f}")
    total, exposed = sum(r.collective_bytes.values()), sum(r.synchronous_collective_bytes.values())
    share = f" ({exposed / total:.1%})" if total else ""
    lines.append(f"               {'total':<22}{total / 1e9:>9.2f}{exposed / 1e9:>13.2f}{share}")
    if r.slices > 1:
        lines.append(f"               {'between slices':<22}{r.dcn_bytes / 1e9:>9.2f}")
    lines += ["  overlap      the largest collectives in loops:", *(f"    {text}" for text in r.overlap)]
    lines.append("  buffers      the largest single values:")
    for b in r.largest_buffers:
        count = f"{b['count']} x " if b["count"] > 1 else ""
        role = "argument" if b["argument"] else "value"
        lines.append(f"    {count}{b['bytes'] / gib:.3f} GiB {b['shape']} {role}: {b['source']}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
