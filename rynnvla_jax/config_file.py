"""`--config FILE[:ARG] --config.KEY=VALUE ...`, the same for every command that takes a config.

FILE is Python with `get_config(arg)`; it is run once. ml_collections reads the overrides. The files of
rynnvla_jax/configs are found as `configs/...` from any directory.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rynnvla_jax import config_origin
from rynnvla_jax.config import DERIVED, REPLACED, ConfigError, TrainConfig, check_key, from_dict
from rynnvla_jax.config_origin import Origins, shown
from rynnvla_jax.errors import did_you_mean, shorten
from rynnvla_jax.storage import files

CONFIGS = "rynnvla_jax.configs"
PACKAGED = Path(__file__).parent / "configs"
OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)(=.*)?", re.DOTALL)  # --config.KEY=VALUE
_MODULE = "rynnvla_config_file"  # the name under which a user's file is run


@dataclass(frozen=True, eq=False)
class LoadedConfig:
    """A config file that was run, with the command line's overrides."""

    name: str  # FILE or FILE:ARG, as given
    overrides: tuple[str, ...]  # as given: --config.KEY=VALUE
    values: dict[str, Any]  # nested: what get_config gives, and the overrides
    origins: Origins
    path: Path
    module: ModuleType

    @property
    def arg(self) -> str | None:
        """The part after the colon of FILE:ARG."""
        return self.name.partition(":")[2] or None

    def build(self) -> TrainConfig:
        """The typed config. Raises ConfigError, which says where the wrong value was set."""
        with config_origin.explained(self.origins):
            return from_dict(TrainConfig, self.values)

    def call(self, name: str, *arguments: Any, expected: type[Exception] | None = None) -> Any:
        """Calls `name(*arguments)` of the file. Raises ConfigError with the failing line, or an `expected` error."""
        with _running(self.path, expected):
            return getattr(self.module, name)(*arguments)


