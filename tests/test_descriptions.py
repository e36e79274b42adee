"""Every key of the config says what it is: `rynnvla train --help` prints these lines."""

import dataclasses
import inspect

import pytest

from rynnvla_jax import config
from rynnvla_jax.cli.config_help import descriptions

CLASSES = [c for c in vars(config).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]


class Example:
    a: int = 1
    """The first."""
    b: int = 2
    c: int = 3
    """The last."""


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_one_line(cls):
    found = descriptions(cls)
    assert found and list(found) == [field.name for field in dataclasses.fields(cls)]
    for field, text in found.items():
        assert text and "\n" not in text, f"{cls.__name__}.{field} has no description on one line below it"
        assert text[0] == text[0].upper() and text.endswith("."), f"{cls.__name__}.{field}: {text!r}"


def test_a_field_without_a_description_is_found():
    assert descriptions(Example) == {"a": "The first.", "b": "", "c": "The last."}
