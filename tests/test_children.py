"""What this program starts is ours, whatever lies in the working directory."""

import re
import subprocess

from rynnvla_jax import children
from rynnvla_jax.sweep import run
from tests import ROOT


def test_files_of_the_working_directory_shadow_nothing(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "robot.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    mine = "from configs import robot\n\n\ndef get_config():\n    return robot.get_config('tiny')\n"
    (tmp_path / "configs" / "mine.py").write_text(mine, encoding="utf-8")
    command = [*run.PROGRAM, "train", "--config", "configs/mine.py", "--help", "mesh.fsdp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "mesh.fsdp" in done.stdout, done.stderr


def test_all_modules_are_started_by_it():
    own = [path for path in (ROOT / "rynnvla_jax").rglob("*.py") if path.name != "children.py"]
    found = [path for path in own if re.search(r'sys\.executable, "-m", (?!"pip")', path.read_text(encoding="utf-8"))]
    assert found == []
    assert children.module("a.b")[1:] == ["-P", "-m", "a.b"]