def load(name: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Runs FILE[:ARG] and applies `overrides`.

    Raises:
      ConfigError: no such file, an error in it with its line, an unknown key or a wrong value.
    """
    file, _, arg = name.partition(":")
    path = find(file)
    module = _module(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} defines no get_config(arg); configs/robot.py is an example")
    arguments = [arg] if arg else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        takes = "takes no argument; leave out" if arg else "needs an argument; write"
        raise ConfigError(f"get_config of {file} {takes} :{arg or 'ARG'} after {file}") from None
    with _running(path):
        config = module.get_config(*arguments)
    if not isinstance(config, ConfigDict | dict):
        raise ConfigError(f"get_config of {file} returned {type(config).__name__}; return an ml_collections.ConfigDict")
    try:
        config = ConfigDict(config) if isinstance(config, dict) else config
        setters = {key: f"was set in {line}" for key, line in config_origin.lines(config).items()}
        config.to_dict()
    except (TypeError, ValueError, AttributeError, RecursionError) as error:  # keys that are no names, circles
        raise ConfigError(
            f"get_config of {file} returned values that are no config ({shorten(error)}); its keys are texts, and no "
            "group contains itself"
        ) from None
    _override(config, overrides)
    setters |= {
        found[1]: f"was set by {shorten(text, 200)}" for text in overrides if (found := OVERRIDE.fullmatch(text))
    }
    values = config.to_dict()
    for old, new in REPLACED.items():
        if old in setters:
            print(f"config.{old} has no effect any more: set config.{new} instead ({setters[old]})", file=sys.stderr)
    return LoadedConfig(name, tuple(overrides), values, Origins(name, values, setters), path, module)


def find(file: str) -> Path:
    """The path of a config file; `configs/...` is a packaged file if the working directory has no such file.

    Raises:
      ConfigError: there is no such file; suggests a similar name.
    """
    path = files.place(file)
    packaged = PACKAGED / path.relative_to("configs") if path.parts[:1] == ("configs",) else None
    for candidate in (path, packaged):
        if candidate and files.exists(candidate) and candidate.is_file():
            return candidate
    if files.exists(path) and path.is_dir():
        raise ConfigError(f"--config {file} is a directory; give a config file in it")
    found = [f"configs/{p.relative_to(PACKAGED)}" for p in sorted(PACKAGED.rglob("[a-z]*.py")) if p.stem != "sizes"]
    found += (
        [str(p) for p in sorted(path.parent.glob("*.py"))] if files.exists(path.parent) and path.parent.is_dir() else []
    )
    by_name = {Path(p).name: p for p in found}  # whole paths would be alike by their folder's name alone
    near = did_you_mean(path.name, by_name)
    for name, known in by_name.items():
        near = near.replace(f" {name}?", f" {known}?")
    raise ConfigError(f"--config {shorten(file)}: there is no such file.{near}")


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other words, overrides) of a command line; overrides are --config.KEY=VALUE or, for a switch, --config.KEY."""
    rest: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        found = OVERRIDE.fullmatch(word)
        if found and not found[2] and words and not words[0].startswith("--"):
            overrides.append(f"{word}={words.pop(0)}")
        else:
            (overrides if found else rest).append(word)
    return rest, overrides


def _override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Applies --config.KEY=VALUE as ml_collections parses them. Raises ConfigError."""
    values = flags.FlagValues()
    try:
        argv = ["rynnvla", *(text for text in overrides if not _set_old(config, text))]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        left = values(argv)[1:]
    except Exception as error:  # absl's, ml_collections' and those of Python's own parser of values
        for text in overrides:  # ml_collections tells the last part of an unknown key only
            if override := OVERRIDE.fullmatch(text):
                check_key(TrainConfig, override[1])
        lines = str(error).replace("\\n", " ").strip().splitlines() or [type(error).__name__]
        message = f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 else lines[0]  # between them: a trace
        message = shorten(message)
        raise ConfigError(message) from error
    if left:
        raise ConfigError(f"{' '.join(left)} is not of the form --config.KEY=VALUE")


def _set_old(config: ConfigDict, text: str) -> bool:
    """Whether --config.KEY=VALUE sets a key that `TrainConfig` derives now or has no more: `from_dict` judges it."""
    found = OVERRIDE.fullmatch(text)
    if not found or found[1] not in (*DERIVED, *REPLACED):
        return False
    switch = "false" if text.lstrip("-").startswith("no") else "true"
    value: Any = (found[2] or "").removeprefix("=") or switch
    with contextlib.suppress(ValueError):  # `from_dict` says what is wrong with other words
        value = json.loads(value.lower())
    group, _, name = found[1].partition(".")
    with config.unlocked():
        if group not in config:
            config[group] = ConfigDict()
        with config[group].unlocked():
            config[group][name] = value
    return True


def _module(path: Path) -> ModuleType:
    """Runs a config file and returns its module; a packaged one is imported."""
    file = path.resolve()
    with _running(path):
        if file.is_relative_to(PACKAGED.resolve()):
            parts = file.relative_to(PACKAGED.resolve()).with_suffix("").parts
            return importlib.import_module(".".join((CONFIGS, *parts)))
        spec = importlib.util.spec_from_file_location(f"{_MODULE}.{path.stem}", file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--config {path} is not a Python file; its name must end in .py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
        return module


@contextlib.contextmanager
def _running(path: Path, expected: type[Exception] | None = None) -> Iterator[None]:
    """Context manager for running a config file: it can import files of its folder, and errors become ConfigErrors."""
    folder = str(path.resolve().parent)
    package, old = ModuleType(_MODULE), ModuleType("configs")
    package.__path__ = [folder]  # `from .neighbour import x` works like `from neighbour import x`
    old.__path__ = [str(PACKAGED)]
    before = set(sys.modules)
    sys.modules[_MODULE] = package
    sys.path.insert(0, folder)
    if "configs" not in sys.modules and importlib.util.find_spec("configs") is None:
        sys.modules["configs"] = old  # their name before they were part of the package
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (ConfigError, *filter(None, [expected]))):
            raise
        raise ConfigError(_described(error, folder)) from error
    finally:
        sys.path.remove(folder)
        if sys.modules.get("configs") is old:
            for name in [name for name in sys.modules if name.startswith("configs.")][:1]:
                print(f"{shown(path)}: {name} is now rynnvla_jax.{name}", file=sys.stderr)
        new = set(sys.modules) - before  # forgotten again: another folder may have neighbours of the same names
        neighbours = {name for name in new if "." not in name and _lies_in(sys.modules[name], folder)}
        for name in new:
            if name.partition(".")[0] in (_MODULE, "configs", *neighbours):
                del sys.modules[name]


def _words(error: BaseException) -> str:
    """The message of an error, on one line; ml_collections puts a KeyError into an AttributeError."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = (
        str(error.args[0]) if isinstance(error, KeyError) and error.args and "\n" in str(error.args[0]) else str(error)
    )
    return " ".join(text.split())


def _lies_in(module: ModuleType, folder: str) -> bool:
    """Whether a module, or a package without a file of its own, is directly in a folder."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
    return any(Path(place).parent == Path(folder) for place in places)


def _described(error: BaseException, folder: str) -> str:
    """FILE:LINE: error, and the source line; messages of the packaged files about their argument are not changed."""
    frames = traceback.extract_tb(error.__traceback__)
    packaged = str(PACKAGED.resolve())  # imported files are named by the link to it
    paths = [str(Path(f.filename).resolve()) for f in frames]
    mine = [f for f, file in zip(frames, paths, strict=True) if file.startswith((folder, packaged))]
    if isinstance(error, ValueError) and mine and paths[-1].startswith(packaged):
        return str(error)
    file, number, line = (mine[-1].filename, mine[-1].lineno, mine[-1].line) if mine else (folder, 0, "")
    text = shorten(_words(error))
    if isinstance(error, SyntaxError):
        file, number, line, text = error.filename or file, error.lineno or number, error.text or "", error.msg
    return f"{shown(file)}:{number}: {type(error).__name__}: {text}\n    {shorten(line or '', 200)}"
