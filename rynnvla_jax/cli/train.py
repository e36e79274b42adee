"""`rynnvla train`: one stage on all devices of all processes."""

import dataclasses
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from rynnvla_jax import config_origin
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.config import ConfigError, TrainConfig, from_dict
from rynnvla_jax.config_file import config_from_flags
from rynnvla_jax.distributed import initialize, multihost, preemption
from rynnvla_jax.train import watchdog
from rynnvla_jax.train.loop import train


def main(argv: list[str]) -> None:
    values, texts = config_from_flags("rynnvla train", argv, workdir="the run's directory")
    if texts["workdir"] is None:
        raise ConfigError("--workdir is required, for example: --workdir runs/robot")
    logging.set_verbosity(logging.ERROR)  # Orbax and Grain talk a lot
    from data_pipelines.episode import DataError

    known = (ConfigError, DataError, CheckpointError, multihost.PeerError, FloatingPointError)
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from `preemption`
    try:
        initialize.initialize()
        with config_origin.told(argv):
            train(from_dict(TrainConfig, values), texts["workdir"])
    except known as error:
        multihost.leave(f"{type(error).__name__}: {error}")
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        multihost.leave_at_once(
            f"process {jax.process_index()} stops; when the error above speaks of a connection, another process is "
            "gone and its own output says why. The same command continues from the last checkpoint"
        )


def help_text() -> str:
    """What `rynnvla train --help` prints."""

    def lines(config: Any, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from lines(value, f"{prefix}.{field.name}")
            else:
                yield f"  --{prefix}.{field.name}={value!r}"

    return "\n".join(
        [
            "usage: rynnvla train --config FILE[:SIZE] --workdir DIR [--config.KEY=VALUE ...]",
            "",
            "Trains one stage on all devices of all processes (`rynnvla launch --help`); the same command continues",
            f"after any interruption. SIGTERM saves and leaves with status {preemption.EXIT_CODE}, a hang leaves with "
            f"{watchdog.EXIT_CODE} and all stacks.",
            "",
            "  --config   configs/{action_vae,vqgan}.py:{tiny,full} or",
            "             configs/{video,trajectory,robot}.py:{tiny,1b,7b,34b}",
            "  --workdir  checkpoints, assets, metrics.jsonl, timing.jsonl, heartbeat.json and TensorBoard files go",
            "             here; with several processes on a file system that they share",
            "",
            "Every key of a config can be overridden. The keys, with their defaults before a config file sets its own:",
            *lines(TrainConfig(stage="robot"), "config"),
        ]
    )


def command_line(argv: list[str]) -> None:
    """`rynnvla train` and `python -m rynnvla_jax.train`."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    try:
        main(argv)
    except ConfigError as error:
        sys.exit(f"rynnvla train: {error}")
