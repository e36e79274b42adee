"""How every command reads its arguments: one frozen dataclass with described fields, parsed by tyro.

@dataclass(frozen=True)
class Arguments:
    '''What the command does; `--help` shows this text as it stands.'''

    workdir: tyro.conf.Positional[Path]
    '''A run's directory.'''
    dry_run: bool = False
    '''Only print what would happen.'''

def main(argv: list[str]) -> int:
    arguments = parse(Arguments, "rynnvla example", argv)
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import tyro

from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import BEST, NEWEST, ConfigError
from rynnvla_jax.errors import did_you_mean
from rynnvla_jax.storage import files

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Step = int | Literal["best"] | None  # --step; by default the newest, "best" by checkpoint.keep_best
ConfigName = Annotated[str, tyro.conf.arg(metavar="FILE[:ARG]")]  # --config, and how its help is written
# No --no-dry-run; no {None}|STR; an option with several values is repeated.
OR_HUB = "or on the Hub"  # in the annotation of a str: a path, where names hf://USER/NAME are accepted too
OR_BUCKET = "or in a bucket"  # in the annotation of a path: gs://... and s3://... are accepted too, if they answer
_MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.UseAppendAction)
OVERRIDES = "--config.KEY=VALUE  Any key of the config; `rynnvla train --help` lists them."
_TYPES = {"INT": "a whole number", "FLOAT": "a number"}
_ABOUT = "@ABOUT@"  # tyro would re-wrap the paragraphs of a description


def step_number(step: Step) -> int:
    """As `checkpoint.reader.find_step` takes it."""
    return NEWEST if step is None else BEST if step == "best" else int(step)


def parse(
    cls: type[T], program: str, argv: Sequence[str], renamed: Mapping[str, str] | None = None, ask: bool = True
) -> T:
    """The arguments of a command. `--help` prints the help text and exits.

    Args:
      renamed: {old option: new option}, accepted with a line on stderr; {old option: what to do instead}, refused with
        that text. Underscores in an option's name need no entry.
      ask: whether buckets must answer.

    Raises:
      UsageError: an unknown option, a missing or a wrong value.
      ConfigError: what `__post_init__` of `cls` finds.
      BucketError: a bucket that cannot be read.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(cls, program))
        sys.exit(0)
    words = [_current(word, program, cls, renamed or {}) for word in argv]
    _check_not_empty(words, cls)
    given = {word.partition("=")[0] for word in words}
    required = [_option(f) for f in dataclasses.fields(cls) if _required(f)]
    if missing := [option for option in required if option not in given]:
        raise UsageError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            arguments = tyro.cli(cls, prog=program, args=words, config=_MARKERS, registry=_paths)
    except SystemExit:
        text = _readable(said.getvalue())
        if own := re.match(r"Error parsing [A-Z]\w*: (.*)", text):  # what `__post_init__` raised
            raise ConfigError(own[1]) from None
        raise UsageError(text) from None
    _check_buckets(arguments, ask)
    return arguments


_paths = tyro.constructors.ConstructorRegistry()


@_paths.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Paths as `files.place` reads them: "~" (shells leave it alone in --workdir=~/run), and gs://."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: files.place(words[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda value: [str(value)],
    )


def _check_buckets(arguments: "DataclassInstance", ask: bool) -> None:
    """Raises UsageError for a path in a bucket where one of this machine is needed; BucketError for a bucket that does
    not answer, before anything is done with it that would wait for minutes."""
    for field in filter(_is_path, dataclasses.fields(arguments)):
        value = getattr(arguments, field.name)
        for path in value if isinstance(value, tuple) else [value]:
            if path is None or not files.is_bucket(path):  # neither is a name on the Hub
                continue
            if OR_BUCKET not in getattr(field.type, "__metadata__", ()):
                raise UsageError(f"{_shown(field)} {path}: a bucket cannot be used here; give a path of this machine")
            if ask:
                files.check(path)


def _check_not_empty(words: Sequence[str], cls: type) -> None:
    """Raises UsageError for an empty path, which would mean the current directory: the variable was not set."""
    paths = {_option(f) for f in dataclasses.fields(cls) if _is_path(f)}
    for before, word in itertools.pairwise(["", *words]):
        name = word.rstrip("=") if word.endswith("=") else before if not word else ""
        if name in paths:
            raise UsageError(f"{name} is empty; if it comes from a variable, the variable is not set")
        if not word and not before.startswith("-"):
            raise UsageError("an argument is empty; if it comes from a variable, the variable is not set")


