"""Every key of the config says what it is: `rynnvla train --help` prints these lines."""

import ast
from pathlib import Path

import pytest

import rynnvla_jax.config

TREE = ast.parse(Path(rynnvla_jax.config.__file__).read_text(encoding="utf-8"))
CLASSES = {c.name: c for c in TREE.body if isinstance(c, ast.ClassDef) and any(map(ast.unparse, c.decorator_list))}


def descriptions(cls: ast.ClassDef) -> dict[str, str]:
    """Field -> the string that follows it, "" where none does."""
    found = {}
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            says = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[node.target.id] = str(after.value.value) if says else ""
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_has_one_line(name):
    found = descriptions(CLASSES[name])
    assert found and set(found) == set(rynnvla_jax.config.__dict__[name].__dataclass_fields__)
    for field, text in found.items():
        assert text and "\n" not in text and text[0] == text[0].upper() and text.endswith("."), (
            f"{name}.{field}: {text!r}"
        )


def test_a_field_without_a_description_is_found():
    cls = ast.parse('class C:\n    a: int = 1\n    """The first."""\n    b: int = 2\n    c: int = 3\n    """Last."""')
    assert descriptions(cls.body[0]) == {"a": "The first.", "b": "", "c": "Last."}
