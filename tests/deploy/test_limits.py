"""What clients may take of a server: bytes, places, sockets, frames. Others must not notice."""

import dataclasses
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from rynnvla_jax.deploy import limits, msgpack_numpy
from rynnvla_jax.deploy.export_format import ConnectionLost, PolicyError
from rynnvla_jax.deploy.limits import Limits
from rynnvla_jax.deploy.observation import to_message
from rynnvla_jax.deploy.remote import RemotePolicy
from tests.deploy.serving import WAIT, Gated, exchange, observation, raw, resident, running

SMALL = msgpack_numpy.pack(to_message(observation(1)))
FRAME_LARGE = np.zeros((200, 200, 3), np.uint8)  # 120 kB
LARGE = msgpack_numpy.pack(to_message(observation(2)._replace(front=FRAME_LARGE)))
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TIGHT = {"small_mb": 0.05, "message_mb": 0.25, "large": 1}


def begin_large(connection):
    """Announces a message of 200,000 bytes and sends 60,000 of them."""
    header = struct.pack("!BBQ", 0x82, 0xFF, 200_000) + bytes(4)
    connection.socket.sendall(header + bytes(60_000))


def flood(connection, frame, times):
    data = frame.serialize(mask=True) * times
    with suppress(OSError):  # cut off in the middle, as it should be
        connection.socket.sendall(data)


def ends(connection):
    """How the server closed a connection: (code, reason)."""
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            connection.recv(timeout=WAIT)
    received = closed.value.rcvd
    return (received.code, received.reason) if received else (1006, "")


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Bytes


def test_large_messages_wait_unread_while_small_ones_are_answered():
    with running(limits=Limits(**TIGHT, message_seconds=WAIT)) as served:
        stalled, other, small = (raw(served)[0] for _ in range(3))
        begin_large(stalled)  # takes the one place
        other.send(LARGE)
        for _ in range(3):
            assert isinstance(exchange(small, SMALL), bytes)
        with pytest.raises(TimeoutError):
            other.recv(timeout=0.1)
        stalled.socket.close()
        assert msgpack_numpy.unpack(other.recv(timeout=WAIT))["actions"][0, 0] == 2
        assert isinstance(exchange(other, LARGE), bytes)  # and the place is free again


def test_places_for_large_messages_go_to_the_first_who_asked():
    policy = Gated(open_for=1)
    with running(policy, limits=Limits(**TIGHT)) as served:
        assert served.ready.wait(WAIT) and policy.entered.acquire(timeout=WAIT)
        clients = [raw(served)[0] for _ in range(4)]
        for number, client in enumerate(clients):
            client.send(msgpack_numpy.pack(to_message(observation(number)._replace(front=FRAME_LARGE))))
            if not number:
                assert policy.entered.acquire(timeout=WAIT)
            else:
                until(lambda waiting=number: len(served.server._places._waiting) == waiting)
        for number, client in enumerate(clients):
            policy.gate.release()
            assert msgpack_numpy.unpack(client.recv(timeout=WAIT))["actions"][0, 0] == number


def test_who_waits_too_long_for_a_place_is_told_to_try_again():
    with running(limits=Limits(**TIGHT, wait_seconds=0.2, message_seconds=WAIT)) as served:
        stalled, other = raw(served)[0], raw(served)[0]
        begin_large(stalled)
        other.send(LARGE)
        code, reason = ends(other)
        assert code == 1013 and "try again later, or send smaller frames" in reason
        with pytest.raises(ConnectionLost, match="busy with other clients' large observations"):
            RemotePolicy(served.url).act(*observation()._replace(front=FRAME_LARGE))
        assert RemotePolicy(served.url).act(*observation(3))[0, 0] == 3
        assert served.metrics()["busy"] == 2
        stalled.socket.close()


def test_a_large_message_that_never_ends_loses_its_place():
    with running(limits=Limits(**TIGHT, message_seconds=0.2)) as served:
        stalled, other = raw(served)[0], raw(served)[0]
        begin_large(stalled)
        other.send(LARGE)
        assert isinstance(other.recv(timeout=WAIT), bytes)
        code, reason = ends(stalled)
        assert code == 1008 and reason == "a message took longer than 0.2 s; send smaller frames"
        assert served.metrics()["cut_off"] == 1


def test_a_request_that_waits_too_long_for_the_policy_is_an_error():
    policy = Gated(open_for=1)
    with running(policy, limits=Limits(turn_seconds=0.2)) as served:
        assert served.ready.wait(WAIT) and policy.entered.acquire(timeout=WAIT)
        first, second = raw(served)[0], raw(served)[0]
        first.send(SMALL)
        assert policy.entered.acquire(timeout=WAIT)
        assert exchange(second, SMALL).startswith("no motion: the policy was busy with others' requests for 0.2 s")
        policy.gate.release(2)
        assert isinstance(first.recv(timeout=WAIT), bytes)
        assert isinstance(exchange(second, SMALL), bytes)  # on the same connection
        assert served.metrics()["busy"] == 1


