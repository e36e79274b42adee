"""The soak of the robot's server, `make soak`: honest clients among hostile ones, for ten minutes.

Starts `rynnvla serve` with a tiny export as a process of its own that may open 256 files. 48 honest clients send frames
of 480 x 640 at a modest rate and compare each answer with that of the policy itself. 16 hostile ones keep websockets
idle, send nothing, half a handshake, frames of 15 MB, garbage, floods of pings and of fragments, connect and leave,
never read, or come from a foreign web page. A third process asks for the server's health four times a second.

Prints one JSON summary. Exit status 1 when an answer was wrong or missing, health took over a second, memory grew, or
the server wrote a thousand lines to stderr.
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from websockets.frames import Frame, Opcode

from benchmarks.serve import resident
from rynnvla_jax.deploy import msgpack_numpy
from rynnvla_jax.deploy.export_format import PolicyError, write_sums
from rynnvla_jax.deploy.observation import Observation, to_message
from rynnvla_jax.deploy.remote import RemotePolicy
from tests import ROOT

FILES, HONEST = 256, 48
SECONDS_BETWEEN = 5.0  # requests of an honest client
HEALTH_SECONDS, STDERR_LINES, GROWTH = 1.0, 1000, 1.1
PROMPT = "pick up the block"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak", help="emptied first")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    observations, expected = examples(options.out / "export", options.seed)
    process, port = start(options.out)
    try:
        summary = soak(process, port, 60 * options.minutes, options.seed, observations, expected)
    finally:
        process.terminate()
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    summary |= {"stderr_lines": len((options.out / "stderr.txt").read_bytes().splitlines()), "exit_status": status}
    held = {
        "every honest request was answered": summary["answers"] > 0 and not summary["errors"],
        "every answer was right": not summary["wrong"],
        "every health check was answered": summary["health_checks"] > 0 and not summary["health_failures"],
        "health within a second": summary["slowest_health_seconds"] < HEALTH_SECONDS,
        "no foreign page was let in": not summary["let_in"],
        "memory is flat": summary["memory_mb"]["end"] <= GROWTH * summary["memory_mb"]["after_a_tenth"],
        "little on stderr": summary["stderr_lines"] < STDERR_LINES,
        "exit status 0": status == 0,
    }
    print(json.dumps({**summary, "not_held": [name for name, holds in held.items() if not holds]}))
    return 0 if all(held.values()) else 1


def examples(export: Path, seed: int) -> tuple[list[Observation], list[np.ndarray]]:
    """An observation for each honest client, and the answer of the policy itself."""
    from rynnvla_jax.deploy.policy import Policy
    from tests import exports

    write_sums(exports.write_tiny(export))
    policy = Policy.load(export)
    rng = np.random.default_rng(seed)
    low, high = policy.state_range
    frame = rng.integers(0, 256, (480, 640, 3), np.uint8)
    observations = [Observation(frame, None, rng.uniform(low, high).astype(np.float32), PROMPT) for _ in range(HONEST)]
    return observations, [policy.act(*observation) for observation in observations]


def start(folder: Path) -> tuple[subprocess.Popen, int]:
    """The server and its port, once it is ready."""

    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

    command = [sys.executable, "-m", "rynnvla_jax.cli", "serve", "--policy", str(folder / "export"), "--port", "0"]
    with (folder / "stderr.txt").open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--frame", "480x640"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=errors, preexec_fn=few_files, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None  # a pipe
    line = process.stdout.readline()
    if not line or not process.stdout.readline():
        raise SystemExit(f"the server did not start: {(folder / 'stderr.txt').read_text(encoding='utf-8')[-2000:]}")
    return process, int(line.split("ws://127.0.0.1:")[1].split()[0])


def soak(process: subprocess.Popen, port: int, seconds: float, seed: int, observations, expected) -> dict:
    """Runs everybody; returns what they saw."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    began = time.monotonic()
    deadline = time.time() + seconds
    parts = (
        (honest, (port, deadline, seed, observations, expected)),
        (hostile, (port, deadline, seed, observations[0].state)),
        (health, (port, deadline)),
    )
    others = [context.Process(target=report, args=(results, part, *given), daemon=True) for part, given in parts]
    for other in others:
        other.start()
    memory = []
    while time.time() < deadline and process.poll() is None:
        time.sleep(min(1.0, seconds / 50))
        memory.append((time.monotonic() - began, resident(process.pid)))
    if process.poll() is not None:
        raise SystemExit(f"the server ended with exit status {process.returncode}")
    seen: dict = {}
    for _ in others:
        seen |= results.get(timeout=120)
    for other in others:
        other.join(60)
    server = json.loads(get(port, "/metrics", 60)[1])
    early = [megabytes for at, megabytes in memory if at <= seconds / 10]
    return {
        "soak": "serve",
        "minutes": round(seconds / 60, 2),
        "clients": HONEST + len(HOSTILE),
        **seen,
        "memory_mb": {
            "after_a_tenth": round(early[-1], 1),
            "end": round(memory[-1][1], 1),
            "largest": round(max(megabytes for _, megabytes in memory), 1),
        },
        "server": server,
    }


