"""Which room may import which, and no circle between files: parsed from the source, nothing is executed.

Imports inside functions count like those at the top of a file.
"""

import ast
from pathlib import Path

import pytest

from tests import ROOT

# Root files of rynnvla_jax, and rooms that like them know no other room: what training and robots share.
LEAVES = {"leaves", "storage", "pages", "configs"}
ABOVE_LEAVES = {
    "data_pipelines": set(),
    "distributed": set(),
    "models": {"distributed"},
    "checkpoint": {"distributed", "models"},
    "inference": {"distributed", "models", "checkpoint", "data_pipelines", "deploy"},
    "train": {"distributed", "models", "checkpoint", "data_pipelines", "inference", "convert"},
    "aot": {"distributed", "models", "checkpoint", "data_pipelines", "inference", "train"},
    "launch": {"distributed"},
    "report": {"distributed", "models", "checkpoint", "data_pipelines", "inference", "train", "sweep"},
    "sweep": {"distributed", "models", "checkpoint", "data_pipelines", "inference", "train", "aot", "launch"}
    | {"convert"},
    "deploy": set(),
    "sim": {"deploy"},
    "convert": {"distributed", "models", "checkpoint", "deploy"},
}
WITHOUT_JAX = ("leaves", "storage", "pages", "data_pipelines", "deploy", "sim", "launch")
WITH_TORCH = ("deploy", "convert", "cli")

FILES = sorted([*(ROOT / "rynnvla_jax").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")])
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str:
    """The room of a module of ours: a package of rynnvla_jax, its root files ("leaves"), or data_pipelines."""
    parts = name.split(".")
    if parts[0] == "data_pipelines":
        return "data_pipelines"
    return parts[1] if MODULES[".".join(parts[:2])].name == "__init__.py" and len(parts) > 1 else "leaves"


def imported(path: Path) -> set[str]:
    """Every imported name in full, with the packages that it lies in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the full name of {node.module}"  # this reads full names only
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for name in imported(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {"", module(path)}
    return found


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    here = room(module(path))
    allowed = {here, *LEAVES, *ABOVE_LEAVES.get(here, ())}
    if path.name == "__main__.py" or here == "cli":  # nothing imports these
        allowed |= {"cli", *ABOVE_LEAVES}
    wrong = {name for name in ours(path) if room(name) not in allowed}
    assert not wrong, f"{here} may import {sorted(allowed)}, not {sorted(wrong)}"
    if here in WITHOUT_JAX:
        assert not any(uses(path, package) for package in ("jax", "flax"))
    if here not in WITH_TORCH:
        assert not uses(path, "torch")
    assert not uses(path, "matplotlib.pyplot")  # it chooses a screen for the whole process, and keeps every figure


@pytest.mark.parametrize("path", PLUGINS, ids=lambda p: str(p.relative_to(ROOT)))
def test_plugins_run_policies_only(path):
    names = {name for name in imported(path) if name.partition(".")[0] in ("rynnvla_jax", "data_pipelines")}
    assert all(name.split(".")[1] in ("columns", "deploy", "sim") for name in names), names


def test_no_circles():
    """Every file can be read after those that it imports."""
    arrows = {name: ours(path) for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := {name for name in arrows if name not in done and arrows[name] <= done}:
        done |= ready
    assert not arrows.keys() - done, {name: sorted(arrows[name] - done) for name in sorted(arrows.keys() - done)}