def _is_path(field: dataclasses.Field) -> bool:
    kind = get_args(field.type)[0] if hasattr(field.type, "__metadata__") else field.type
    return OR_HUB in getattr(field.type, "__metadata__", ()) or kind is Path or Path in get_args(kind)


def parse_with_overrides(
    cls: type[T], program: str, argv: Sequence[str], renamed: Mapping[str, str] | None = None
) -> tuple[T, list[str]]:
    """`parse` for a command that takes a config; the second value is its --config.KEY=VALUE."""
    if {"-h", "--help"} & set(argv):
        print(help_text(cls, program, overrides=True))
        sys.exit(0)
    from rynnvla_jax import config_file

    own, overrides = config_file.split(argv)
    return parse(cls, program, own, renamed), overrides


def help_text(cls: type, program: str, overrides: bool = False) -> str:
    """What `--help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        tyro.cli(cls, prog=program, description=_ABOUT, args=["--help"], config=_MARKERS)
    text = said.getvalue().replace(_ABOUT, inspect.cleandoc(cls.__doc__ or ""))
    if overrides:
        text = f"{text.rstrip()}\n  {OVERRIDES}"
    text = re.sub(r"\s*\(default:\s+(None|False)?\)", "", text)  # these defaults carry no information
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _current(word: str, program: str, cls: type, renamed: Mapping[str, str]) -> str:
    """A word of the command line, with old option names replaced. Raises UsageError for unknown options."""
    if not re.match(r"--?[A-Za-z]", word):
        return word
    name, equals, value = word.partition("=")
    known = [_option(f) for f in dataclasses.fields(cls) if not _positional(f)]
    if name in known:
        return word
    new = renamed.get(name) or renamed.get(_dashed(name)) or _dashed(name)
    if new in known:
        print(f"{program}: {name} is now {new}", file=sys.stderr)
        return f"{new}{equals}{value}"
    if new != _dashed(name):
        raise UsageError(f"{name}: {new}")
    raise UsageError(f"unknown option {name}.{did_you_mean(name, known)}".rstrip("."))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _required(field: dataclasses.Field) -> bool:
    """Whether an option must be given. (Of positional arguments tyro says what is missing.)"""
    return not _positional(field) and field.default is field.default_factory is dataclasses.MISSING


def _positional(field: dataclasses.Field) -> bool:
    return tyro.conf.Positional in getattr(field.type, "__metadata__", ())


def _option(field: dataclasses.Field) -> str:
    """--name, which is the field's unless `tyro.conf.arg(name=...)` gives another."""
    named = [name for mark in getattr(field.type, "__metadata__", ()) if (name := getattr(mark, "name", None))]
    return f"--{_dashed(named[0] if named else field.name)}"


def _shown(field: dataclasses.Field) -> str:
    """How a user knows an argument: --name, or NAME where it is positional."""
    if not _positional(field):
        return _option(field)
    named = [name for mark in field.type.__metadata__ if (name := getattr(mark, "metavar", None))]  # type: ignore[union-attr]
    return named[0].removesuffix(" ...") if named else field.name.upper()


def _readable(text: str) -> str:
    """The first paragraph of an error that tyro prints in a box; frequent errors in our own words."""
    paragraph: list[str] = []
    for line in (line.strip("│|+ ").strip() for line in text.splitlines()[1:]):
        if re.fullmatch("[-─]+|", line):
            if paragraph:
                break
        else:
            paragraph.append(line)
    error = " ".join(paragraph)
    if found := re.match(
        r"Error parsing (\S+): (?:invalid literal for (int)|could not convert string to (float)).*?'(.*)'", error
    ):
        return f"{found[1]} {found[4]}: this is not {_TYPES[(found[2] or found[3]).upper()]}"
    if found := re.match(r"Error parsing (\S+): .*?(\w+) could be instantiated from \['(.*)'\]", error):
        return f"{found[1]} {found[3]}: this is not {_TYPES.get(found[2], found[2])}"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", error):
        choices = re.findall(r"'([^']*)'", found[3])
        return f"{found[2]} {found[1]}: choose one of {', '.join(choices)}.{did_you_mean(found[1], choices)}".rstrip(
            "."
        )
    if found := re.match(r"Missing from .*?: (\S+) (.*?) \(required\)", error):
        return f"{found[1]} is required: {found[2]}"
    return error or text.strip()
