"""Policy servers for tests: in a thread, or as a process."""

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
from websockets.sync.client import connect

from rynnvla_jax.columns import Columns
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.deploy.server import PolicyServer
from tests import ROOT

WAIT = 30  # seconds until a test gives up
FRAME = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


class Fake:
    """Targets that tell which state they answer; refuses state[1] < 0, breaks on state[1] > 1000."""

    def act(self, front, wrist, state, instruction, columns=None, extra_views=None):
        if state[1] < 0:
            raise PolicyError("state is out of range")
        if state[1] > 1000:
            raise RuntimeError("out of memory")
        return np.arange(6, dtype=np.float32).reshape(3, 2) + np.float32(state[0])


class Gated(Fake):
    """Answers its warm-up at once, then each request when let through."""

    def __init__(self, open_for=1):
        self.gate, self.entered = threading.Semaphore(open_for), threading.Semaphore(0)

    def act(self, *arguments):
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT)
        return super().act(*arguments)


def observation(first=0.0, second=0.0):
    return Observation(FRAME, None, np.array([first, second], np.float32), "go", Columns("somewhere"))


class Running:
    """A server in a thread of its own."""

    def __init__(self, policy, warm_up=None, metadata=None, **options):
        self.server = PolicyServer(policy, warm_up or observation(), metadata or {"policy": "fake"}, port=0, **options)
        self.listening, self.ready, self.error = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.listening.wait(WAIT)
        self.url = f"ws://127.0.0.1:{self.port}"

    def _run(self):
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self.error = error

    async def _serve(self):
        self.loop = asyncio.get_running_loop()

        def listening(port):
            self.port = port
            self.listening.set()

        await self.server.run(listening, lambda seconds: self.ready.set())

    def stop(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.stop)

    def get(self, path, **headers):
        """(status, body) of a plain GET."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics(self, **headers):
        status, body = self.get("/metrics", **headers)
        assert status == 200
        return json.loads(body)


@contextmanager
def running(policy=None, **options):
    served = Running(policy or Fake(), **options)
    try:
        if not isinstance(policy, Gated):
            assert served.ready.wait(WAIT)
        yield served
    finally:
        served.stop()
        served.thread.join(WAIT)
        assert not served.thread.is_alive()


def raw(served, **headers):
    """A connection without our client, its metadata read."""
    connection = connect(served.url, compression=None, max_size=None, additional_headers=headers)
    return connection, connection.recv(timeout=WAIT)


def exchange(connection, message):
    connection.send(message)
    return connection.recv(timeout=WAIT)


@contextmanager
def command(export, *options, **environment):
    """`rynnvla serve` as a process: (process, port), once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rynnvla_jax.cli", "serve", "--policy", export, "--port", "0", *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        start = process.stdout.readline()
        assert str(export) in start and "in degrees" in start, start + process.stderr.read()
        assert process.stdout.readline().startswith("ready after")
        yield process, int(start.split("ws://127.0.0.1:")[1].split()[0])
    finally:
        process.kill()
        process.communicate()


def resident():
    """MB that this process holds now."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6
