"""Requirements of the simulator's tests: the arm's model, and OpenGL for tests that render."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rynnvla_jax.storage import fetch


def need_arm() -> None:
    """The arm's model, downloaded once per machine."""
    try:
        fetch.fetch("so100")
    except OSError as error:
        _missing(str(error))


def need_eyes() -> None:
    """The arm's model, and an OpenGL that draws without a screen."""
    from rynnvla_jax.sim import gl

    need_arm()
    try:
        gl.check()
    except gl.RenderingError as error:
        _missing(str(error))


def _missing(why: str) -> None:
    """A test that cannot run is skipped on a developer's machine; in CI it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def hashes(root):
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


def gone(pids):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def start_recording(arguments, out, episodes, workers, **environment):
    command = [sys.executable, "-m", "rynnvla_jax.cli", "record", *arguments, "--episodes", str(episodes)]
    command += ["--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def recorded_set(arguments, out, episodes):
    """(folder, output of the command) of a recording made by two workers."""
    need_eyes()
    process = start_recording(arguments, out, episodes, workers=2)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return out, said