def test_requests_of_clients_that_have_gone_do_not_reach_the_policy():
    policy = Gated(open_for=1)
    with running(policy) as served:
        assert served.ready.wait(WAIT) and policy.entered.acquire(timeout=WAIT)
        first, last = raw(served)[0], raw(served)[0]
        first.send(SMALL)
        assert policy.entered.acquire(timeout=WAIT)
        for _ in range(5):
            gone, _ = raw(served)
            gone.send(SMALL)
            gone.socket.close()
        until(lambda: served.metrics()["gone"] == 5)
        policy.gate.release(2)
        assert isinstance(first.recv(timeout=WAIT), bytes)
        assert isinstance(exchange(last, SMALL), bytes)
        metrics = served.metrics()
        assert metrics["answered"] == 2 and metrics["requests"] == 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_thirty_clients_with_the_largest_messages_take_few_megabytes():
    policy = Gated(open_for=1)
    with running(policy) as served, ExitStack() as stack:
        assert served.ready.wait(WAIT) and policy.entered.acquire(timeout=WAIT)
        small, _ = raw(served)
        before = resident()
        payload = bytes(200_000)
        header = struct.pack("!BBQ", 0x82, 0xFF, 15 * 2**20) + bytes(4)
        for _ in range(30):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), WAIT))
            client.sendall(HANDSHAKE)
            client.settimeout(0.02)
            with suppress(TimeoutError):  # where the server stops reading
                client.sendall(header)
                for _ in range(75):
                    client.sendall(payload)
        policy.gate.release()
        assert isinstance(exchange(small, SMALL), bytes)
        assert resident() - before < 250  # 450 were sent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_answered_message_is_not_kept():
    message = bytes(8 * 2**20)
    with running() as served, ExitStack() as stack:
        exchange(raw(served)[0], message)
        before = resident()
        for _ in range(20):
            assert "malformed" in exchange(stack.enter_context(raw(served)[0]), message)
        assert resident() - before < 80  # 168 were sent, and all clients are still connected


# Frames


def test_floods_of_frames_are_cut_off():
    ping = Frame(Opcode.PING, b"")
    with running() as served:
        first, second, third, honest = (raw(served)[0] for _ in range(4))
        flood(first, ping, 20_000)
        assert ends(first)[0] in (1008, 1006)
        flood(second, Frame(Opcode.BINARY, b"", fin=False), 1)
        flood(second, Frame(Opcode.CONT, b"", fin=False), 20_000)
        assert ends(second)[0] in (1008, 1006)
        flood(third, Frame(Opcode.BINARY, b""), 20_000)
        assert ends(third)[0] in (1008, 1006)
        assert isinstance(exchange(honest, SMALL), bytes)
        assert served.metrics()["cut_off"] == 3


def test_a_few_pings_and_fragments_are_welcome():
    with running() as served:
        connection, _ = raw(served)
        for _ in range(100):
            assert connection.ping().wait(WAIT)
        connection.send(SMALL[i : i + 1] for i in range(len(SMALL)))
        assert isinstance(connection.recv(timeout=WAIT), bytes)


def test_who_does_not_read_its_answers_is_cut_off(monkeypatch):
    monkeypatch.setattr(limits, "_FRAMES", 10**9)
    monkeypatch.setattr(limits, "_UNREAD", 2**16)
    with running() as served, socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(WAIT)
        client.sendall(HANDSHAKE)
        with pytest.raises(OSError):
            while True:
                client.sendall(Frame(Opcode.PING, bytes(125)).serialize(mask=True) * 1000)
        assert served.metrics()["cut_off"] == 1


# Sockets


@contextmanager
def silent(port, count):
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), WAIT)) for _ in range(count)]


def files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_silent_connections_are_closed_for_new_ones():
    with running(limits=Limits(clients=2, strangers=8, handshake_seconds=WAIT)) as served:
        clients = [raw(served)[0] for _ in range(2)]
        before = files()
        with silent(served.port, 50) as strangers:
            for _ in range(20):
                assert served.get("/healthz") == (200, b"OK\n")
            assert files() - before <= 50 + 8
            for stranger in strangers[:40]:
                assert stranger.recv(1) == b""  # the oldest have gone
            with pytest.raises(InvalidStatus) as error:
                raw(served)
            assert error.value.response.status_code == 503
            assert all(isinstance(exchange(client, SMALL), bytes) for client in clients)  # clients stay


def test_silent_connections_are_closed_in_a_tls_handshake_too(tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem"], capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is needed")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    anyone = ssl._create_unverified_context()
    limits = Limits(strangers=8, handshake_seconds=WAIT)
    with running(limits=limits, tls=tls) as served, silent(served.port, 50) as strangers:
        connection = connect(served.url.replace("ws:", "wss:"), ssl=anyone, compression=None)
        connection.recv(timeout=WAIT)
        assert isinstance(exchange(connection, LARGE), bytes)
        for stranger in strangers[:40]:
            assert stranger.recv(1) == b""
        connection.close()


def test_connections_fit_the_files_that_the_process_may_open(monkeypatch):
    def fitted(hard):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, hard))
        asked.clear()
        return limits.fit(Limits())

    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: asked.append(both))
    assert fitted(4096) == Limits() and asked == [(4096, 4096)]
    assert fitted(resource.RLIM_INFINITY) == Limits()
    assert fitted(256) == Limits()
    assert fitted(128) == dataclasses.replace(Limits(), clients=32, strangers=32)
    with pytest.raises(PolicyError, match=r"may open 64 files, too few to serve; allow 256 \(ulimit -n\)"):
        fitted(64)
