"""The package says that it is typed, and mypy agrees."""

import subprocess
import sys
import tomllib

import pytest

from tests import ROOT


def test_both_packages_tell_type_checkers_that_they_are_typed():
    for package in ("rynnvla_jax", "data_pipelines"):
        assert (ROOT / package / "py.typed").is_file()


def test_no_module_is_excused():
    """Every module, the benchmarks, the example and the LeRobot plug-in are checked by the same rules."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert not {"overrides", "exclude", "ignore_errors", "packages"} & settings.keys()
    assert {"rynnvla_jax", "data_pipelines", "benchmarks", "examples"} < set(settings["files"])


@pytest.mark.slow  # a minute of one core without mypy's cache; `make lint` runs it too
def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_would_find_a_wrong_call_of_the_public_interface(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from rynnvla_jax.config import TrainConfig, from_dict\n"
        "from rynnvla_jax.deploy.policy import Policy\n"
        "config: int = from_dict(TrainConfig, {})\n"
        "Policy.load(1).act()\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-m", "mypy", str(wrong)], cwd=ROOT, capture_output=True, text=True)
    for kind in ("[assignment]", "[arg-type]", "[call-arg]"):
        assert kind in done.stdout, done.stdout + done.stderr
