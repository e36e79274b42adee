"""`rynnvla COMMAND ...`: the list of commands, and how they are run and show their errors.

The grammar that all commands follow (`rynnvla_jax/cli/arguments.py` reads it):

- The required subject of a command is positional: `rynnvla report WORKDIR...`, `rynnvla checkpoint list WORKDIR`,
  `rynnvla convert export WORKDIR EXPORT` (source, then destination). Everything else is an option; so is the input of
  a command that writes a data set to --out (`rynnvla data tokenize --source S --out DIR`).
- Options have dashes: `--dry-run`. Keys of a config keep their own names: `--config.data.num_threads=4`.
- One name means one thing: `--workdir` the directory of a run that the command writes, `--out` where other output goes,
  `--source` a data source KIND:PATH, `--policy` a policy to run, `--config` a config file.
- An error is `rynnvla COMMAND: text` on stderr. The exit status is 2 for arguments that are not understood, else 1.
"""

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rynnvla_jax.errors import did_you_mean

OURS = ("rynnvla_jax", "data_pipelines")
# Packages, by the name that is imported, of each extra of setup.py. The base install has what is in none of them.
EXTRAS = {
    "train": "jax jaxlib flax optax orbax grain tensorflow_datasets ml_collections chex absl jaxtyping ml_dtypes "
    "tensorstore tensorboardX matplotlib jinja2 yaml scipy av pyarrow h5py array_record google_crc32c etils",
    "data": "av pyarrow h5py array_record google_crc32c tensorflow_datasets ml_collections matplotlib jinja2 scipy",
    "deploy": "torch websockets msgpack",
    "sim": "mujoco fast_simplification av pyarrow h5py scipy jinja2",
    "sweep": "optuna plotly",
    "wandb": "wandb",
    "gcs": "gcsfs google fsspec etils",
    "s3": "s3fs fsspec etils",
    "hub": "huggingface_hub",
    "curate": "apache_beam ai_edge_litert transformers torch av pyarrow h5py array_record google_crc32c "
    "tensorflow_datasets ml_collections matplotlib jinja2 scipy",
}
# Errors that say what is wrong and what to do about it: a line for the user, without a trace.
KNOWN_ERRORS = (
    "builtins.FloatingPointError",  # of training: loss or gradient is repeatedly not finite
    "rynnvla_jax.config.ConfigError",
    "rynnvla_jax.checkpoint.reader.CheckpointError",
    "rynnvla_jax.cli.demo.DemoError",
    "rynnvla_jax.convert.ConversionError",
    "rynnvla_jax.deploy.export_format.PolicyError",
    "rynnvla_jax.distributed.multihost.PeerError",
    "rynnvla_jax.report.page.ReportError",
    "rynnvla_jax.sim.gl.RenderingError",
    "rynnvla_jax.sim.record.RecordError",
    "rynnvla_jax.sim.worker_pool.WorkError",
    "rynnvla_jax.storage.buckets.BucketError",
    "rynnvla_jax.storage.bucket_cache.CacheError",
    "rynnvla_jax.storage.fetch.FetchError",
    "rynnvla_jax.storage.hub.HubError",
    "rynnvla_jax.metadata.MetadataError",
    "rynnvla_jax.storage.arrays.DamagedArrayError",
    "rynnvla_jax.storage.files.DamagedFileError",
    "rynnvla_jax.storage.lease.LeaseError",
    "data_pipelines.parquet_files.ColumnError",
    "data_pipelines.episode.DataError",
)


@dataclass(frozen=True)
class Command:
    """One command: `main(argv) -> int` of a module that is imported when it runs, so that help and errors are fast."""

    help: str
    module: str
    extra: str = "train"  # of setup.py: what it needs beyond the base install
    function: str = "main"


