"""`rynnvla COMMAND ...`: one line a command; each has its own `--help`."""

import importlib
import sys

from rynnvla_jax.errors import did_you_mean

COMMANDS = {
    "doctor": "what of this installation works, and what to do about the rest",
    "data": "curate, tokenize, validate and look at data sets",
    "fetch": "files that models of other people come in, checked and cached",
    "train": "train any stage: rynnvla train --config configs/robot.py:7b --workdir DIR",
    "sweep": "a family of runs of one config file, or a search with Optuna",
    "aot": "what a TPU pod would need: compile a train step for it here",
    "launch": "several processes: here, or job files for Slurm, GKE and TPU VMs",
    "convert": "PyTorch weights in and out: import, export, verify",
    "checkpoint": "list and verify checkpoints, show what they hold",
    "deploy": "check an exported policy on this machine: latency and ranges",
    "serve": "an exported policy behind a websocket, for openpi's clients",
    "evaluate": "success rates of a policy on the simulated arm, with videos",
    "record": "expert demonstrations in simulation, as a LeRobot data set",
    "imagine": "future frames from a picture and an instruction, and how good they are",
    "report": "one HTML page about one or several work dirs",
    "compare": "which of many runs won: differing keys, metrics, curves, seed means",
    "demo": "the whole curriculum with tiny models, on data it records itself",
}
# Where a command's `main` is, where not in a module of `cli` that bears its name.
MODULES = {
    "fetch": "storage.fetch",
    "serve": "deploy.server",
    "record": "sim.record",
    "report": "report.page",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: rynnvla COMMAND ...", "", *lines, "", "rynnvla COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Dispatches to the command's own `main`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(f"rynnvla: unknown command {command!r}.{did_you_mean(command, COMMANDS)}\n{usage()}", file=sys.stderr)
        return 2
    try:
        return run(command, rest)
    except ModuleNotFoundError as error:
        extras = {"deploy": "deploy", "serve": "deploy", "record": "sim", "evaluate": "sim", "demo": "train,sim"}
        extra = {**extras, "sweep": "train,sweep", "compare": "train,sweep"}.get(command, "train")
        sys.exit(f"rynnvla {command} needs {error.name}: pip install 'rynnvla_jax[{extra}]'")


def run(command: str, rest: list[str]) -> int:
    """Imports only what the command needs: an exported policy runs where JAX is not installed."""
    module = importlib.import_module(f"rynnvla_jax.{MODULES.get(command, f'cli.{command}')}")
    if command == "train":
        module.command_line(rest)
        return 0
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
