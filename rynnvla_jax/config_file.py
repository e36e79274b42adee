"""`--config FILE:SIZE --config.KEY=VALUE ...`, the same for every command that takes a config (ml_collections)."""

import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from rynnvla_jax.config import ConfigError, TrainConfig, check_key

OVERRIDE = re.compile(r"--?config\.([\w.]+)(=.*)?", re.DOTALL)  # --config.KEY=VALUE


def config_from_flags(program: str, argv: list[str], **texts: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The nested dict of a config file with the command line's overrides, and further string flags by name.

    Args:
      texts: name and help of the string flags that the command takes besides.

    Raises:
      ConfigError: no --config, an unknown flag or key, a value that the config does not take.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for name, help_ in texts.items():
        flags.DEFINE_string(name, None, help_, flag_values=values)
    sys.argv = [program, *argv]  # ml_collections reads overrides from there
    try:
        left = values(sys.argv)
        config = values["config"].value
        config = None if config is None else config.to_dict()
    except (AttributeError, KeyError, OSError, TypeError, ValueError, flags.Error) as error:
        for text in argv:  # ml_collections tells the last part of an unknown key only
            if override := OVERRIDE.fullmatch(text):
                check_key(TrainConfig, override[1])
        lines = str(error).replace("\\n", " ").strip().splitlines()
        message = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 else lines[0]  # between them: a trace
        raise ConfigError(f"{message}. `{program} --help` says more") from error
    if len(left) > 1:
        raise ConfigError(f"unknown arguments: {' '.join(left[1:])}. `{program} --help` says more")
    if config is None:
        raise ConfigError(f"--config is required, for example: {program} --config configs/robot.py:tiny")
    return config, {name: values[name].value for name in texts}
