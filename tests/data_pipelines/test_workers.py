"""Worker processes: their end, and the memory that they share with us."""

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipelines import workers
from data_pipelines.episode import DataError
from data_pipelines.loader import Loader
from rynnvla_jax.config import ConfigError
from tests import ROOT, tiny

# Its shared memory has names of its own, because tests run side by side.
_KILLED = """
import multiprocessing, os, signal, time
from multiprocessing import shared_memory
from tests.data_pipelines import test_workers
shared_memory._SHM_NAME_PREFIX = "/MINE"  # in the worker too, which imports this file
if __name__ == "__main__":
    batches = test_workers.loader(1).batches()
    next(batches)
    while not test_workers.shared_bytes("MINE"):
        time.sleep(0.01)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def loader(count):
    config = tiny.typed(tiny.config("vqgan", tiny.SO100))
    return Loader(dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=count)), progress=False)


def test_workers_end_with_a_killed_parent_and_leave_nothing_in_shared_memory(tmp_path):
    name = f"r{secrets.token_hex(2)}_"
    (tmp_path / "killed.py").write_text(_KILLED.replace("MINE", name), encoding="utf-8")
    command = [sys.executable, tmp_path / "killed.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=100)
    (worker,) = done.stdout.split()
    left = True
    for _ in range(100):
        left = _running(worker) or shared_bytes(name)
        if not left:
            break
        time.sleep(0.1)
    assert not left


def shared_bytes(name):
    """Of all blocks whose names begin so. One that is empty was being made at the kill, and holds no memory."""
    sizes = []
    for path in workers.SHARED_MEMORY.glob(f"{name}*"):
        with contextlib.suppress(FileNotFoundError):  # given back meanwhile
            sizes.append(path.stat().st_size)
    return sum(sizes)


def _running(process):
    """Not so when it waits for being collected by whoever is its parent now."""
    status = Path("/proc", process, "stat")
    return status.exists() and status.read_text(encoding="utf-8").rpartition(") ")[2][0] not in "ZX"


def test_a_small_shared_memory_is_named_before_the_workers_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    loader(2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**19))
    loader(0)
    with pytest.raises(ConfigError, match=r"num_workers 2 with .* needs [1-9]\d* MiB .*/dev/shm has 0 MiB.*--shm-size"):
        loader(2)


@pytest.mark.parametrize(("code", "reason"), [(-7, "SIGBUS; /dev/shm is full: mount a larger"), (-9, "SIGKILL; .*out")])
def test_a_killed_worker_is_one_line(code, reason):
    with pytest.raises(DataError, match=reason), workers.explained():
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}")
