"""`rynnvla aot --config configs/robot.py:7b --topology v5p:4x4x4`: what a step needs on a pod that you do not have."""

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.aot.environment import prepare_compiler
from rynnvla_jax.cli.arguments import ConfigName, parse_with_overrides
from rynnvla_jax.config import ConfigError, MeshConfig, TrainConfig
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

PROGRAM = "rynnvla aot"


@dataclass(frozen=True)
class Aot:
    """Compiles the train step of a stage for a TPU pod that you do not need to have, and prints the compiler's report.

    The report has memory per chip, FLOPs, bytes sent between chips, how many of those are not overlapped with
    computation, the time of a step as the compiler estimates it, and the largest buffers.

      rynnvla aot --config configs/robot.py:7b --topology v5p:4x4x4
      rynnvla aot --config configs/video.py:7b --topology v5e:16x16 --slices 2 --remat full --per-chip-batch 2 --json
      rynnvla aot --config configs/robot.py:7b --topology v6e:8x8 --fit
      rynnvla aot --config configs/robot.py:7b --topology v6e:8x8 --compare '--remat projections --per-chip-batch 2'

    Topologies: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB. The mesh, from config.mesh or --mesh, covers all chips. For
    h100:8 (or a100, h200) the step is only lowered for CUDA, with XLA's attention: the memory of weights, optimizer
    state and batch is exact, the rest is not known. --config.data.frame_codes=ahead leaves the VQGAN out of the step.
    A 7B step compiles in one to five minutes and needs 2 GB. The exit status is 1 when the step does not fit or the
    request is wrong.

    The time is an estimate of the compiler, not measured on a TPU. Use it to compare settings on one topology. With
    --against it stands beside the measurement of a run.
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
    option: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A compiler option beyond those of every run, for example xla_enable_async_all_gather=true. May be repeated."""
    quick: bool = False
    """Compile only as far as the schedule: seconds. The peak is exact to 0.3 GiB, the time less so."""
    fit: bool = False
    """Search for the mesh, batch size and remat policy with the shortest step per token, and print the command."""
    compare: Annotated[str | None, tyro.conf.arg(metavar="CONFIG_OR_FLAGS")] = None
    """Another config file, or flags that differ, as one word: both settings are printed side by side."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="PROFILE_DIR")] = None
    """WORKDIR/profile of a run with the same setting on a TPU (config.profile_steps): measurement beside estimate."""
    json: bool = False
    """Print one JSON object on stdout."""
    hlo: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the scheduled program to this file."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    argv = joined(argv)
    arguments, overrides = parse_with_overrides(Aot, PROGRAM, argv)
    prepare_compiler(arguments.topology)
    check(arguments)
    from rynnvla_jax.aot import tables

    config = configured(arguments, overrides)
    if arguments.fit:
        return fit(arguments, overrides, config)
    if arguments.compare is not None:
        return compare(arguments, overrides, argv)
    from rynnvla_jax.aot import profile

    profiles = profile.opened(arguments.against) if arguments.against else None
    report, text = compiled(arguments, config)
    if arguments.hlo:
        files.write_text(arguments.hlo, text)
    measured = profile.measured(profiles, text) if profiles and report.estimate else None
    if arguments.json:
        print(json.dumps({**tables.as_json(report), "measured": measured and dataclasses.asdict(measured)}))
    else:
        print(tables.table(report))
        if measured and report.estimate:
            print("\n" + tables.against(report.estimate, measured))
    return 1 if report.fits is False else 0


def joined(argv: list[str]) -> list[str]:
    """--compare and its value as one word: the value may begin with dashes."""
    words = list(argv)
    while "--compare" in words[:-1]:
        at = words.index("--compare")
        words[at : at + 2] = [f"--compare={words[at + 1]}"]
    return words


def check(arguments: Aot) -> None:
    """Raises ConfigError for options that do not go together."""
    from rynnvla_jax.aot import pods

    a, gpu = arguments, pods.kind(arguments.topology) in pods.GPUS
    if gpu and (
        given := [name for name in ("fit", "hlo", "compare", "option", "quick", "against") if getattr(a, name)]
    ):
        raise ConfigError(f"--{given[0]} needs a TPU topology: programs for GPUs are not compiled here")
    if a.hlo and (a.fit or a.compare is not None):
        raise ConfigError(
            "--hlo writes one program but --fit and --compare compile several; run them first, then --hlo with the "
            "setting that you choose"
        )
    if a.against and (a.fit or a.compare is not None):
        raise ConfigError("--against is for one setting, that of the run; leave --fit and --compare out")
    if a.against and not a.against.is_dir():
        raise ConfigError(f"--against {a.against} is not a directory; give WORKDIR/profile of a run")
    if a.fit and (a.compare is not None or a.quick):
        raise ConfigError("--fit goes with neither --compare nor --quick; leave the other out")
    if a.hlo and (a.hlo.is_dir() or not a.hlo.parent.is_dir()):
        raise ConfigError(f"--hlo {a.hlo} is not a file in a directory that exists")
    options(arguments)


def options(arguments: Aot) -> dict[str, str | bool]:
    """The compiler options; "true" and "false" as Booleans.

    Raises:
      ConfigError: one is not NAME=VALUE.
    """
    found: dict[str, str | bool] = {}
    for word in arguments.option:
        name, equals, value = word.removeprefix("--").partition("=")
        if not name or not value:
            raise ConfigError(f"--option {word!r} is not NAME=VALUE, like xla_enable_async_all_gather=true")
        found[name] = value == "true" if value in ("true", "false") else value
    return found


def compiled(arguments: Aot, config: TrainConfig):
    """The report and the program of one setting."""
    from rynnvla_jax.aot.compile import compile_report

    takes = "some seconds" if arguments.quick else "one to five minutes"
    say(f"compiling stage {config.stage} for {arguments.slices} x {arguments.topology}: {takes}")
    return compile_report(config, arguments.topology, arguments.slices, options(arguments), not arguments.quick)


def compare(arguments: Aot, overrides: list[str], argv: list[str]) -> int:
    """Two settings side by side: that of the command line, and the same with what --compare changes."""
    from rynnvla_jax.aot import tables

    words = shlex.split(arguments.compare or "")
    if not words:
        raise ConfigError("--compare is empty; give a config file, or flags like '--remat full --per-chip-batch 2'")
    words = words if words[0].startswith("-") else ["--config", *words]
    other, changed = parse_with_overrides(Aot, PROGRAM, [*argv, *words])  # of what is repeated the last counts
    check(other)
    configs = configured(arguments, overrides), configured(other, changed)  # faults of both before minutes of work
    reports = [compiled(a, config)[0] for a, config in zip((arguments, other), configs, strict=True)]
    if arguments.json:
        print(json.dumps({"reports": [tables.as_json(r) for r in reports]}))
    else:
        print(tables.side_by_side(*reports))
    return 1 if any(r.fits is False for r in reports) else 0


def fit(arguments: Aot, overrides: list[str], config: TrainConfig) -> int:
    """Searches, and prints the best settings and the command to train with the first."""
    from rynnvla_jax.aot import tables
    from rynnvla_jax.aot.fit import search

    tried = []
    with progress_bar(desc="fit", unit="setting") as bar:

        def note(report) -> None:
            tried.append(report)
            bar.update()
            bar.write(tables.line(report), file=sys.stderr)

        best = search(config, arguments.topology, arguments.slices, options(arguments), note)
    words = train_command(arguments, overrides, best[0])
    if arguments.json:
        print(json.dumps({**tables.as_json(best[0]), "command": words, "tried": [tables.as_json(r) for r in tried]}))
    else:
        print(f"{tables.ranking(best)}\n\n{tables.table(best[0])}\n\n{words}")
    return 0


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


def train_command(arguments: Aot, overrides: list[str], report) -> str:
    """How to train with the setting of a report."""
    mesh = {axis: size for axis, size in report.mesh.items() if axis not in ("replica", "fsdp") and size > 1}
    words = [
        f"--config={arguments.config}",
        *overrides,
        *([f"--config.sequence.length={report.sequence}"] if arguments.sequence else []),
        *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
        f"--config.batch_size={report.batch_size}",
        f"--config.remat={report.remat}",
        *(["--config.compiler_options=none"] if report.compiler_options == "none" else []),
    ]
    flags = [f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in report.options.items()]
    variable = f"LIBTPU_INIT_ARGS={shlex.quote(' '.join(flags))} " if flags else ""
    return f"{variable}rynnvla train --workdir=DIR {shlex.join(words)}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
