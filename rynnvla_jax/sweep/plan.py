"""The definition of a sweep: the points of a config file's `get_hyper(h)`, each a run with a number, name and config.

`OUT/sweep.json` is the definition, `OUT/<point>/` the work dir of a point, `OUT/<point>.log` its output.
"""

import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rynnvla_jax import config_file, config_origin
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.config import DERIVED, ConfigError, TrainConfig, check_key, from_dict, to_dict
from rynnvla_jax.config_file import OVERRIDE, LoadedConfig
from rynnvla_jax.storage import files
from rynnvla_jax.sweep import hyper

FILE = "sweep.json"
LONGEST = 100  # characters of a name, so that `<name>.log` is a file name everywhere
_MISSING = object()


@dataclass(frozen=True)
class Definition:
    """A config file, its argument and the command line's overrides, which all points have in common."""

    loaded: LoadedConfig

    @property
    def config(self) -> str:
        """FILE or FILE:ARG."""
        return self.loaded.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """As on the command line: --config.KEY=VALUE."""
        return self.loaded.overrides

    @property
    def base(self) -> dict[str, Any]:
        """Nested: what get_config gives, and the overrides."""
        return self.loaded.values

    def has(self, name: str) -> bool:
        """Whether the config file defines a function."""
        return hasattr(self.loaded.module, name)

    def call(self, name: str, first: Any, expected: type[Exception] | None = None) -> Any:
        """`name(first)` of the config file, or `name(first, arg)` where it takes the argument of get_config too.

        Raises:
          ConfigError: an error in it, with its line; an `expected` one is raised as it is.
        """
        takes_arg = len(inspect.signature(getattr(self.loaded.module, name)).parameters) > 1
        arguments = (first, self.loaded.arg) if self.loaded.arg and takes_arg else (first,)
        return self.loaded.call(name, *arguments, expected=expected)


@dataclass(frozen=True)
class Point:
    """One run of a sweep. Its name depends only on its number and keys, so equal definitions give equal names."""

    number: int
    keys: dict[str, Any]  # dotted, relative to the config
    config: TrainConfig
    name: str

    def arguments(self, definition: Definition, out: str | Path) -> list[str]:
        """The command without `rynnvla`: train --config ... --workdir OUT/NAME --config.KEY=VALUE ..."""
        own = [f"--config.{key}={value if isinstance(value, str) else repr(value)}" for key, value in self.keys.items()]
        workdir = f"--workdir={files.place(out) / self.name}"
        return ["train", f"--config={definition.config}", workdir, *definition.overrides, *own]

    def finished(self, out: str | Path) -> bool:
        """Whether its work dir has a verified checkpoint of the last step."""
        step = self.config.total_steps
        workdir = files.place(out) / self.name
        return step in reader.steps(workdir) and reader.is_marked(reader.step_folder(workdir, step))


def define(config: str, overrides: Sequence[str] = ()) -> Definition:
    """Loads FILE[:ARG] with overrides, as `rynnvla train` does.

    Raises:
      ConfigError: no such file, an error in it, an unknown key or a wrong value.
    """
    return Definition(config_file.load(config, overrides))


def points(definition: Definition) -> hyper.Points:
    """The points of get_hyper(h), unchecked.

    Raises:
      ConfigError: the file has no get_hyper, or it returns no points, or anything but dicts.
    """
    file = definition.config.partition(":")[0]
    if not definition.has("get_hyper"):
        raise ConfigError(
            f"{file} defines no get_hyper(h); add one, for example: "
            "def get_hyper(h): return h.product([h.sweep('seed', [0, 1]), h.sweep('optimizer.peak_lr', [1e-5, 2e-5])])"
        )
    found = definition.call("get_hyper", hyper)
    if not isinstance(found, list) or not all(isinstance(point, Mapping) for point in found):
        raise ConfigError(f"get_hyper of {file} must return a list of points (dicts), as h.product and h.sweep do")
    if not found:
        raise ConfigError(f"get_hyper of {file} returned no points; return at least one")
    return found


def resolve(definition: Definition, found: Sequence[Mapping[str, Any]]) -> tuple[list[Point], list[tuple[int, str]]]:
    """The valid points, and (number, fault) of invalid points and of duplicates."""
    good: list[Point] = []
    faults: list[tuple[int, str]] = []
    for number, keys in enumerate(found):
        try:
            good.append(make_point(definition, number, keys))
        except ConfigError as error:
            faults += [(number, line) for line in str(error).split("\n")]
    first: dict[str, Point] = {}
    for point in good:
        # Compared as whole configs: two points may spell the same run with different keys.
        before = first.setdefault(json.dumps(to_dict(point.config), sort_keys=True), point)
        if before is not point:
            faults.append((point.number, f"the same run as {before.name}; remove one of them"))
    return good, faults


def make_point(definition: Definition, number: int, point: Mapping[str, Any]) -> Point:
    """Raises ConfigError, with one line per fault, when `point` does not give a valid config."""
    keys = {key: _plain(value) for key, value in point.items()}
    values, faults = copy.deepcopy(definition.base), []
    for key, value in keys.items():
        if both := [o for o in _overridden(definition.overrides) if _overlap(o, key)]:
            faults.append(f"{key} is set by --config.{both[0]} and by the sweep; remove one of the two")
        elif fault := _set(values, key, value):
            faults.append(fault)
    if faults:
        raise ConfigError("\n".join(faults))
    with config_origin.explained(definition.loaded.origins.with_point(keys)):
        config = from_dict(TrainConfig, values)
    return Point(number, keys, config, name(number, point))


