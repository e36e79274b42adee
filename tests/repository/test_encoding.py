"""Text files are UTF-8 on every machine: without `encoding` Python takes the machine's own. Parsed, not executed."""

import ast
from pathlib import Path

import pytest

from tests import ROOT

FOLDERS = ("rynnvla_jax", "data_pipelines", "benchmarks", "docs", "configs", "examples", "plugins", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
METHODS = {"read_text", "write_text"}  # of paths; those of `files` are always UTF-8


def is_text(mode: ast.expr | None) -> bool:
    return mode is None or (isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value)


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file: open(file, mode), path.open(mode), path.read_text()."""
    keywords = {k.arg: k.value for k in call.keywords}
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and is_text(keywords.get("mode", call.args[1] if len(call.args) > 1 else None))
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr in METHODS:
        return not (isinstance(call.func.value, ast.Name) and call.func.value.id == "files")
    if call.func.attr != "open" or len(call.args) > 1:
        return False
    mode = keywords.get("mode", call.args[0] if call.args else None)
    return mode is None or (isinstance(mode, ast.Constant) and is_text(mode) and set(mode.value) <= set("rwaxt+"))


def without_encoding(source: str) -> list[int]:
    """Lines of a program."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [c.lineno for c in calls if opens_text(c) and "encoding" not in {k.arg for k in c.keywords}]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(path: Path):
    lines = without_encoding(path.read_text(encoding="utf-8"))
    assert not lines, f"{path}: no encoding in line {', '.join(map(str, lines))}"


def test_what_counts():
    bad = ["open(p)", "open(p, 'a')", "p.open('w')", "p.open()", "p.read_text()", "p.write_text(x)"]
    bad += ["open(p, mode='r')"]
    good = ["open(p, 'rb')", "p.open('ab')", "av.open(p, 'w')", "h5py.File(p)", "Image.open(p)"]
    good += ["files.write_text(p, x)", "p.read_text(encoding='utf-8')", "open(p, encoding='utf-8')"]
    assert [len(without_encoding(line)) for line in bad + good] == [1] * len(bad) + [0] * len(good)
