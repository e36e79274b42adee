"""The keys of the config, in groups, with descriptions and values: `rynnvla train --help [WORD ...]`."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rynnvla_jax.cli.arguments import help_text
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import DERIVED, TrainConfig
from rynnvla_jax.errors import did_you_mean

WIDTH = 118


def text(cls: type, program: str, argv: Sequence[str]) -> str:
    """The help of a command, followed by all keys of the config, or only by those that match the WORDs.

    The values are those of `--config FILE` where it is given.

    Raises:
      UsageError: no key matches a word.
      ConfigError: the config file or an override is wrong.
    """
    name, overrides, words = _read(argv)
    values, heading = TrainConfig(stage="robot"), "their defaults, before a config file sets its own"
    if name:
        from rynnvla_jax import config_file

        values, heading = config_file.load(name, overrides).build(), f"the values of {name}"
    found = list(keys(values))
    for word in words:
        about = [key for key in found if _is_about(key, word.lower().removeprefix("--").removeprefix("config."))]
        if not about:
            known = [part for key in found for part in key.name.split(".")]
            raise UsageError(f"no key matches {word!r}.{did_you_mean(word, known)}")
        found = about
    lines = [f"Keys of the config, with {heading}; set any of them with --config.KEY=VALUE:"]
    for group in dict.fromkeys(key.group for key in found):
        lines += ["", f"{group or 'config'}: {_summary(group)}"]
        for key in (key for key in found if key.group == group):
            lines.append(f"  --config.{key.name}={shown(key.value)}")
            lines += textwrap.wrap(key.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines if words else [help_text(cls, program), "", *lines])


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config."""

    group: str  # dotted, "" at the top
    name: str  # dotted, whole
    value: Any
    description: str


def keys(values: Any, group: str = "") -> Iterator[Key]:
    """Every key of a config; those of a group before its groups."""
    cls: type = type(values)
    texts = descriptions(cls)
    inner = [f for f in dataclasses.fields(values) if dataclasses.is_dataclass(getattr(values, f.name))]
    for field in dataclasses.fields(values):
        name = f"{group}.{field.name}".lstrip(".")
        if field not in inner and name not in DERIVED:
            yield Key(group, name, getattr(values, field.name), texts[field.name])
    for field in inner:
        yield from keys(getattr(values, field.name), f"{group}.{field.name}".lstrip("."))


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
    """{field: the string below it}; "" where there is none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[node.target.id] = str(after.value.value)
    return found


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) and value else repr(value)


def _is_about(key: Key, word: str) -> bool:
    return word in key.name.lower() or word in key.description.lower()


def _summary(group: str) -> str:
    """The first sentence about a group."""
    cls: Any = TrainConfig
    for name in filter(None, group.split(".")):
        cls = {f.name: f.type for f in dataclasses.fields(cls)}[name]
    return (cls.__doc__ or "").strip().splitlines()[0].partition(" Source:")[0]


def _read(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(FILE[:ARG] or "", overrides, words) of a command line that asks for help."""
    name, overrides, words = "", [], []
    left = [word for word in argv if word not in ("-h", "--help")]
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--config", "--workdir"):
            value = value if equals else (left.pop(0) if left else "")
            name = value if option == "--config" else name
        elif option.startswith("--config.") and equals:
            overrides.append(word)
        else:
            words.append(word)
    return name, overrides, words
