"""The examples do what they say, with few steps."""

import os
import subprocess
import sys

import pytest

from rynnvla_jax.deploy.policy import Policy
from tests import ROOT

EXAMPLE = ROOT / "examples" / "finetune_so100.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, not the tests' eight
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_example_stays_short_and_public():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    assert not [line for line in lines if "import _" in line or "._" in line]


def test_the_example_explains_itself():
    done = run("--help")
    assert done.returncode == 0 and "--data" in done.stdout and "--init" in done.stdout


@pytest.mark.slow
def test_fine_tuning_ends_with_a_policy_beside_the_recording(tmp_path):
    done = run("--out", str(tmp_path / "out"), "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predicted [") == done.stdout.count("recorded [") == 4
    assert "mean difference per joint: " in done.stdout
    export = tmp_path / "out" / "export_2"
    policy = Policy.load(export)
    assert policy.act(*policy.example()).shape == (20, 6)

    written = (export / "model.safetensors").stat().st_mtime_ns
    again = run("--out", str(tmp_path / "out"), "--steps", "2")  # finished: nothing is trained or exported again
    assert again.returncode == 0, again.stderr
    assert (export / "model.safetensors").stat().st_mtime_ns == written
    assert again.stdout.splitlines()[-6:] == done.stdout.splitlines()[-6:]

    more = run("--out", str(tmp_path / "out"), "--steps", "3")
    assert more.returncode == 0, more.stderr
    assert (tmp_path / "out" / "export_3").exists()

    tuned = run("--out", str(tmp_path / "tuned"), "--init", str(tmp_path / "out" / "policy"), "--steps", "2")
    assert tuned.returncode == 0, tuned.stderr
    assert "weights from" in tuned.stderr and "mean difference per joint: " in tuned.stdout
    refused = run(
        "--out", str(tmp_path / "big"), "--init", str(tmp_path / "out" / "policy"), "--size", "1b", "--steps", "1"
    )
    assert refused.returncode != 0 and "transformer" in refused.stderr  # another size than its own


def test_a_benchmark_notices_another_command(tmp_path):
    from benchmarks.table_top import Runner

    def count(steps, out):
        return Runner(out).run("count", [sys.executable, "-c", f"print({steps})", str(out)])

    seconds = count(1, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert count(1, tmp_path / "b") == pytest.approx(seconds, abs=0.05)  # was done
    with pytest.raises(RuntimeError, match=r"count was done .* with another command; choose another DIR"):
        count(2, tmp_path / "b")
    assert (tmp_path / "b" / "logs" / "count.log").read_text(encoding="utf-8") == "1\n"
