"""`rynnvla launch local`: several processes of one run on this machine."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO, BinaryIO

from rynnvla_jax.config import ConfigError
from rynnvla_jax.distributed.initialize import COORDINATOR, NUM_PROCESSES, PROCESS_ID

GRACE_SECONDS = 60  # for the others to leave by themselves; JAX ends them about 35 s after a peer has died


def run(command: list[str], processes: int, devices_per_process: int | None = None) -> int:
    """Runs `command` as `processes` processes of one run and returns the exit status: 0 when all of them end with 0.

    Output comes through line by line with the process number before it. SIGTERM and SIGINT are passed on. When one
    process fails, the others get GRACE_SECONDS to leave by themselves and are killed then; the status is that of the
    first to fail (128 + number for a signal).
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    environments = [environment(os.environ, coordinator, i, processes, devices_per_process) for i in range(processes)]
    children: list[subprocess.Popen] = []
    with _forwarding(children) as received:
        try:
            for env in environments:
                children.append(
                    subprocess.Popen(
                        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, process_group=0
                    )
                )
                if received:  # while we were still starting
                    children[-1].send_signal(received[-1])
            readers = [_relay(i, *streams) for i, c in enumerate(children) for streams in _streams(c)]
            status = _wait(children)
        finally:
            for child in children:
                child.kill()  # does nothing to those that have ended
                child.wait()
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may still hold the pipe
    return status


def environment(
    base: Mapping[str, str], coordinator: str, index: int, processes: int, devices: int | None
) -> dict[str, str]:
    """The environment of process `index`.

    `devices` is the number of its virtual CPU devices and of its share of the visible NVIDIA GPUs.

    Raises:
      ConfigError: CUDA_VISIBLE_DEVICES of `base` lists too few.
    """
    env = {
        **base,
        COORDINATOR: coordinator,
        NUM_PROCESSES: str(processes),
        PROCESS_ID: str(index),
        "PYTHONUNBUFFERED": "1",  # the last lines before a crash are the ones that matter
    }
    if devices is None:
        return env
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", base.get("XLA_FLAGS", "")).split()
    env["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    visible = base.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # empty hides all GPUs on purpose
        gpus = visible.split(",") if visible else [str(i) for i in range(processes * devices)]
        if len(gpus) < processes * devices:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible} lists {len(gpus)} GPUs; --processes {processes} x "
                f"--devices-per-process {devices} need {processes * devices}"
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * devices : (index + 1) * devices])
    return env


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def _forwarding(children: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Passes SIGTERM and SIGINT on to the children, which are in their own process groups."""

    received: list[int] = []

    def forward(number, _):
        received.append(number)
        _say(f"{signal.Signals(number).name}: passed on to {len(children)} processes")
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    """Waits for all processes; prints which failed and how."""
    status, deadline, running = 0, None, set(range(len(children)))
    while running:
        ended = {i for i in running if children[i].poll() is not None}
        running -= ended
        for i in sorted(ended):
            if code := children[i].returncode:
                _say(f"process {i} {_how(code)}")
                if deadline is None:
                    status, deadline = (code if code > 0 else 128 - code), time.monotonic() + GRACE_SECONDS
        if running and deadline is not None and time.monotonic() > deadline:
            _say(f"killing {_names(running)}, still running after {GRACE_SECONDS} s")
            for i in running:
                children[i].kill()
            deadline = float("inf")
        if not ended:
            time.sleep(0.05)
    return status


def _how(code: int) -> str:
    return f"ended with exit status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _names(indices: set[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, sorted(indices)))}"


def _say(text: str) -> None:
    print(f"rynnvla launch: {text}", file=sys.stderr, flush=True)


def _streams(child: subprocess.Popen[bytes]) -> list[tuple[IO[bytes], BinaryIO]]:
    assert child.stdout is not None and child.stderr is not None  # both are pipes
    return [(child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)]


def _relay(index: int, source: IO[bytes], sink: BinaryIO) -> threading.Thread:
    """Copies `source` to `sink` in a thread, only complete lines; a progress bar's \\r ends a line too."""

    def copy():
        rest = b""
        while chunk := source.read(65536):
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            write(lines)
        write([rest])

    def write(lines: list[bytes]):
        text = b"".join(b"[%d] %s\n" % (index, line) for line in lines if line.strip())
        if text:
            sink.write(text)
            sink.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
