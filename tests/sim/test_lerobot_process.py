"""`rynnvla evaluate --policy lerobot:FOLDER`: the program that serves it is started once, watched, and ended."""

import json
import os
import sys
import textwrap

import pytest

from rynnvla_jax.cli import main as cli
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.sim import lerobot_process
from tests.simulator import need_eyes

# Stands in for lerobot_policy_rynnvla.policy_process: holds the arm still; what else it does, files in the folder say.
FAKE = """
import asyncio, os, sys, threading
from pathlib import Path
import numpy as np
from rynnvla_jax.deploy.observation import KEYS, Observation
from rynnvla_jax.deploy.server import PolicyServer

folder = Path(sys.argv[1])
with (folder / "started").open("a") as file:
    file.write(f"{os.getpid()}\\n")
if (folder / "fails").exists():
    sys.exit("a library is missing\\ninstall it")

class Holds:
    calls = 0

    def act(self, front, wrist, state, instruction, unit):
        self.calls += 1
        if self.calls == 3 and (folder / "dies").exists():
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(7)
        return np.tile(state, (20, 1))

def follow():
    sys.stdin.read()
    os._exit(0)

threading.Thread(target=follow, daemon=True).start()
first = Observation(np.zeros((8, 8, 3), np.uint8), None, np.zeros(6, np.float32), "go")
server = PolicyServer(Holds(), first, {"keys": [key for name, key in KEYS.items() if name != "wrist"]}, port=0)
ports = []
asyncio.run(server.run(ports.append, lambda _: print(f"ws://127.0.0.1:{ports[0]}", flush=True)))
"""
SHORT = ["--size", "64", "--videos", "0", "--try-seconds", "0.5", "--tries", "1", "--fixed-look", "--workers", "1"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"type": "act"}', encoding="utf-8")
    return tmp_path / "policy"


@pytest.fixture
def python(tmp_path):
    """An interpreter that runs FAKE instead of the module it is asked for."""
    (tmp_path / "fake.py").write_text(textwrap.dedent(FAKE), encoding="utf-8")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "fake.py"} "$3"\n', encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def run(folder, python, out, episodes):
    words = ["--policy", f"lerobot:{folder}", "--lerobot-python", python, "--out", out, "--episodes", episodes]
    status = cli.main(["evaluate", *map(str, words), *SHORT])
    return status, [json.loads(line) for line in (out / "episodes.jsonl").read_text(encoding="utf-8").splitlines()]


def started(folder):
    return [int(line) for line in (folder / "started").read_text(encoding="utf-8").split()]


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_peer_is_started_once_and_ended(folder, python, tmp_path):
    need_eyes()
    status, results = run(folder, python, tmp_path / "out", 2)
    assert status == 0 and [r["errors"] for r in results] == [[], []] and [r["steps"] for r in results] == [15, 15]
    assert (
        json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["policy"] == f"lerobot:{folder}"
    )
    assert len(started(folder)) == 1 and not runs(started(folder)[0])
    assert run(folder, python, tmp_path / "out", 2) == (0, results) and len(started(folder)) == 1  # nothing was left
    assert run(folder, python, tmp_path / "out", 3)[1][:2] == results and len(started(folder)) == 2


def test_what_follows_its_end_is_no_failure_of_the_policy(folder, python, tmp_path, capsys):
    need_eyes()
    (folder / "dies").touch()  # in the first episode: two looks, and one to warm up
    status, results = run(folder, python, tmp_path / "out", 2)
    said = capsys.readouterr().err
    assert status == 1 and results == [] and "ended with status 7" in said and "out of memory" in said
    (folder / "dies").unlink()
    status, results = run(folder, python, tmp_path / "out", 2)
    assert status == 0 and [r["errors"] for r in results] == [[], []]


def test_a_peer_that_cannot_start_says_why(folder, python, tmp_path):
    (folder / "fails").touch()
    with (
        pytest.raises(PolicyError, match="status 1") as error,
        lerobot_process.serving(f"lerobot:{folder}", python, tmp_path / "log"),
    ):
        pass
    assert "a library is missing\n  install it" in str(error.value)


def test_an_error_beside_it_ends_it(folder, python, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        lerobot_process.serving(f"lerobot:{folder}", python, tmp_path / "log") as served,
    ):
        served.check()
        raise KeyboardInterrupt
    assert not runs(started(folder)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder, python: (folder / "none", python), "has no config.json"),
        (lambda folder, python: (folder, None), "RYNNVLA_LEROBOT_PYTHON"),
        (lambda folder, python: (folder, "no/such/python"), "no/such/python is not a program"),
    ],
)
def test_what_is_missing_is_named(folder, python, tmp_path, change, says):
    where, program = change(folder, python)
    with pytest.raises(PolicyError, match=says), lerobot_process.serving(f"lerobot:{where}", program, tmp_path / "log"):
        pass
