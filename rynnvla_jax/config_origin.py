"""Where a config's value was set: in a line of a config file, on the command line, or by default. Errors name it.

`recorded` makes the ConfigDict that config files start from (configs/sizes.py): it records the line that sets a key. A
ConfigDict that a file creates otherwise records nothing, and an error then names only the file.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rynnvla_jax.config import ConfigError, TrainConfig, to_dict

_KEY = re.compile(r"(config\.)?(\w+(?:\.\w+)*)")
_REMEDY = re.compile(r"; | Did you mean | Known keys: ")  # what follows names other keys than those at fault
_COPIES = ("__init__", "copy_and_resolve_references", "__deepcopy__", "__setstate__")  # of ml_collections: set nothing


class RecordedConfig(ConfigDict):
    """A ConfigDict that records which line of which file set a key last."""

    def __init__(self, *args: Any, **kwargs: Any):
        object.__setattr__(self, "lines", {})  # ConfigDict makes attributes into keys
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        plain = isinstance(value, ConfigDict) and not isinstance(value, RecordedConfig)
        super().__setitem__(key, recorded(value.to_dict()) if plain else value)
        if line := _line_outside():
            self.__dict__.setdefault("lines", {})[key] = line  # a copy is made without __init__


def recorded(values: Mapping[str, Any]) -> RecordedConfig:
    """Nested groups of values, without recorded lines yet."""
    config = RecordedConfig()
    for key, value in values.items():
        config[key] = recorded(value) if isinstance(value, Mapping) else value
    config.lines.clear()
    return config


def lines(config: ConfigDict, prefix: str = "") -> dict[str, str]:
    """{dotted key: FILE:LINE} of the keys whose line was recorded."""
    found = {f"{prefix}{key}": line for key, line in getattr(config, "__dict__", {}).get("lines", {}).items()}
    for key in config:
        if isinstance(config[key], ConfigDict):
            found |= lines(config[key], f"{prefix}{key}.")
    return found


def _line_outside() -> str:
    """FILE:LINE of the nearest caller outside of this file and ml_collections; "" where that only copies."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("ml_collections"):
        if frame.f_code.co_name in _COPIES:
            return ""
        frame = frame.f_back
    return f"{shown(frame.f_code.co_filename)}:{frame.f_lineno}"


def shown(file: str | Path) -> str:
    """A path as short as the working directory allows."""
    path, here = Path(file).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@dataclass(frozen=True)
class Origins:
    """Where the values of one config were set."""

    name: str  # FILE[:ARG]
    values: dict[str, Any]  # nested
    setters: dict[str, str]  # dotted key -> "was set ..."

    def origin_of(self, key: str) -> str:
        """Where a key was set, in words; "" if that is not known."""
        parents = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]  # itself first
        if found := next((self.setters[k] for k in parents if k in self.setters), ""):
            return found
        values = _flat(self.values)
        if key not in values or key == "stage":  # which has no default
            return f"comes from {self.name}" if key in values else ""
        default = _defaults().get(key, ...)  # an unknown key has none
        return "has its default of rynnvla_jax/config.py" if _plain(values[key]) == default else ""

    def with_point(self, point: Mapping[str, Any]) -> "Origins":
        """The origins after a sweep's point {key: value} was applied."""
        return replace(
            self, setters={**self.setters, **{k: f"was set to {v!r} by the point" for k, v in point.items()}}
        )


@contextlib.contextmanager
def explained(origins: Origins) -> Iterator[None]:
    """Adds to a ConfigError where the wrong values were set; its message has their full keys before any remedy."""
    try:
        yield
    except ConfigError as error:
        notes = [f"config.{key} {how}" for key in _keys(str(error)) if (how := origins.origin_of(key))]
        error.args = (f"{error} ({', '.join(notes)})",) if notes else error.args
        raise


def _keys(message: str) -> list[str]:
    """The config keys that a message reports as wrong; names without a dot only after `config.`."""
    fault = _REMEDY.split(message)[0]
    found = [key for prefix, key in _KEY.findall(fault) if prefix or key in _defaults() and "." in key]
    return list(dict.fromkeys(found))


def _defaults() -> dict[str, Any]:
    return _flat(to_dict(TrainConfig(stage="robot")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat[key] = value
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
