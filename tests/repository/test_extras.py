"""Each extra, installed alone in a new environment, runs the commands that it is documented for."""

import os
import subprocess
import venv

import pytest

from data_pipelines import demo
from tests import ROOT
from tests.exports import write_tiny
from tests.repository.test_wheel import built, tree  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow
SO100, EGODEX = (f"{kind}:{demo.path(name)}" for kind, name in (("lerobot", "so100"), ("egodex", "egodex")))
TRAIN = ("train", "--config=configs/action_vae.py:tiny", f"--config.data.source={SO100}", "--config.total_steps=2")
COMMANDS = {
    "data": (
        ("data", "inspect", SO100),
        ("data", "validate", SO100),
        ("data", "stats", EGODEX),
        ("data", "show", SO100, "--out", "page.html"),
        ("data", "tokenizer", SO100, "--out", "tokenizer.json"),
    ),
    "sim": (
        ("fetch", "so100"),
        ("record", "--task", "block", "--episodes", "1", "--out", "arm", "--size", "64"),
        ("record", "--human", "--task", "block", "--episodes", "1", "--out", "hand", "--size", "64"),
        ("evaluate", "--policy", "expert", "--episodes", "1", "--out", "page", "--size", "64"),
    ),
    "deploy": (("deploy", "check", "export"),),
    "train": ((*TRAIN, "--workdir", "run"), ("report", "run", "--out", "page.html"), ("checkpoint", "list", "run")),
}


@pytest.mark.parametrize("extra", COMMANDS)
def test_an_extra_alone_runs_its_commands(extra, built, tmp_path):  # noqa: F811
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    wanted = ["-c", str(ROOT / "constraints.txt"), f"{built}[{extra}]"]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, timeout=1500, env=alone)
    write_tiny(tmp_path / "export")
    for words in COMMANDS[extra]:
        done = subprocess.run(
            [python.with_name("rynnvla"), *words], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
