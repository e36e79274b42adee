"""Metadata written by other programs, checked against one description of each file.

A description is a frozen dataclass: a field's type says what the file must contain, its default what an absent field
means. Or it is a dict {key: type}, where keys are no names (columns of a table). Keys that are not described are left
alone, because other programs add their own. Types: str, bool, int, float, Any, another description, X | None,
list[X], tuple[X, Y], tuple[X, ...], dict[X, Y], and `Annotated` with conditions, such as
`Annotated[int, Between(0, 9)]`.

Numbers are finite, a bool is no number, and texts can be written as UTF-8.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rynnvla_jax.errors import brief
from rynnvla_jax.storage import files

T = TypeVar("T")

_LONGEST = 300  # characters of a name
_LONGEST_FILE = 255  # bytes of a file's name, in Linux
_LARGEST = 2.0**53  # of a number without other limits: exact as a float


class MetadataError(files.DamagedFileError):
    """A file that is readable but does not have the form that its reader needs; names the file, field and value."""

    def __init__(self, message: str):
        ValueError.__init__(self, message)
        self.reason, self.unfinished = ValueError(message), False


@dataclass(frozen=True)
class Between:
    """Condition of a number: from `low` to `high`."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:.15g} to {self.high:.15g}"


@dataclass(frozen=True)
class Entries:
    """Condition of a list: it has `low` to `high` entries."""

    low: int
    high: int

    def holds(self, value: list | tuple) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"of {self.low} to {self.high} entries"


class NotBlank:
    """Condition of a text."""

    def holds(self, value: str) -> bool:
        return bool(value.strip())

    def __str__(self) -> str:
        return "that is not blank"


class Printable:
    """Condition of a text: one line."""

    def holds(self, value: str) -> bool:
        return value.isprintable() and len(value) <= _LONGEST

    def __str__(self) -> str:
        return f"in one line of at most {_LONGEST} characters"


class FileName:
    """Condition of a text: a file in the folder itself."""

    def holds(self, value: str) -> bool:
        printable = value.isprintable() and len(value.encode()) <= _LONGEST_FILE
        return printable and value not in ("", ".", "..") and Path(value).name == value and "\\" not in value

    def __str__(self) -> str:
        return "that names a file, and none outside its folder"


Count = Annotated[int, Between(0, 2**40)]  # of rows, bytes, frames
Index = Annotated[int, Between(0, 2**31 - 1)]
Size = Annotated[int, Between(1, 2**24)]  # of one axis of a tensor
Layers = Annotated[int, Between(1, 1000)]
Share = Annotated[float, Between(0, 1)]
Text = Annotated[str, NotBlank()]
Name = Annotated[str, Printable()]


def read(cls: type[T], path: Path) -> T:
    """The content of a JSON file as `cls`. Raises FileNotFoundError, or DamagedFileError naming the file and field."""
    return parse(cls, files.read_json(path), str(path))


def parse(cls: type[T], values: Any, where: str) -> T:
    """`values` as the dataclass `cls`. Raises MetadataError, which names `where` and the field."""
    return typing.cast(T, _value(cls, values, where, ""))


def checked(fields: Mapping[str, Any], values: Any, where: str) -> dict[str, Any]:
    """The described `fields` {key: type} of `values`. Raises MetadataError, which names `where` and the field."""
    return typing.cast(dict, _value(fields, values, where, ""))


def shown(value: Any) -> str:
    """A value for a message: JSON's words, shortened."""
    if value is None:
        return "null"
    if isinstance(value, str | bytes | list | tuple | Mapping) and not value:
        return "empty"
    return brief(value)


def _value(kind: Any, value: Any, where: str, name: str) -> Any:
    """`value` as a `kind`; raises MetadataError."""
    if isinstance(kind, Mapping):
        return _fields(kind, value, where, name, set())
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        plain = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
        needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        return typing.cast(type, kind)(**_fields(plain, value, where, name, set(plain) - needed))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        found = _value(arguments[0], value, where, name)
        for condition in arguments[1:] if found is not None else ():
            if not condition.holds(found):
                raise _wrong(where, name, value, f"{_kind(arguments[0])} {condition}")
        return found
    if origin in (types.UnionType, typing.Union):  # of X | None
        return None if value is None else _value(arguments[0], value, where, name)
    if origin in (list, tuple, dict):
        return _entries(origin, arguments, value, where, name)
    if kind is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    sound = kind is Any or type(value) is kind  # a bool is an int to isinstance
    if sound and kind in (int, float):
        sound = abs(value) <= (_LARGEST if kind is int else math.inf) and value - value == 0
    elif sound and kind is str:
        sound = value.encode("utf-8", "replace").decode() == value
    if not sound:
        raise _wrong(where, name, value, _kind(kind))
    return value


def _fields(kinds: Mapping[str, Any], values: Any, where: str, name: str, optional: set[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise _wrong(where, name, values, "an object")
    prefix = f"{name}." if name else ""
    if missing := [key for key in kinds if key not in values and key not in optional]:
        raise MetadataError(f"{where} lacks {prefix}{missing[0]}")
    return {key: _value(kind, values[key], where, prefix + key) for key, kind in kinds.items() if key in values}


def _entries(origin: Any, arguments: tuple, value: Any, where: str, name: str) -> Any:
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, name, value, "an object")
        prefix = f"{name}." if name else ""
        keys = [_value(arguments[0], key, where, f"a key of {name}") for key in value]
        return {k: _value(arguments[1], value[k], where, f"{prefix}{shown(k)[1:-1]}") for k in keys}
    if not isinstance(value, list | tuple):
        raise _wrong(where, name, value, "a list")
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    kinds = arguments if fixed else arguments[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong(where, name, value, f"a list of {len(kinds)}")
    return origin(_value(k, v, where, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _kind(kind: Any) -> str:
    """What a value must be, in words."""
    words = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}
    origin = typing.get_origin(kind)
    return words.get(kind) or {list: "a list", tuple: "a list", dict: "an object"}.get(origin, "another value")


def _wrong(where: str, name: str, value: Any, expected: str) -> MetadataError:
    return MetadataError(f"{where}{f': {name}' if name else ''} is {shown(value)}, not {expected}")
