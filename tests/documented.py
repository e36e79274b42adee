"""Finds the commands and programs in Markdown files and checks that the real command lines accept them.

A command is a line of a code block, or text between backticks, that begins with one of `PROGRAMS` (after environment
variables, if any). The program's own parser parses it, without running it. Documentation may write what a shell would
not accept: [--optional parts]; alternatives a|b, each of which is tried; PLACEHOLDERS in capitals for any value; and
... for further arguments, in which case required options may be missing, as they always may between backticks.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal
from unittest import mock

from rynnvla_jax.config import ConfigError
from tests import ROOT

PROGRAMS = ("rynnvla", "make", "python", "pip", "lerobot-eval", "lerobot-rollout", "lerobot-train")
OTHERS = ("tensorboard", "python3.11", "sh", "gcloud")  # programs of other projects; only their names are checked
PLUGIN = "plugins/lerobot_policy_rynnvla"
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=\S*")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")
_OPTIONAL = re.compile(r"(?<=\s)\[(-[^\]]*)\]")
_VALUES = {"FILE[:SIZE]": "configs/robot.py:tiny", "FILE": "configs/robot.py:tiny", ":SIZE": ":tiny", "=VALUE": "=1"}
_SHELL = ("sh", "bash", "shell", "console")


class DocumentationError(AssertionError):
    """A document contains something that the program does not know."""


@dataclass(frozen=True)
class DocumentedCommand:
    """One command as written in `where` (file and line); `loose` ones may lack required options."""

    text: str
    where: str
    loose: bool = False


class _Stop(BaseException):
    """Raised after parsing, instead of running the command."""


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, language, text) of fenced and of indented code; the language of the latter is ''."""
    lines, i = text.splitlines(), 0
    while i < len(lines):
        first = i
        if fence := re.match(r"( *)```(\w*)", lines[i]):
            i += 1
            while i < len(lines) and lines[i].strip() != "```":
                i += 1
            yield first + 2, fence[2], "\n".join(line.removeprefix(fence[1]) for line in lines[first + 1 : i])
            i += 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            yield first + 1, "", "\n".join(line[4:] for line in lines[first:i])
        else:
            i += 1


def prose(text: str) -> str:
    """The document with its code blocks blanked out; every line keeps its number."""
    lines = text.splitlines()
    for first, language, code in list(blocks(text)):
        count = code.count("\n") + 1
        fenced = language or lines[first - 2].strip().startswith("```") if first > 1 else False
        low, high = (first - 2, first + count) if fenced else (first - 1, first - 1 + count)
        lines[low:high] = [""] * len(lines[low:high])
    return "\n".join(lines)


def commands(text: str, name: str = "text") -> Iterator[DocumentedCommand]:
    """Every command of a document.

    Raises:
      DocumentationError: a line of a shell block that begins with an unknown program.
    """
    for first, language, code in blocks(text):
        if language not in ("", *_SHELL):
            continue
        number = first
        for line in code.replace("\\\n", "\\\0").splitlines():
            where, number = f"{name}:{number}", number + 1 + line.count("\0")
            line = line.replace("\\\0", " ").strip()
            program = _program(line)
            if program in PROGRAMS:
                yield DocumentedCommand(line, where)
            elif language and line and not line.startswith("#") and program not in OTHERS:
                raise DocumentationError(
                    f"{where}: {program!r} is not a program that tests/documented.py knows: {line}"
                )
    written = prose(text)
    for span in re.finditer(r"(?<!`)`([^`]+)`(?!`)", written):
        line = " ".join(span[1].split())
        if _program(line) in PROGRAMS and " " in line:
            yield DocumentedCommand(line, f"{name}:{written.count(chr(10), 0, span.start()) + 1}", loose=True)


def _program(line: str) -> str:
    words = [w for w in line.split() if not _ASSIGNMENT.fullmatch(w)]
    return re.sub(r"^(LEROBOT|\.venv)/bin/", "", words[0]) if words else ""


