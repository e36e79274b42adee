"""Runs `rynnvla train` as one or several real processes that use gloo, small enough to be started many times."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rynnvla_jax.checkpoint import reader
from rynnvla_jax.storage import files
from rynnvla_jax.train import metrics
from tests import ROOT, XLA_FLAGS, tiny

SMALL = {
    **{f"action_vae_model.{k}": v for k, v in {"width": 16, "feed_forward": 32, "num_heads": 2}.items()},
    **{"action_vae_model.encoder_layers": 1, "action_vae_model.decoder_layers": 1, "data.chunk": 5},
    **{
        "data.source": tiny.SO100,
        "data.num_threads": 0,
        "batch_size": 16,
        "log_every": 1,
        "checkpoint.every_minutes": 0.0,
    },
}


class Command:
    """One command; `start` may be called repeatedly with the same work dir."""

    def __init__(
        self,
        workdir: str | Path,
        cache: Path,
        processes: int = 1,
        devices: int = 1,
        faults: dict | None = None,
        config: str = "configs/action_vae.py:tiny",
        **keys,
    ):
        """`workdir` may be in a bucket; `cache` keeps compiled programs between starts; `devices` is per process;
        `faults` are those of `tests.faulty`; `keys` are config keys with __ instead of the dot."""
        self.workdir, self.processes = files.place(workdir), processes
        self.patience = 900.0  # seconds in which the processes must end
        self._logs = Path(cache).parent if files.is_bucket(workdir) else self.workdir.parent
        overrides = {**SMALL, **{k.replace("__", "."): v for k, v in keys.items()}}
        self.arguments = [
            *(sys.executable, "-m", "tests.faulty"),
            *(f"--config={config}", f"--workdir={workdir}"),
            *(f"--config.{k}={v}" for k, v in overrides.items()),
        ]
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}",
            **(faults or {}),
        }

    @contextlib.contextmanager
    def start(self) -> Iterator[list[subprocess.Popen]]:
        """The running processes; those still running at the end are killed. Their stderr is `log(process)`."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        running = []
        for i in range(self.processes):
            own = {"RYNNVLA_COORDINATOR": f"127.0.0.1:{port}", "RYNNVLA_PROCESS_ID": str(i)}
            environment = {**self.environment, **own, "RYNNVLA_NUM_PROCESSES": str(self.processes)}
            with self.log(i).open("w", encoding="utf-8") as log:
                running.append(subprocess.Popen(self.arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()

    def run(self, when: Callable[[], bool] | None = None, number: int = signal.SIGKILL, who: int = 0) -> list[int]:
        """Exit statuses of a run, in which process `who` may get signal `number` when `when()` is true."""
        with self.start() as running:
            if when:
                while not when():
                    assert all(p.poll() is None for p in running), self.said()
                    time.sleep(0.002)
                running[who].send_signal(number)
            return [p.wait(timeout=self.patience) for p in running]

    def finish(self) -> None:
        """Runs to the end; fails the test when a process fails."""
        assert self.run() == [0] * self.processes, self.said()

    def log(self, process: int = 0) -> Path:
        """WORKDIR.log.<process>; of a work dir in a bucket beside `cache`."""
        return self._logs / f"{self.workdir.name}.log.{process}"

    def said(self) -> str:
        """The stderr of all processes in the last start."""
        return "\n".join(f"[{i}] {self.log(i).read_text(encoding='utf-8')}" for i in range(self.processes))

    def lines(self) -> int:
        """The number of steps logged so far."""
        return len(metrics.read(self.workdir))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(reader.unfinished(self.workdir))


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
