"""What tests of the simulator need of a machine: the arm's model, and OpenGL for those that look."""

import hashlib
import os
import subprocess
import sys

import pytest

from rynnvla_jax import fetch


def need_arm() -> None:
    """The arm's model, fetched once on a machine."""
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
    """On somebody's laptop a test that cannot be made is skipped; in CI it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def hashes(root):
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def start_recording(arguments, out, episodes, workers, **environment):
    command = [sys.executable, "-m", "rynnvla_jax.cli", "record", *arguments, "--episodes", str(episodes)]
    command += ["--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