def check(command: DocumentedCommand, files: Path | None = None) -> None:
    """Raises DocumentationError when the program would not accept the command; `files` is where `write_files` wrote."""
    text = _OPTIONAL.sub(r"\1", command.text)
    for written, value in _VALUES.items():
        text = text.replace(written, value)
    words = shlex.split(text, comments=True)
    loose = command.loose or "..." in words
    words = [_file(w, files) for w in words if w != "..." and not _ASSIGNMENT.fullmatch(w)]
    for chosen in itertools.product(*(_alternatives(w) for w in words)):
        try:
            _check_words(_program(chosen[0]), list(chosen[1:]), loose, foreign=chosen[0].startswith("LEROBOT/"))
        except DocumentationError as error:
            raise DocumentationError(f"{command.where}: {command.text}\n  {error}") from None


def write_files(text: str, folder: Path) -> None:
    """Writes the files that a document shows: Python blocks whose first line is `# NAME.py`."""
    for _, language, code in blocks(text):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", code)):
            (folder / name[1]).write_text(code, encoding="utf-8")


def _file(word: str, folder: Path | None) -> str:
    name, colon, size = word.partition(":")
    shown = folder is not None and name.endswith(".py") and (folder / name).is_file()
    return f"{folder / name}{colon}{size}" if shown else word


def _alternatives(word: str) -> list[str]:
    plain = "|" in word and not re.search(r"[\s'\"()]", word)
    return word.split("|") if plain else [word]


def _check_words(program: str, words: list[str], loose: bool, foreign: bool) -> None:
    if program == "make":
        _check_make(words)
    elif program == "pip":
        _check_pip(words)
    elif program.startswith("lerobot-"):
        _check_plugin(words)
    elif program == "python":
        _check_python(words, loose, foreign)
    else:
        _check_rynnvla(words, loose)


def _check_rynnvla(words: list[str], loose: bool) -> None:
    from rynnvla_jax.cli import main as cli

    if not words or _PLACEHOLDER.fullmatch(words[0]):
        return
    if words[0] == "launch" and "--" in words:
        _check_rynnvla(words[words.index("--") + 1 :], loose)
    if words[0] in ("data", "launch", "convert", "checkpoint", "deploy") and len(words) == 1:
        return
    _parse(lambda: cli.main(words), loose)


def _parse(run, loose: bool) -> None:
    """Runs a program until its command line is parsed, with any parser.

    Raises:
      DocumentationError: the program ends earlier, with an error of its parser or its configuration.
    """
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for patch in _patches(loose):
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(sys, "argv", sys.argv))
        try:
            status = run()
        except _Stop:
            return
        except SystemExit as end:
            status = end.code
        except Exception as error:  # what get_hyper of a file that a document shows may raise
            raise DocumentationError(f"{type(error).__name__}: {error}") from error
    if status:
        text = said.getvalue() if isinstance(status, int) else str(status)
        if loose and re.search(r"is required|are required|lacks", text):
            return
        lines = text.strip().splitlines() or [f"status {status}"]
        raise DocumentationError(next((x for x in lines if re.search("error|unknown|^rynnvla", x)), lines[-1]))


