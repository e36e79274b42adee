"""The policy server at full load: 8 clients that send the next request as soon as they have an answer.

    python -m benchmarks.serve [--policy EXPORT] [--minutes 10] [--clients 8]

Starts `rynnvla serve` as its own process (without --policy: with an untrained export of two layers), sends 480 x 640
frames, and prints one JSON line: errors, answers per second, latency percentiles measured by the server and by the
clients, and the server's resident memory after the first tenth of the time, at the end and over all samples in between.
Set OMP_NUM_THREADS=1 where other programs use the cores, because torch's threads wait for each other.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

from rynnvla_jax.deploy.export_format import PolicyError, read_config
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.deploy.remote import RemotePolicy


def start(export: Path) -> tuple[subprocess.Popen, int]:
    """The server and its port, once it is ready."""
    command = [sys.executable, "-m", "rynnvla_jax.cli", "serve", "--policy", str(export), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # a pipe
    line = process.stdout.readline()
    if not line or not process.stdout.readline():
        raise RuntimeError(f"the server did not start (exit status {process.wait()})")
    return process, int(line.split("ws://127.0.0.1:")[1].split()[0])


def resident(pid: int) -> float:
    """Resident memory of a process, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 1e6


class Client(threading.Thread):
    """Sends requests until the deadline; keeps its latencies and the texts of its errors."""

    def __init__(self, port: int, observation: Observation, deadline: float):
        super().__init__(daemon=True)
        self.remote, self.observation, self.deadline = RemotePolicy(f"ws://127.0.0.1:{port}"), observation, deadline
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.deadline:
            asked = time.perf_counter()
            try:
                self.remote.act(*self.observation)
                self.seconds.append(time.perf_counter() - asked)
            except PolicyError as error:
                self.errors.append(str(error))
        self.remote.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, help="export folder; default: a tiny untrained one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = options.policy
        if export is None:
            from tests import exports

            export = exports.write_tiny(Path(folder) / "export")
        print(json.dumps(measure(export, 60 * options.minutes, options.clients)))


def measure(export: Path, seconds: float, count: int) -> dict:
    """The results that `main` prints."""
    use_wrist = read_config(export).sequence.use_wrist_frame
    state = np.array(json.loads((export / "statistics.json").read_text(encoding="utf-8"))["mean_state"], np.float32)
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    observation = Observation(frame, frame if use_wrist else None, state, "pick up the block")
    process, port = start(export)
    try:
        started = time.monotonic()
        clients = [Client(port, observation, started + seconds) for _ in range(count)]
        for client in clients:
            client.start()
        memory = []
        while any(client.is_alive() for client in clients):
            time.sleep(min(1.0, seconds / 50))
            memory.append((time.monotonic() - started, resident(process.pid)))
        elapsed = time.monotonic() - started
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            server = json.load(answer)
    finally:
        process.terminate()
        status = process.wait()
    settled = [megabytes for at, megabytes in memory if at >= seconds / 10]
    latencies = 1000 * np.concatenate([client.seconds for client in clients])
    errors = [error for client in clients for error in client.errors]
    return {
        "benchmark": "serve",
        "clients": count,
        "minutes": round(elapsed / 60, 2),
        "answers": len(latencies),
        "answers_per_second": round(len(latencies) / elapsed, 1),
        "errors": len(errors),
        "first_errors": errors[:3],
        "client_ms": {f"p{p}": round(float(np.percentile(latencies, p)), 2) for p in (50, 95, 99, 100)},
        "server": server,
        "server_exit_status": status,
        "memory_mb": {
            "after_a_tenth": round(settled[0], 1),
            "end": round(settled[-1], 1),
            "largest": round(max(settled), 1),
        },
    }


if __name__ == "__main__":
    main()