def name(number: int, point: Mapping[str, Any]) -> str:
    """003_peak_lr=1e-05,seed=1: number, names of named points, then the keys that no name replaces."""
    told: frozenset[str] = getattr(point, "told", frozenset())
    parts = [*getattr(point, "names", ()), *(f"{short(k)}={brief(v)}" for k, v in point.items() if k not in told)]
    text = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(parts))
    return f"{number:03d}_{text}"[:LONGEST].rstrip("_-,.")


def short(key: str) -> str:
    """The shortest suffix of a dotted key that is unique in a config."""
    parts, known = key.split("."), _known_keys()
    for i in reversed(range(len(parts))):
        end = ".".join(parts[i:])
        if sum(f".{k}".endswith(f".{end}") for k in known) <= 1:
            return end
    return key


def brief(value: Any) -> str:
    """A value in few characters; of a path the last part."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] or "none"
    return ",".join(map(brief, value)) if isinstance(value, tuple | list) else str(value)


def differing(found: Sequence[Point]) -> list[str]:
    """Dotted keys whose values are not the same in all points."""
    flat = [flattened(to_dict(point.config)) for point in found]
    return [key for key in flat[0] if any(other[key] != flat[0][key] for other in flat[1:])]


def flattened(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested groups."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def remember(
    definition: Definition,
    found: Sequence[Point],
    out: Path,
    metric: str,
    search: dict[str, Any] | None = None,
) -> None:
    """Writes `OUT/sweep.json`, or checks that it is the same sweep; new points may be added at the end.

    Raises:
      ConfigError: `out` contains another sweep; the message lists the differences.
    """
    file = out / FILE
    content = {
        "config": definition.config,
        "overrides": list(definition.overrides),
        "metric": metric,
        "search": search,
        "points": [{"name": p.name, "keys": p.keys, "config": to_dict(p.config)} for p in found],
    }
    before = recalled(out)
    if before is not None and (changes := list(_changes(before, json.loads(json.dumps(content))))):
        raise ConfigError(
            f"{out} contains another sweep:\n  "
            + "\n  ".join(changes)
            + "\nUse the same definition (add new points at the end), or choose another --out"
        )
    files.write_json(file, content)


def check_vacant(out: Path) -> None:
    """Raises ConfigError when `out` contains anything but a sweep."""
    if out.is_dir() and not (out / FILE).exists() and any(path.name != "lock" for path in files.contents(out)):
        raise ConfigError(f"{out} is not empty and is not a sweep ({FILE} is missing); choose another --out")


def recalled(out: str | Path) -> dict[str, Any] | None:
    """The content of `OUT/sweep.json`; None if there is no such file."""
    file = files.place(out) / FILE
    return files.read_json(file) if file.exists() else None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before["search"] != now["search"]:
        yield f"search: {_search_text(before['search'])} -> {_search_text(now['search'])}"
    for old, new in zip(before["points"], now["points"], strict=False):
        if (old["name"], old["keys"]) != (new["name"], new["keys"]):
            yield f"point {old['name']} {old['keys']} -> {new['name']} {new['keys']}"
            continue
        # Read through today's dataclass, so that a key that is new since then has its default and is no difference.
        a = flattened(to_dict(from_dict(TrainConfig, old["config"], f"{FILE}, {old['name']}")))
        b = flattened(new["config"])
        for key in a:
            if a[key] != b[key]:
                yield f"{old['name']}: config.{key}: {a[key]!r} -> {b[key]!r}"
    for old in before["points"][len(now["points"]) :]:
        yield f"point {old['name']} is missing"


def _search_text(search: dict[str, Any] | None) -> str:
    return ", ".join(f"{k} {v}" for k, v in search.items()) if search else "none"


def _set(values: dict[str, Any], key: str, value: Any) -> str | None:
    """Sets a dotted key of nested groups; what is wrong with it otherwise."""
    *groups, last = key.split(".")
    at: Any = values
    for group in groups:
        at = at.get(group, _MISSING) if isinstance(at, dict) else _MISSING
    there = at.get(last, _MISSING) if isinstance(at, dict) else _MISSING
    if isinstance(there, dict):
        return f"config.{key} is a group of keys; set one of {', '.join(f'{key}.{k}' for k in there)}"
    if there is _MISSING and not (key in DERIVED and isinstance(at, dict)):
        return _unknown(key)
    at[last] = value
    return None


def _unknown(key: str) -> str:
    """The fault of a key that get_config does not set."""
    try:
        check_key(TrainConfig, key)
    except ConfigError as error:
        return str(error)
    return f"config.{key} is not a key that get_config sets; set it there, too"


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _overridden(overrides: Sequence[str]) -> list[str]:
    return [found[1] for text in overrides if (found := OVERRIDE.fullmatch(text))]


def _overlap(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


@functools.cache
def _known_keys() -> tuple[str, ...]:
    return (*flattened(to_dict(TrainConfig(stage="video"))), *DERIVED)
