"""Which room may import which: parsed from the source, nothing is executed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"config", "vocabulary", "sequence", "actions", "images", "stream", "fetch", "pictures", "__init__"}
FILES = sorted([*(ROOT / "rynnvla_jax").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def uses(path: Path, package: str) -> bool:
    return any(n == package or n.startswith(package + ".") for n in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    room = path.relative_to(ROOT).parts
    where = room[1] if len(room) > 2 else Path(room[-1]).stem
    if room[0] == "data_pipelines":
        allowed = {f"rynnvla_jax.{leaf}" for leaf in LEAVES}
        ours = {n for n in imported(path) if n.startswith("rynnvla_jax.")}
        assert all(any(n == a or n.startswith(a + ".") for a in allowed) for n in ours), ours
    if room[0] == "rynnvla_jax" and where in LEAVES:
        assert not any(uses(path, p) for p in ("jax", "flax", "torch", "data_pipelines"))
    if where == "deploy":
        assert not any(uses(path, p) for p in ("jax", "flax", "data_pipelines", "rynnvla_jax.models"))
    elif where != "convert":
        assert not uses(path, "torch")
    if room[0] == "rynnvla_jax" and uses(path, "data_pipelines"):
        assert where in ("train", "demo", "tokenize", "data_cli") or where.startswith(("report", "imagine", "sweep"))
