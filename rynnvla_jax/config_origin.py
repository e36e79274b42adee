"""What set a config's value: a line of a config file, the command line, or a default. Errors are told with it."""

import contextlib
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rynnvla_jax.config import ConfigError, TrainConfig, to_dict
from rynnvla_jax.config_file import OVERRIDE

_KEY = re.compile(r"(config\.)?(\w+(?:\.\w+)*)")
_REMEDY = re.compile(r"; | Did you mean | Known keys: ")  # what follows names other keys than those at fault


@contextlib.contextmanager
def told(argv: Sequence[str], point: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Adds to a ConfigError what set the values it faults; it names their keys in full, before any remedy.

    Args:
      argv: with --config=FILE[:ARG] and --config.KEY=VALUE, of a command that has loaded them.
      point: {key: value} of a sweep's point, set after these.
    """
    try:
        yield
    except ConfigError as error:
        if keys := _keys(str(error)):
            by = _Origins(argv, point or {})
            notes = [f"config.{key} {how}" for key in keys if (how := by.of(key))]
            error.args = (f"{error} ({', '.join(notes)})",) if notes else error.args
        raise


def _keys(message: str) -> list[str]:
    """The config keys that a message faults; names without a dot only where it writes `config.` before them."""
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
        if isinstance(value, Mapping | ConfigDict):
            flat |= _flat(value, f"{key}.")
    return flat


class _Origins:
    """Runs the config file once more and watches which line sets what."""

    def __init__(self, argv: Sequence[str], point: Mapping[str, Any]):
        flags = [match for text in argv if (match := OVERRIDE.fullmatch(text))]
        self._set = {match[1]: f"was set by {match[0]}" for match in flags}
        self._set |= {key: f"was set to {value!r} by the point" for key, value in point.items()}
        self._name = _config_argument(argv)
        self._config, self._lines = _watched(*self._name.split(":", 1))

    def of(self, key: str) -> str:
        """What set a key, in words; "" where that cannot be told."""
        parents = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]  # itself first
        for known in (self._set, self._lines):
            if found := next((known[k] for k in parents if k in known), ""):
                return found
        values = _flat(self._config)
        if key not in values or key == "stage":  # which has no default
            return f"comes from {self._name}" if key in values else ""
        return "has its default of rynnvla_jax/config.py" if _plain(values[key]) == _defaults()[key] else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _config_argument(argv: Sequence[str]) -> str:
    """What follows --config; the last one counts."""
    found = ""
    for text, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = text.partition("=")
        if name in ("--config", "-config"):
            found = value if equals else after
    return found


def _watched(file: str, *arg: str) -> tuple[ConfigDict, dict[str, str]]:
    """The config of a file, and {key: where it was set last}; nothing of what a new ConfigDict is made with."""
    places: dict[tuple[int, Any], str] = {}
    groups = []  # kept, so that no other gets the same id
    original = ConfigDict.__setitem__

    def watching(self, key, value):
        original(self, key, value)
        made, frame = False, sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("ml_collections"):
            made |= frame.f_code.co_name == "__init__"
            frame = frame.f_back
        if not made:
            groups.append(self)
            places[id(self), key] = f"was set in {_short(frame.f_code.co_filename)}:{frame.f_lineno}"

    ConfigDict.__setitem__ = watching
    try:
        config = runpy.run_path(file)["get_config"](*arg)
    finally:
        ConfigDict.__setitem__ = original
    return config, _by_key(config, places)


def _by_key(group: ConfigDict, places: Mapping[tuple[int, Any], str], prefix: str = "") -> dict[str, str]:
    found = {}
    for name in group:
        if (id(group), name) in places:
            found[f"{prefix}{name}"] = places[id(group), name]
        if isinstance(group[name], ConfigDict):
            found |= _by_key(group[name], places, f"{prefix}{name}.")
    return found


def _short(file: str) -> str:
    path, here = Path(file).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
