"""Serves a policy over a websocket, for openpi's clients and `remote.RemotePolicy`.

After the handshake the server sends one msgpack map of metadata. Each binary message is one observation (keys:
`observation.KEYS`, encoding: `msgpack_numpy`), and each answer a map with `actions` float32[C, A] and `server_timing`.
A text frame is an error: the robot must not move. GET /healthz and GET /metrics are on the same port.

The event loop reads, checks and writes; one thread runs the policy, so that both stay responsive during inference.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import os
import signal
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from rynnvla_jax.deploy import msgpack_numpy
from rynnvla_jax.deploy.control import act
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.limits import CLOSE_SECONDS, Connection, Door, Limits, Places, Sockets, open_doors
from rynnvla_jax.deploy.observation import KEYS, Acts, MessageError, Observation, from_message, view_key

API_KEY = "RYNNVLA_API_KEY"  # environment variable
_COMPLAINT_SECONDS = 60
_WINDOW = 10_000  # requests that the percentiles look back
_TOO_BIG, _GOING_AWAY = 1009, 1001  # close codes of RFC 6455
_BACKLOG = 1024  # connections that the kernel keeps until they are accepted; a further one tries again a second later

_log = logging.getLogger("rynnvla.serve")


class _Busy(PolicyError):
    """A request waited too long for its turn."""


class Metrics:
    """Counts since the start and latencies of the last requests. One thread: the event loop's."""

    def __init__(self):
        self.started = time.monotonic()
        self.counts = Counter(requests=0, answered=0, refused=0, failed=0, malformed=0, too_large=0)
        self.counts.update(unauthorized=0, too_many=0, busy=0, gone=0, cut_off=0)
        self.seconds: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in ("request", "inference")}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; percentiles in milliseconds, null before the first answer."""
        latencies = {f"{name}_ms": _percentiles(values) for name, values in self.seconds.items()}
        return {"uptime_seconds": round(time.monotonic() - self.started, 3), **self.counts, **latencies}


class PolicyServer:
    """Serves one policy. `run` listens, warms up, answers requests, and finishes them at the end."""

    def __init__(
        self,
        policy: Acts,
        warm_up: Observation,
        metadata: Mapping[str, Any],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        origins: Collection[str] = (),
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ):
        """`warm_up` is answered before the server is healthy; `metadata` is sent to each client first.

        `port` 0 chooses a free one. With `api_key` every client and GET /metrics need it in their header; without, they
        must address the server by an IP address, localhost, `host` or this machine's name. Requests of web pages carry
        an Origin and are refused, unless it is one of `origins`.
        """
        self.policy, self.host, self.port = policy, host, port
        limits = limits or Limits()
        self.metrics = Metrics()
        self._warm_up, self._metadata = warm_up, msgpack_numpy.pack(dict(metadata))
        self._expected = f"Api-Key {api_key}".encode() if api_key else None
        self.limits, self._origins, self._tls = limits, frozenset(origins), tls
        own = socket.gethostname()
        self._hosts = {name.lower() for name in (host, "localhost", own, f"{own}.local", socket.getfqdn())}
        self._inference_began: float | None = None  # of the one under way
        self._thread = ThreadPoolExecutor(1, "policy")
        self._healthy = False
        self._warmed, self._stop = asyncio.Event(), asyncio.Event()
        self._idle = asyncio.Event()  # no answer under way
        self._idle.set()
        self._answering: set[asyncio.Task] = set()
        self.hangs = False  # an inference had not ended when `run` did
        self._turn = asyncio.Lock()  # of requests at the policy, first come, first served
        self._sockets, self._places = Sockets(limits.strangers), Places(limits.large)
        self._doors: list[Door] = []

    async def run(self, listening: Callable[[int], None], ready: Callable[[float], None]) -> None:
        """Serves until `stop`. Calls `listening(port)`, and `ready(seconds)` after the warm-up.

        Raises:
          PolicyError: the warm-up failed, so that the policy cannot serve.
          OSError: the port is taken.
        """
        try:
            async with AsyncExitStack() as stack:
                self._doors = await open_doors(self.host, self.port, self._sockets)
                for door in self._doors:
                    await stack.enter_async_context(self._listen(door))
                listening(self._doors[0].getsockname()[1])
                started = time.monotonic()
                try:
                    await self._infer(self._warm_up)
                finally:
                    self._warmed.set()  # clients wait for it, also where nothing comes of it
                self._healthy = True
                ready(time.monotonic() - started)
                await self._stop.wait()
                try:
                    await asyncio.wait_for(self._idle.wait(), self.limits.grace_seconds)
                except TimeoutError:
                    seconds = self.limits.grace_seconds
                    _log.error("%d requests were still in progress after %g s", len(self._answering), seconds)
                    self.hangs = True
                    for task in self._answering:  # the listener would wait for them
                        task.cancel()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _listen(self, door: Door) -> AbstractAsyncContextManager:
        limits = self.limits
        return serve(
            self._serve_client,
            sock=door,
            backlog=_BACKLOG,
            process_request=self._process_request,
            create_connection=cast(Any, partial(Connection, limits, self._sockets, self._places, self.metrics.counts)),
            logger=_connection_log(),
            compression=None,  # as openpi's server and client
            max_size=int(limits.message_mb * 2**20),
            max_queue=None,  # `Connection` sees to it
            open_timeout=limits.handshake_seconds,
            close_timeout=CLOSE_SECONDS,
            ping_timeout=20 + limits.wait_seconds,  # a client that waits to be read cannot be heard
            ssl=self._tls,
        )

    def stop(self) -> None:
        """Finishes the requests in progress, then ends `run`. Call it from the event loop's thread."""
        self._stop.set()

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Handles plain HTTP requests, and checks who may connect."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            if problem := self.unhealthy():
                return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, problem + "\n")
            return connection.respond(HTTPStatus.OK, "OK\n")
        if problem := self._foreign(request):
            self.metrics.counts["unauthorized"] += 1
            return connection.respond(HTTPStatus.FORBIDDEN, problem + "\n")
        if self._expected is not None:
            given = request.headers.get_all("Authorization")
            # Compared in constant time: how long it takes tells nothing about the key.
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(errors="surrogateescape"), self._expected):
                self.metrics.counts["unauthorized"] += 1
                return connection.respond(HTTPStatus.UNAUTHORIZED, "send the header Authorization: Api-Key KEY\n")
        if path == "/metrics":
            values = {"healthy": self._healthy, "clients": self._sockets.clients()}
            response = connection.respond(HTTPStatus.OK, json.dumps({**values, **self.metrics.to_dict()}) + "\n")
            del response.headers["Content-Type"]  # an assignment alone adds a second one
            response.headers["Content-Type"] = "application/json"
            return response
        if self._stop.is_set():
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "shutting down\n")
        if self._sockets.clients() >= self.limits.clients:
            self.metrics.counts["too_many"] += 1
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.limits.clients} clients are connected\n")
        self._sockets.promote(connection)
        return None

    def unhealthy(self) -> str:
        """Why the server is not healthy; "" when it is."""
        if self._stop.is_set():
            return "shutting down"
        if not self._healthy:
            return "warming up"
        began = self._inference_began
        if began is not None and (seconds := time.monotonic() - began) > self.limits.inference_seconds:
            return f"an inference has been under way for {seconds:.0f} s"
        return ""

    def _foreign(self, request: Request) -> str:
        """Why a request may come from a web page in somebody's browser; "" when it does not."""
        if any(origin not in self._origins for origin in request.headers.get_all("Origin")):
            return "requests of web pages are refused; allow their origin with --allow-origin"
        if self._expected is not None:  # a page does not know the key
            return ""
        # A page whose name was made to resolve to this machine has its own name here: DNS rebinding.
        host = request.headers.get("Host", "")
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower() in self._hosts:
            return ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return f"the Host {host!r} is not this machine; use its IP address, or set an API key"
        return ""

    async def _serve_client(self, connection: ServerConnection) -> None:
        """Sends metadata after the warm-up, then one answer per message, in order."""
        client = cast(Connection, connection)
        try:
            async with client.patience(None):
                await self._warmed.wait()
            await client.answer(self._metadata)
            while True:  # a message has no name here, which would keep it until the next one
                await self._exchange(client, await client.recv())
        except TimeoutError:  # it has gone
            return
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == _TOO_BIG and not error.rcvd_then_sent:
                self.metrics.counts["too_large"] += 1
        except Exception:
            _log.exception("a client's connection failed")
            raise

    async def _exchange(self, client: Connection, message: bytes | str) -> None:
        if self._stop.is_set():
            await client.close(_GOING_AWAY, "shutting down")
            return
        task = cast(asyncio.Task, asyncio.current_task())
        self._answering.add(task)
        self._idle.clear()
        try:
            answer = await self._answer(client, message)
            client.answered()
            await client.answer(answer)
        finally:
            self._answering.discard(task)
            if not self._answering:
                self._idle.set()

    async def _answer(self, client: Connection, message: bytes | str) -> bytes | str:
        """Bytes: the actions. Text: the error."""
        started = time.perf_counter()
        counts = self.metrics.counts
        counts["requests"] += 1
        try:
            if isinstance(message, str):
                raise MessageError("the message is a text frame; send one binary msgpack map")
            async with self._turn_of(client):
                targets, seconds = await self._infer(
                    from_message(msgpack_numpy.unpack(message), self._warm_up.state is None)
                )
        except MessageError as error:
            counts["malformed"] += 1
            return f"malformed message: {error}"
        except _Busy as error:
            counts["gone" if client.state is State.CLOSED else "busy"] += 1
            return f"no motion: {error}"
        except PolicyError as error:
            unforeseen = error.__cause__ is not None and not isinstance(error.__cause__, ValueError)
            counts["failed" if unforeseen else "refused"] += 1
            if unforeseen:
                _log.error("inference failed", exc_info=error)
            return f"no motion: {error}"
        total = time.perf_counter() - started
        self.metrics.seconds["request"].append(total)
        self.metrics.seconds["inference"].append(seconds)
        counts["answered"] += 1
        return msgpack_numpy.pack(
            {"actions": targets, "server_timing": {"infer_ms": 1000 * seconds, "total_ms": 1000 * total}}
        )

    @asynccontextmanager
    async def _turn_of(self, client: Connection) -> AsyncIterator[None]:
        """Waits for the requests before this one. Raises _Busy after `turn_seconds`, or when the client has gone."""
        seconds = self.limits.turn_seconds
        try:
            async with client.patience(seconds):
                await self._turn.acquire()
        except TimeoutError:
            raise _Busy(
                f"the policy was busy with others' requests for {seconds:g} s; observe again, with fewer clients"
            ) from None
        try:
            yield
        finally:
            self._turn.release()

    async def _infer(self, observation: Observation) -> tuple[np.ndarray, float]:
        """(chunk, seconds in the policy); observations are processed one after the other."""

        def timed():
            started, self._inference_began = time.perf_counter(), time.monotonic()
            try:
                return act(self.policy, observation), time.perf_counter() - started
            finally:
                self._inference_began = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)


