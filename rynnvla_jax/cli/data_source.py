"""--config.data.KEY=VALUE of the commands that read a data set without a config file."""

import ast
import re
import sys
from collections.abc import Mapping, Sequence

from rynnvla_jax.cli.arguments import T, help_text, parse
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import ConfigError, DataConfig, from_dict
from rynnvla_jax.storage import files

_OPTION = re.compile(r"--config\.data\.([\w.]+)=(.*)", re.DOTALL)
_HELP = "  --config.data.KEY=VALUE  A key of config.data; `rynnvla train --help data` lists them."


def parse_with_data(
    cls: type[T], program: str, argv: Sequence[str], renamed: Mapping[str, str] | None = None
) -> tuple[T, DataConfig]:
    """`arguments.parse` for a command that reads data sets; the second value is the config of --config.data.KEY=VALUE.

    The former --data KEY=VALUE is accepted, with a notice on stderr.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{help_text(cls, program).rstrip()}\n{_HELP}")
        sys.exit(0)
    from rynnvla_jax import config_file

    words, before = [], ""
    for word in argv:
        name, equals, value = word.partition("=")
        if before == "--data" or (name == "--data" and equals):
            pair = word if before == "--data" else value
            if not re.match(r"[\w.]+=", pair):
                raise UsageError(
                    f"--data {pair}: name the data set as --help shows, and keys as --config.data.KEY=VALUE"
                )
            words.append(f"--config.data.{pair}")
            print(f"{program}: --data {pair} is now {words[-1]}", file=sys.stderr)
        elif word != "--data":
            words.append(word)
        before = word if before != "--data" else ""
    own, overrides = config_file.split(words)
    data = data_config(overrides)
    arguments = parse(cls, program, own, renamed)
    files.check(data.exclude)
    return arguments, data


def data_config(overrides: Sequence[str]) -> DataConfig:
    """The config of "--config.data.KEY=VALUE" texts. Raises ConfigError for another form or an unknown key."""
    values: dict = {}
    for override in overrides:
        found = _OPTION.fullmatch(override)
        if not found:
            raise ConfigError(f"{override} is not of the form --config.data.KEY=VALUE")
        try:
            value = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):
            value = found[2]
        *parents, last = found[1].split(".")
        group = values
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise ConfigError(
                    f"{override}: another option sets {parent} to a single value; it is a group; remove one of them"
                )
        group[last] = value
    return from_dict(DataConfig, values, "config.data")
