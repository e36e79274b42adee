"""`rynnvla train`: one stage on all devices of all processes."""

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rynnvla_jax.cli import config_help
from rynnvla_jax.cli.arguments import OR_BUCKET, ConfigName, parse_with_overrides
from rynnvla_jax.cli.main import expected_error, quiet_libraries

PROGRAM = "rynnvla train"


@dataclass(frozen=True)
class Train:
    """Trains one stage on all devices of all processes.

    To start several processes, see `rynnvla launch --help`. The same command continues after any interruption. On
    SIGTERM it saves a checkpoint and exits with status 143; when a step hangs it writes the stacks of all threads and
    exits with status 75. Config files: configs/{action_vae,vqgan}.py:{tiny,full} and
    configs/{video,trajectory,robot}.py:{tiny,1b,7b,34b}, which are found from any directory, or your own.

      rynnvla train --config configs/robot.py:7b --workdir runs/robot --config.data.source=lerobot:DATA
      rynnvla train --help optimizer                         only the keys of the optimizer
      rynnvla train --config configs/robot.py:tiny --help    the values of this config
    """

    config: ConfigName
    """Config file and the argument of its get_config."""
    workdir: Annotated[Path, tyro.conf.arg(metavar="DIR"), OR_BUCKET]
    """Checkpoints, assets, metrics and logs go here: a gs:// bucket, or for several processes a shared file system."""


def main(argv: list[str]) -> int:
    """Returns the exit status; one of several processes may instead end immediately."""
    if {"-h", "--help"} & set(argv):
        print(config_help.text(Train, PROGRAM, argv))
        return 0
    arguments, overrides = parse_with_overrides(Train, PROGRAM, argv)
    from rynnvla_jax import config_file, config_origin

    loaded = config_file.load(arguments.config, overrides)
    import jax

    from rynnvla_jax.distributed import initialize, multihost
    from rynnvla_jax.train.loop import train

    quiet_libraries()
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from `preemption`
    try:
        initialize.initialize()
        config = loaded.build()
        with config_origin.explained(loaded.origins):
            train(config, arguments.workdir)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if (text := expected_error(error)) is not None:
            multihost.leave(f"{PROGRAM}: {text}")
        traceback.print_exc(file=sys.stderr)
        multihost.leave_at_once(
            f"process {jax.process_index()} stops; if the error above is about a connection, another process has "
            "ended, and its output says why. The same command continues from the last checkpoint"
        )
    return 0
