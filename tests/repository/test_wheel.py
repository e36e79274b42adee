"""The wheel, installed where a user would install it: not editable, far from the tree, beside a folder `configs`."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.cli.test_grammar import EVERY, GROUPS

pytestmark = pytest.mark.slow
OURS = ("rynnvla_jax", "data_pipelines")
NOT_COPIED = (".*", "build", "dist", "site", "runs", "*.egg-info", "__pycache__")
MINE = """
from rynnvla_jax.configs import robot


def get_config(arg="tiny"):
    config = robot.get_config(arg)
    config.seed = 17
    return config
"""


def wheel(source: Path, folder: Path) -> Path:
    """Builds the package of a folder that may be written to."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, which a build fills with its own files."""
    copy = tmp_path_factory.mktemp("tree") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return copy


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    return wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`rynnvla` of a new environment that has the wheel, and what this one has besides."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", built], check=True, timeout=300
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # The .pth files in that folder are not read, so editable installs do not count.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    return folder / "bin" / "rynnvla"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A user's directory with a folder `configs` of its own and a config file."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "configs").mkdir()
    (folder / "configs" / "__init__.py").write_text("raise RuntimeError('this is another project')\n", encoding="utf-8")
    (folder / "my_robot.py").write_text(MINE, encoding="utf-8")
    return folder


@pytest.fixture
def rynnvla(installed, elsewhere, monkeypatch):
    """rynnvla(*words): (exit status, what it wrote)."""
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))

    def run(*words):
        done = subprocess.run([installed, *words], cwd=elsewhere, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_wheel_holds_our_packages_whole_and_no_others(built):
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*OURS, next(name for name in tops if name.endswith(".dist-info"))}
    assert any(name.endswith("/LICENSE") for name in names)
    kinds = ("*.py", "*.html", "*.cpp", "py.typed")
    files = {str(f.relative_to(ROOT)) for top in OURS for kind in kinds for f in (ROOT / top).rglob(kind)}
    files |= {f"rynnvla_jax/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.py")}  # the package links there
    assert "rynnvla_jax/configs/ablations/chunk.py" in files and files <= names, sorted(files - names)


def test_the_plugin_is_a_distribution_of_its_own(tree, tmp_path):
    with zipfile.ZipFile(wheel(tree / "plugins" / "lerobot_policy_rynnvla", tmp_path)) as archive:
        names = archive.namelist()
    assert "lerobot_policy_rynnvla/__init__.py" in names
    assert not [name for name in names if not name.startswith("lerobot_policy_rynnvla")]


def test_every_command_helps(rynnvla):
    for name in (*GROUPS, *EVERY):
        status, text = rynnvla(*name.split(), "--help")
        assert status == 0 and text.startswith(f"usage: rynnvla {name} "), text


def test_packaged_and_own_configs_are_read(rynnvla):
    assert "--config.seed=0" in rynnvla("train", "--config", "configs/robot.py:tiny", "--help", "seed")[1]
    assert "--config.seed=17" in rynnvla("train", "--config", "my_robot.py", "--help", "seed")[1]
    status, text = rynnvla("train", "--config", "configs/robot.py:tiny", "--workdir", "run")
    assert status == 1 and text.startswith("rynnvla train: ") and "Traceback" not in text


def test_a_stage_trains(rynnvla, installed, elsewhere):
    (demo,) = installed.parent.parent.glob("lib/python*/site-packages/data_pipelines/demo/so100")
    words = ["train", "--config", "configs/action_vae.py:tiny", "--workdir", "trained", "--config.total_steps=2"]
    status, text = rynnvla(*words, f"--config.data.source=lerobot:{demo}", "--config.batch_size=8")
    assert status == 0, text
    assert (elsewhere / "trained" / "metrics.jsonl").exists()


def test_the_simulator_is_there(rynnvla, installed, elsewhere):
    program = "import rynnvla_jax, rynnvla_jax.sim.env, rynnvla_jax.sim.evaluate; print(rynnvla_jax.__file__)"
    command = [installed.with_name("python"), "-c", program]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(installed.parent.parent) in done.stdout