COMMANDS = {
    "doctor": Command("check this installation, and say how to repair what does not work", "rynnvla_jax.cli.doctor"),
    "data": Command("curate, tokenize, validate and look at data sets", "rynnvla_jax.cli.data"),
    "fetch": Command("download third-party files that a feature needs, checked and cached", "rynnvla_jax.cli.fetch"),
    "train": Command(
        "train any stage: rynnvla train --config configs/robot.py:7b --workdir DIR", "rynnvla_jax.cli.train"
    ),
    "sweep": Command("run many variants of one config file, or search with Optuna", "rynnvla_jax.cli.sweep"),
    "aot": Command(
        "compile a train step for a TPU pod on this machine, and report its memory and communication",
        "rynnvla_jax.cli.aot",
    ),
    "launch": Command(
        "start several processes here, or write job files for Slurm, GKE and TPU VMs", "rynnvla_jax.cli.launch"
    ),
    "convert": Command("convert PyTorch weights: import, export, verify", "rynnvla_jax.cli.convert"),
    "checkpoint": Command("list and verify checkpoints, and show their contents", "rynnvla_jax.cli.checkpoint"),
    "deploy": Command(
        "check an exported policy on this machine: latency and ranges", "rynnvla_jax.cli.deploy", "deploy"
    ),
    "serve": Command(
        "serve an exported policy over a websocket, for openpi's clients", "rynnvla_jax.cli.serve", "deploy"
    ),
    "evaluate": Command(
        "measure success rates of a policy on the simulated arm, with videos", "rynnvla_jax.cli.evaluate", "sim"
    ),
    "evaluate-loss": Command(
        "compute the losses and action errors of a checkpoint on held-out data", "rynnvla_jax.cli.evaluate_loss"
    ),
    "record": Command(
        "record expert demonstrations in simulation, as a LeRobot data set", "rynnvla_jax.cli.record", "sim"
    ),
    "imagine": Command(
        "predict future frames from a picture and an instruction, or measure how good they are",
        "rynnvla_jax.cli.imagine",
    ),
    "report": Command("write one HTML page about one or several work dirs", "rynnvla_jax.cli.report"),
    "compare": Command(
        "compare many runs: differing keys, metrics, curves, means over seeds", "rynnvla_jax.cli.compare"
    ),
    "demo": Command(
        "train the whole curriculum with tiny models, on data that it records itself", "rynnvla_jax.cli.demo"
    ),
}


class UsageError(ValueError):
    """Arguments that are not understood: exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """`rynnvla`. Returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in any script, on a terminal of another one
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = dispatch("rynnvla", COMMANDS, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `rynnvla train --help | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        return 128 + signal.SIGPIPE


def dispatch(program: str, commands: Mapping[str, Command], argv: Sequence[str], about: str = "") -> int:
    """Runs `PROGRAM COMMAND ...`, or prints the list of commands and `about`. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(program, commands, about))
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in commands:
        text = f"unknown command {name!r}.{did_you_mean(name, commands)} Commands: {', '.join(commands)}"
        return failed(program, UsageError(text))
    return run(f"{program} {name}", commands[name], rest)


def usage(program: str, commands: Mapping[str, Command], about: str = "") -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    below = ["", about.rstrip()] if about else []
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            *lines,
            *below,
            "",
            f"{program} COMMAND --help shows the options of a command.",
        ]
    )


def run(program: str, command: Command, argv: list[str]) -> int:
    """One command, with its errors shown as every command shows them. Returns the exit status."""
    try:
        return getattr(importlib.import_module(command.module), command.function)(argv)
    except KeyboardInterrupt as interrupt:  # a command may say how to continue
        print(f"{program}: {'; '.join(['stopped', *map(str, interrupt.args)])}", file=sys.stderr)
        return 130
    except Exception as error:
        return failed(program, error, command.extra)


def quiet_libraries() -> None:
    """Hides what Orbax, Grain and TensorStore log: errors that they also raise, on a full disk 3000 lines of traces."""
    import logging
    import warnings

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # the rest of an Orbax save that failed

    def report(unraisable):
        # TensorStore's threads, whose requests come back after Orbax has given a failed save up.
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def failed(program: str, error: Exception, extra: str = "train") -> int:
    """Prints an expected error on stderr and returns the exit status; re-raises any other."""
    text = expected_error(error, extra)
    if text is None:
        raise error
    from rynnvla_jax.storage import bucket_cache

    print(f"{program}: {bucket_cache.named(text)}", file=sys.stderr, flush=True)
    if isinstance(error, UsageError):
        print(f"For help: {program} --help", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UsageError) else 1


def expected_error(error: BaseException, extra: str = "train") -> str | None:
    """The message for the user of an error that can be expected; None for any other, which needs its traceback."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if isinstance(error, UsageError) or names & set(KNOWN_ERRORS):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ModuleNotFoundError) and error.name and _raised_by_us(error):
        package = error.name.partition(".")[0]
        having = [name for name, packages in EXTRAS.items() if package in packages.split()]
        if having:
            chosen = extra if extra in having else having[0]
            return f"this needs {package}: pip install 'rynnvla_jax[{chosen}]'"
    return None


def _raised_by_us(error: BaseException) -> bool:
    """Whether the import that failed stands in a file of ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    roots = [str(Path(__file__).resolve().parents[2] / name) + "/" for name in OURS]
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(tuple(roots))
