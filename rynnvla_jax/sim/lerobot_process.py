"""A LeRobot policy for `rynnvla evaluate`: served by a process in LeRobot's own Python environment."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rynnvla_jax.deploy.export_format import PolicyError

PREFIX = "lerobot:"
PYTHON = "RYNNVLA_LEROBOT_PYTHON"  # environment variable
_MODULE = "lerobot_policy_rynnvla.policy_process"
_GRACE = 10.0  # seconds to end in
_LINES = 8  # of its log, in an error


class LeRobotProcess:
    """A running process in LeRobot's environment. `url` is its address."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.url = url
        self._process, self._log = process, log

    def check(self) -> None:
        """Raises PolicyError when the program has ended; its connections close a moment before."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return
        raise PolicyError(f"the LeRobot process ended with status {status}; {_last_lines(self._log)}")


@contextmanager
def serving(policy: str, python: str | None, log: Path) -> Iterator[LeRobotProcess]:
    """Serves `policy` ("lerobot:FOLDER") with the interpreter `python` until the context ends.

    The output of the program goes to `log`.

    Raises:
      PolicyError: there is no such folder or interpreter, or the program ended before it answered.
    """
    folder = Path(policy.removeprefix(PREFIX))
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"--policy {policy}: {folder} has no config.json; give the pretrained_model folder of a LeRobot checkpoint"
        )
    if not python:
        raise PolicyError(
            f"--policy {policy} needs the Python of an environment with LeRobot; set --lerobot-python or {PYTHON}"
        )
    if shutil.which(python) is None:
        raise PolicyError(f"--lerobot-python {python} is not a program; give the bin/python of LeRobot's environment")
    with log.open("wb") as said:
        process = subprocess.Popen(
            [python, "-m", _MODULE, str(folder.resolve())],
            stdin=subprocess.PIPE,  # closed, it ends: it does not outlive us however we end
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C reaches us alone; episodes under way still get answers
        )
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        print(f"{folder} is served by process {process.pid} ({python}), which writes to {log}", flush=True)
        url = process.stdout.readline().strip()  # "" when it ended
        if not url:
            status = process.wait()
            raise PolicyError(f"{policy} cannot be served, status {status}; {_last_lines(log)}")
        yield LeRobotProcess(process, url, log)
    finally:
        process.stdin.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES:]
    return "\n  ".join([f"the end of {log}:", *lines]) if lines else f"{log} is empty"