def metadata_of(policy: Any) -> dict[str, Any]:
    """The metadata of a `policy.Policy` for clients."""
    config = policy.config
    views = config.sequence.views
    low, high = policy.state_range
    absent = ("front", "wrist", *(() if config.vla.state_dim else ("state",)))
    return {
        "policy": "rynnvla",
        "keys": [*map(view_key, views), *(key for name, key in KEYS.items() if name not in absent)],
        "cameras": config.cameras.by_view(config.sequence),
        "columns": policy.statistics.columns.to_json(),
        "state_min": np.asarray(low, np.float32),
        "state_max": np.asarray(high, np.float32),
        "chunk": config.chunk,
        "action_dim": config.action_dim,
        "rates": list(policy.recording.rates),
        "frames": [list(frame) for frame in policy.recording.frames],
    }


async def until_signal(server: PolicyServer, listening: Callable[[int], None]) -> None:
    """Runs the server until SIGTERM or SIGINT, finishes the requests in progress, prints metrics. Raises as `run`."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_Complaints())
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop(name: str):
        print(f"{name}: finishing the requests in progress", flush=True)
        for number in signals:
            loop.remove_signal_handler(number)  # a second one ends the process at once
        server.stop()

    for number in signals:
        loop.add_signal_handler(number, stop, number.name)
    await server.run(
        listening, lambda seconds: print(f"ready after {seconds:.1f} s (GET /healthz, GET /metrics)", flush=True)
    )
    print(json.dumps(server.metrics.to_dict()), flush=True)
    if server.hangs:  # Python would wait for the thread of an inference that never ends
        os._exit(1)


class _Complaints:
    """Handles what the event loop complains about: each kind once a minute.

    Without free file descriptors it complains as often as it tries to accept a connection, thousands of times a second.
    """

    def __init__(self):
        self._said: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, now = context["message"], time.monotonic()
        if now - self._said.get(message, -math.inf) >= _COMPLAINT_SECONDS:
            self._said[message] = now
            _log.error("%s: %s", message, context.get("exception"))


def _percentiles(values: deque[float]) -> dict[str, float] | None:
    if not values:
        return None
    milliseconds = 1000 * np.fromiter(values, np.float64, len(values))
    p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
    named = {"p50": p50, "p95": p95, "p99": p99, "max": milliseconds.max(), "mean": milliseconds.mean()}
    return {name: round(float(value), 3) for name, value in named.items()}


def _connection_log() -> logging.Logger:
    """Without the stack traces of port scans and of clients that vanish in the handshake."""
    log = logging.getLogger("rynnvla.serve.connections")
    log.setLevel(logging.CRITICAL)
    return log