def _patches(loose: bool) -> Iterator[contextlib.AbstractContextManager]:
    """Makes parsers accept placeholders and stop after parsing, and commands with a config stop before their work."""
    from rynnvla_jax.cli import arguments

    parser, parse_ours = argparse.ArgumentParser, arguments.parse
    parse_known, value, choice = parser.parse_known_args, parser._get_value, parser._check_value

    def get_value(self, action, text):
        return text if _PLACEHOLDER.fullmatch(text) else value(self, action, text)

    def check_value(self, action, found):
        known = isinstance(found, str) and _PLACEHOLDER.fullmatch(found)
        if not known:
            choice(self, action, found)

    def stop(*_, **__):
        raise _Stop

    inside = False  # a sub-command's parser, called by its command's

    def parsed(self, args, namespace):
        nonlocal inside
        inside = True
        try:
            return parse_known(_strict(self, loose), args, namespace)
        finally:
            inside = False

    def parse_args(self, args=None, namespace=None):
        _, left = parsed(self, args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        raise _Stop

    def parse_known_args(self, args=None, namespace=None):
        if inside:
            return parse_known(self, args, namespace)
        _, left = parsed(self, args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        raise _Stop

    def parse(cls, program, argv, renamed=None, ask=False):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found = parse_ours(cls, program, _with_values(cls, argv), renamed, ask=False)  # buckets are placeholders
        if " is now " in said.getvalue():
            raise DocumentationError(said.getvalue().strip())
        if not hasattr(found, "config") and not cls.__module__.startswith("rynnvla_jax.launch"):
            raise _Stop
        return found  # goes on to look at its config file, or is the job of a sweep

    def parse_with_overrides(cls, program, argv, renamed=None):
        from rynnvla_jax import config_file

        own, overrides = config_file.split(argv)
        found = parse(cls, program, own, renamed)
        if program == "rynnvla sweep":
            return found, overrides
        config_file.load(found.config, overrides).build()
        raise _Stop

    def checked(definition, points, *_, **__):
        from rynnvla_jax.sweep import plan

        _, faults = plan.resolve(definition, points)
        if faults:
            raise ConfigError(f"{faults}")
        raise _Stop

    yield mock.patch.dict(os.environ)
    yield mock.patch.object(parser, "_get_value", get_value)
    yield mock.patch.object(parser, "_check_value", check_value)
    yield mock.patch.object(parser, "parse_args", parse_args)
    yield mock.patch.object(parser, "parse_known_args", parse_known_args)
    for module in _commands():
        for name, replaced in (("parse", parse), ("parse_with_overrides", parse_with_overrides)):
            if hasattr(module, name):
                yield mock.patch.object(module, name, replaced)
    yield mock.patch("rynnvla_jax.sweep.listing.checked", checked)
    yield mock.patch("rynnvla_jax.storage.buckets.check", lambda *_, **__: None)


def _commands() -> Iterator[ModuleType]:
    """The modules of the commands."""
    for file in sorted((ROOT / "rynnvla_jax" / "cli").glob("[a-z]*.py")):
        if file.stem not in ("arguments", "main"):
            yield importlib.import_module(f"rynnvla_jax.cli.{file.stem}")


def _with_values(cls: type, words: Sequence[str]) -> list[str]:
    """The words, with a number or a choice instead of a PLACEHOLDER where the option needs one."""
    types = {_option(f): typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    found = []
    for word, before in zip(words, ["", *words], strict=False):
        name, equals, value = word.partition("=")
        option, text = (f"{name}=", value) if equals else ("", word)
        hint = types.get(name if equals else before)
        if _PLACEHOLDER.fullmatch(text) and hint is not None:
            kinds = {hint, *typing.get_args(hint)} - {type(None)}
            choices = [c for kind in kinds for c in typing.get_args(kind) if typing.get_origin(kind) is Literal]
            text = "1" if kinds & {int, float} else choices[0] if choices else text
        text = re.sub(r"^[A-Z]+(?=:/)", lambda name: name[0].lower(), text)  # CLAIM:/mnt/shared
        found.append(f"{option}{text}")
    return found


def _option(field: dataclasses.Field) -> str:
    return f"--{field.name.replace('_', '-')}"


def _strict(parser: argparse.ArgumentParser, loose: bool) -> argparse.ArgumentParser:
    """The parser without abbreviations of options; a loose one has no required options."""
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                _strict(one, loose)
        if loose:
            action.required = False
            if not action.option_strings and action.nargs is None:
                action.nargs = "?"
    return parser


def _check_python(words: list[str], loose: bool, foreign: bool) -> None:
    if words[0] != "-m":
        if not (ROOT / words[0]).is_file():
            raise DocumentationError(f"{words[0]} does not exist")
        return
    module, rest = words[1], words[2:]
    if module in ("venv", "pip", "pytest") or module.startswith("lerobot."):
        return
    root = ROOT / PLUGIN if foreign else ROOT
    folder = root / module.replace(".", "/")
    if not folder.with_suffix(".py").is_file() and not (folder / "__main__.py").is_file():
        raise DocumentationError(f"module {module} does not exist")
    if not foreign:

        def run():
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__")

        _parse(run, loose)


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise DocumentationError(f"the Makefile has no target {word!r}")


def setup_arguments(folder: Path = ROOT) -> dict:
    """The arguments that setup.py passes to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(folder / "setup.py"))
    return setup.call_args.kwargs


def _extras(folder: Path) -> set[str]:
    """Names of the extras that the package in `folder` declares."""
    if (folder / "setup.py").exists():
        return set(setup_arguments(folder)["extras_require"])
    import tomllib

    return set(
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"].get(
            "optional-dependencies", {}
        )
    )


def _check_pip(words: list[str]) -> None:
    if words[0] != "install":
        raise DocumentationError(f"pip {words[0]} is not checked; use pip install in the documentation")
    expected = None
    for word in words[1:]:
        if expected == "-c" and not (ROOT / word).exists():
            raise DocumentationError(f"{word} does not exist")
        if word.startswith("-") or expected == "-c":
            if word.startswith("-") and word not in ("-e", "-c"):
                raise DocumentationError(f"pip install {word} is not checked")
            expected = word
            continue
        expected = None
        path, _, wanted = word.rstrip("]").partition("[")
        if not path.startswith(".") and path != "rynnvla_jax":
            continue  # of other projects
        known = _extras(ROOT if path == "rynnvla_jax" else ROOT / path)
        if unknown := set(filter(None, wanted.split(","))) - known:
            raise DocumentationError(f"{path} has no extra {', '.join(sorted(unknown))}; it has {sorted(known)}")


def _check_plugin(words: list[str]) -> None:
    """LeRobot is not installed here: the options of our policy and environment are read from their classes."""
    if "--policy.type=rynnvla" not in words:
        return
    files = {"policy": "configuration_rynnvla.py"}
    if "--env.type=rynnvla_so100" in words:
        files["env"] = "environment.py"
    for group, file in files.items():
        tree = ast.parse((ROOT / PLUGIN / "lerobot_policy_rynnvla" / file).read_text(encoding="utf-8"))
        fields = {
            n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        for word in words:
            option = re.match(rf"--{group}\.(\w+)", word)
            if option and option[1] not in fields | {"type", "path"}:
                raise DocumentationError(
                    f"--{group}.{option[1]} is not an option of our plug-in; it has {sorted(fields)}"
                )


def check_python(code: str, where: str) -> None:
    """Raises DocumentationError unless a Python block compiles, its imports from this project exist, and its calls of
    them by name fit their signatures."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise DocumentationError(f"{where}: {error}") from error
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "rynnvla_jax",
            "data_pipelines",
            "configs",
        ):
            for alias in node.names:
                names[alias.asname or alias.name] = _imported(node.module, alias.name, where)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            _check_call(node, names, where)


def _imported(module: str, name: str, where: str):
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        raise DocumentationError(f"{where}: from {module} import {name}: {error}") from error


def _check_call(node: ast.Call, names: dict, where: str) -> None:
    target = node.func
    path = []
    while isinstance(target, ast.Attribute):
        path.insert(0, target.attr)
        target = target.value
    if not isinstance(target, ast.Name) or target.id not in names:
        return
    said = ast.unparse(node)
    called = names[target.id]
    for attribute in path:
        if not hasattr(called, attribute):
            raise DocumentationError(f"{where}: {said}: {attribute} does not exist")
        called = getattr(called, attribute)
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        return
    if isinstance(called, type) and issubclass(called, Exception):
        return  # most exceptions take any arguments
    try:
        signature = inspect.signature(called)
    except ValueError:  # an exception, for example, has none
        return
    try:
        signature.bind(*node.args, **{k.arg: k.value for k in node.keywords})
    except TypeError as error:
        raise DocumentationError(f"{where}: {said}: {error}") from error