def report(results, part, *given) -> None:
    """Runs `part` in this process and puts the dict that it returns into `results`."""
    os.setsid()  # Linux shares out the processor by sessions: those who do harm do not get that of the others
    results.put(part(*given))


def in_threads(works) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Those who judge


def honest(port: int, deadline: float, seed: int, observations, expected) -> dict:
    """All honest clients: one request every few seconds each, at times of their own."""
    counts, errors, slowest, lock = Counter(answers=0, wrong=0, errors=0), [], [0.0], threading.Lock()

    def client(number: int) -> None:
        rng, remote = random.Random(1000 * seed + number), RemotePolicy(f"ws://127.0.0.1:{port}")
        between = min(SECONDS_BETWEEN, (deadline - time.time()) / 3)
        time.sleep(rng.uniform(0, between))
        while time.time() < deadline:
            asked = time.monotonic()
            try:
                answer = remote.act(*observations[number])
            except PolicyError as error:
                with lock:
                    counts["errors"] += 1
                    errors.append(str(error))
            else:
                with lock:
                    slowest[0] = max(slowest[0], time.monotonic() - asked)
                    counts["answers"] += 1
                    counts["wrong"] += not np.allclose(answer, expected[number], atol=1e-5)
            time.sleep(rng.uniform(0.5, 1.5) * between)
        remote.close()

    in_threads([lambda number=number: client(number) for number in range(HONEST)])
    return {**counts, "first_errors": errors[:3], "slowest_answer_seconds": round(slowest[0], 2)}


def get(port: int, path: str, timeout: float) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def health(port: int, deadline: float) -> dict:
    """Asks four times a second; keeps what was not answered with 200."""
    seconds, failures = [], []
    while time.time() < deadline:
        asked = time.monotonic()
        try:
            status, said = get(port, "/healthz", 10)
            if status != 200:
                failures.append(f"{status} {said.decode()}")
        except (OSError, http.client.HTTPException) as error:
            failures.append(repr(error))
        seconds.append(time.monotonic() - asked)
        time.sleep(0.25)
    return {
        "health_checks": len(seconds),
        "health_failures": len(failures),
        "first_failures": failures[:3],
        "slowest_health_seconds": round(max(seconds), 3),
        "p99_health_seconds": round(float(np.percentile(seconds, 99)), 3),
    }


# Those who do harm: once a call, until the end. `state` is one that the policy accepts.

START = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
)
FRAME_15_MB = np.zeros((2236, 2236, 3), np.uint8)


def tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


@contextlib.contextmanager
def websocket(port: int):
    """A socket after the handshake; whatever came with it is read."""
    with tcp(port) as client:
        client.sendall(START + b"\r\n")
        client.recv(2**16)
        yield client


