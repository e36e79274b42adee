"""`python -m tests.injection`, of its quickest command and one kill of each kind."""

import json
import shutil
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="no strace")
def test_a_sweep_that_is_killed_at_a_system_call_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.injection", "--commands", "sweep", "--of-each", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["states_lost"] == 0 and summary["injections"] == summary["by_command"]["sweep"] > 5