def masked(data: bytes, opcode: Opcode = Opcode.BINARY, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


def until_closed(client: socket.socket, seconds: float) -> None:
    """Reads and discards for as long as the server keeps the connection."""
    deadline = time.monotonic() + seconds
    client.settimeout(1)
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if not client.recv(2**16):
                return


def idle_websocket(port, rng, state):
    with websocket(port) as client:
        until_closed(client, 60)


def silent_sockets(port, rng, state):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(tcp(port)) for _ in range(100)]
        time.sleep(rng.uniform(0, 3))
        until_closed(clients[-1], 10)


def half_a_handshake(port, rng, state):
    with tcp(port) as client:
        for at in range(rng.randrange(len(START))):
            client.sendall(START[at : at + 1])
            time.sleep(0.05)


def large_frames(port, rng, state):
    message = masked(msgpack_numpy.pack(to_message(Observation(FRAME_15_MB, None, state, PROMPT))))
    with websocket(port) as client:
        client.settimeout(60)
        for _ in range(10):
            client.sendall(message)
            if not client.recv(2**16):
                return
            time.sleep(rng.uniform(0, 1))


def stalled_frames(port, rng, state):
    with websocket(port) as client:
        client.sendall(struct.pack("!BBQ", 0x82, 0xFF, 15 * 2**20) + bytes(4) + bytes(3 * 2**20))
        until_closed(client, 30)


def garbage(port, rng, state):
    with websocket(port) as client:
        if rng.random() < 0.5:
            client.sendall(rng.randbytes(rng.randrange(1, 2**16)))
        else:
            for _ in range(20):
                client.sendall(masked(rng.randbytes(rng.randrange(1000))))
        until_closed(client, 1)


def pings(port, rng, state):
    with websocket(port) as client:
        while True:
            client.sendall(masked(rng.randbytes(rng.choice((0, 125))), Opcode.PING) * 5000)


def fragments(port, rng, state):
    with websocket(port) as client:
        client.sendall(masked(b"", fin=False))
        while True:
            client.sendall(masked(b"", Opcode.CONT, fin=False) * 5000)


def storm(port, rng, state):
    message = masked(msgpack_numpy.pack(to_message(Observation(FRAME_15_MB[:480, :640], None, state, PROMPT))))
    for _ in range(50):
        with websocket(port) as client:
            client.sendall(message[: rng.choice((0, 10, len(message)))])


def slow_reader(port, rng, state):
    message = masked(msgpack_numpy.pack(to_message(Observation(FRAME_15_MB[:8, :8], None, state, PROMPT))))
    with tcp(port) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(START + b"\r\n")
        for _ in range(3000):
            client.sendall(message)


def foreign_page(port, rng, state):
    """How often one was let in."""
    let_in = 0
    for header in (b"Host: localhost\r\nOrigin: https://theirs.example\r\n", b"Host: theirs.example\r\n"):
        with tcp(port) as client:
            client.sendall(START.replace(b"Host: localhost\r\n", header) + b"\r\n")
            let_in += b" 101 " in client.recv(2**16)
    time.sleep(0.2)
    return let_in


HOSTILE = (
    idle_websocket, idle_websocket, silent_sockets, silent_sockets, half_a_handshake, large_frames, large_frames,
    stalled_frames, garbage, garbage, pings, fragments, storm, storm, slow_reader, foreign_page,
)  # fmt: skip


def hostile(port: int, deadline: float, seed: int, state: np.ndarray) -> dict:
    """All hostile clients, each in a thread; returns how often each kind of harm was done."""
    done, let_in, lock = Counter(), [0], threading.Lock()

    def client(number: int) -> None:
        rng, harm = random.Random(seed + number), HOSTILE[number]
        time.sleep(rng.uniform(0, 1))
        while time.time() < deadline:
            given = 0
            with contextlib.suppress(OSError):  # refused or cut off, as it should be
                given = harm(port, rng, state) or 0
            with lock:
                let_in[0] += given
                done[harm.__name__] += 1
            time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(len(HOSTILE))]
    for thread in threads:
        thread.start()
    while time.time() < deadline:  # a thread may be waiting in the middle of its harm
        time.sleep(0.1)
    return {"hostile": dict(sorted(done.items())), "let_in": let_in[0]}


if __name__ == "__main__":
    sys.exit(main())
