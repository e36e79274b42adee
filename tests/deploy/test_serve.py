"""The policy server, from outside: openpi's protocol byte by byte, strangers, load, shutdown."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rynnvla_jax.cli import main as cli
from rynnvla_jax.cli.arguments import parse
from rynnvla_jax.cli.serve import Serve
from rynnvla_jax.deploy import export_format, msgpack_numpy
from rynnvla_jax.deploy import server as server_module
from rynnvla_jax.deploy.control import Controller
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.limits import Limits
from rynnvla_jax.deploy.observation import KEYS, MAX_EDGE, to_message
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.deploy.remote import RemotePolicy
from rynnvla_jax.deploy.server import Metrics
from rynnvla_jax.recording import Recording
from tests import ROOT, exports
from tests.deploy.serving import (
    FRAME,
    WAIT,
    Fake,
    Gated,
    Running,
    command,
    exchange,
    observation,
    raw,
    resident,
    running,
)


def array(x):
    """An array as openpi encodes it, written out here on purpose."""
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}


# The protocol


def test_the_protocol_byte_by_byte():
    with running() as served:
        connection, metadata = raw(served)
        assert msgpack.unpackb(metadata) == {"policy": "fake"}
        request = {
            "observation/image": array(FRAME),
            "observation/state": array(np.array([7.0, 0.0])),
            "prompt": "go",
        }
        answer = msgpack.unpackb(exchange(connection, msgpack.packb(request)))
        assert set(answer) == {"actions", "server_timing"}
        targets = np.arange(6, dtype="<f4") + 7
        assert answer["actions"] == {
            b"__ndarray__": True, b"data": targets.tobytes(), b"dtype": "<f4", b"shape": [3, 2],
        }  # fmt: skip
        timing = answer["server_timing"]
        assert set(timing) == {"infer_ms", "total_ms"} and 0 <= timing["infer_ms"] <= timing["total_ms"]
        connection.close()


def test_every_number_type_survives_the_wire():
    rng = np.random.default_rng(0)
    values = {
        name: (rng.random((2, 3)) * 100).astype(name)
        for name in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
                     "float16", "float32", "float64", ">f4", ">i2")
    }  # fmt: skip
    values |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5), "strided": rng.random((4, 6))[::2, ::3]}
    back = msgpack_numpy.unpack(msgpack_numpy.pack(values))
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
    generic = msgpack_numpy.unpack(
        msgpack_numpy.pack({"x": np.float32(1.5), "n": [np.int64(3), True, None, "text", b"bytes"]})
    )
    assert generic == {"x": 1.5, "n": [3, True, None, "text", b"bytes"]}
    for odd in (np.array([object()]), np.array(["text"]), np.array([1j]), object()):
        with pytest.raises(TypeError, match="cannot be sent"):
            msgpack_numpy.pack({"x": odd})


CLIENT = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key=sys.argv[2])
frame = np.full((48, 64, 3), 90, np.uint8)
answer = client.infer({"observation/image": frame, "observation/state": np.zeros(6), "prompt": "pick up the block"})
error = ""
try:
    client.infer({"observation/image": frame, "observation/state": np.full(6, 1e6), "prompt": "pick up the block"})
except RuntimeError as e:
    error = str(e)
again = client.infer({"observation/image": frame, "observation/state": np.zeros(6), "prompt": "pick up the block"})
print(json.dumps({"chunk": client.get_server_metadata()["chunk"], "error": error,
                  "actions": answer["actions"].tolist(), "again": again["actions"].tolist()}))
"""


def test_openpis_own_client_drives_it(tmp_path):
    """Unchanged from the package index; beside our environment, since it asks for an older numpy."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site"]
    installed = subprocess.run([*install, "openpi-client==0.1.2"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"openpi-client cannot be installed here: {installed.stderr[-300:]}")
    export = exports.write_tiny(tmp_path / "export")
    with command(export, RYNNVLA_API_KEY="secret") as (process, port):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(port), "secret"], env=environment, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = Policy.load(export).act(np.full((48, 64, 3), 90, np.uint8), None, np.zeros(6), "pick up the block")
    np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)
    assert answer["chunk"] == 4 and answer["again"] == answer["actions"]
    assert "no motion: state is out of the training data's range" in answer["error"]


# Our client


def test_remote_policy_has_the_act_of_a_local_one():
    with running() as served:
        remote = RemotePolicy(served.url)
        assert remote.metadata == {"policy": "fake"} and remote.recording == Recording()
        np.testing.assert_array_equal(remote.act(*observation(3)), Fake().act(*observation(3)))
        with pytest.raises(PolicyError, match="no motion: state is out of range"):
            remote.act(*observation(0, -1))
        np.testing.assert_array_equal(remote.act(*observation(4)), Fake().act(*observation(4)))
        targets = [Controller(remote, 2).target(lambda: observation(5)) for _ in range(2)]
        np.testing.assert_array_equal(targets, [[5, 6], [5, 6]])
        remote.close()


def test_remote_policy_says_why_there_is_no_motion():
    with running(limits=Limits(message_mb=0.01)) as served:
        remote = RemotePolicy(served.url)
        with pytest.raises(PolicyError, match="larger than the server accepts; .*--max-message-mb"):
            remote.act(*observation()._replace(front=np.zeros((100, 100, 3), np.uint8)))
        assert remote.act(*observation(2))[0, 0] == 2  # it connects again
    with pytest.raises(PolicyError, match="server"):
        remote.act(*observation())
    for url in (served.url, "http://127.0.0.1:1", "ws://"):
        with pytest.raises(PolicyError):
            RemotePolicy(url, timeout=5).act(*observation())
    with pytest.raises(PolicyError, match="cannot be sent"):
        RemotePolicy(url).act(*observation()._replace(state=np.array(["a"])))


def test_an_answer_that_came_too_late_is_never_taken_for_the_next_one():
    policy = Gated(open_for=1)
    with running(policy) as served:
        remote = RemotePolicy(served.url, timeout=WAIT)
        assert remote.metadata
        remote.timeout = 0.2
        with pytest.raises(PolicyError, match="did not answer within 0.2 s"):
            remote.act(*observation(1))
        remote.timeout = WAIT
        policy.gate.release(2)
        assert remote.act(*observation(2))[0, 0] == 2


@pytest.mark.parametrize("answer", [KeyboardInterrupt(), {"policy": "fake"}])
def test_an_answer_left_unread_is_never_taken_for_the_next_one(answer, monkeypatch):
    def receive(connection):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    with running() as served:
        remote = RemotePolicy(served.url)
        with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, PolicyError)):
            patched.setattr(remote, "_receive", receive)  # metadata and answer stay in the socket
            remote.act(*observation(1))
        for state in (2, 3):
            assert remote.act(*observation(state))[0, 0] == state


# Who may ask what


def test_api_key():
    with running(api_key="secret") as served:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "secret"}):
            with pytest.raises(InvalidStatus) as error:
                raw(served, **headers)
            assert error.value.response.status_code == 401
        with pytest.raises(PolicyError, match="needs its API key .*401"):
            RemotePolicy(served.url).act(*observation())
        assert served.get("/metrics")[0] == 401
        assert served.get("/healthz") == (200, b"OK\n")
        assert RemotePolicy(served.url, api_key="secret").act(*observation(1)).shape == (3, 2)
        metrics = served.metrics(Authorization="Api-Key secret")
        assert metrics["unauthorized"] == 5 and metrics["answered"] == metrics["requests"] == 1


def test_web_pages_are_refused_unless_their_origin_is_allowed():
    with running(origins=["https://ours.example"]) as served:
        for path in ("/", "/metrics"):
            assert served.get(path, Origin="https://theirs.example")[0] == 403
            assert served.get(path, Host="theirs.example:8000")[0] == 403  # DNS rebinding
        assert served.get("/metrics", Origin="https://ours.example")[0] == 200
        for host in ("127.0.0.1:1", "localhost", "[::1]:80", "192.168.1.7:8000", socket.gethostname().upper()):
            assert served.get("/metrics", Host=host)[0] == 200, host
        with pytest.raises(InvalidStatus):
            raw(served, Origin="https://theirs.example")
        assert served.metrics()["unauthorized"] == 5
    with running(api_key="secret") as served:  # a page does not know the key, so any name will do
        assert served.get("/metrics", Host="robot.example", Authorization="Api-Key secret")[0] == 200


def test_more_clients_than_allowed_are_refused():
    with running(limits=Limits(clients=2)) as served:
        first, second = raw(served)[0], raw(served)[0]
        with pytest.raises(InvalidStatus) as error:
            raw(served)
        assert error.value.response.status_code == 503 and served.metrics()["too_many"] == 1
        first.close()
        again = raw(served)[0]
        assert served.get("/healthz") == (200, b"OK\n")
        for connection in (again, second):
            connection.close()


def test_an_inference_that_hangs_is_unhealthy_and_does_not_keep_the_process(monkeypatch):
    policy = Gated()
    with running(policy, limits=Limits(inference_seconds=0.2, grace_seconds=0.2)) as served:
        assert served.ready.wait(WAIT) and policy.entered.acquire(timeout=WAIT)
        connection, _ = raw(served)
        connection.send(msgpack_numpy.pack(GOOD))
        assert policy.entered.acquire(timeout=WAIT)
        while served.get("/healthz")[0] == 200:
            pass
        assert b"an inference has been under way for" in served.get("/healthz")[1]
        served.stop()
        served.thread.join(WAIT)  # after the grace period, with the inference still under way
        assert not served.thread.is_alive() and served.server.hangs
        policy.gate.release()


def test_other_machines_need_a_key_unless_told(export, capsys, monkeypatch):
    monkeypatch.delenv(server_module.API_KEY, raising=False)
    assert cli.main(["serve", "--policy", str(export), "--host", "0.0.0.0"]) == 2
    assert "set an API key in RYNNVLA_API_KEY, or add --without-key" in capsys.readouterr().err
    assert cli.main(["serve", "--policy", str(export), "--certificate", "c.pem"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_binds_to_localhost_unless_told():
    with running() as served:
        assert {s.getsockname()[0] for s in served.server._doors} == {"127.0.0.1"}
    assert parse(Serve, "rynnvla serve", ["--policy", "x"]).host == "127.0.0.1"


def test_messages_over_the_limit_close_the_connection():
    with running(limits=Limits(message_mb=0.25)) as served:
        connection, _ = raw(served)
        with pytest.raises(ConnectionClosed) as closed:
            exchange(connection, bytes(2**18 + 1))
        assert closed.value.rcvd.code == 1009
        other, _ = raw(served)
        assert "malformed" in exchange(other, bytes(2**18))  # just within
        assert served.metrics()["too_large"] == 1
        other.close()


GOOD = to_message(observation())


@pytest.mark.parametrize(
    "message, expected",
    [
        ("text", "the message is a text frame"),
        (b"", "cannot be unpacked"),
        (b"\x81", "cannot be unpacked"),
        (msgpack_numpy.pack(GOOD) + b"\x00", "cannot be unpacked"),
        (msgpack_numpy.pack([1]), "is list, expected a map"),
        (msgpack_numpy.pack({}), "lacks observation/image, observation/state, prompt"),
        (msgpack_numpy.pack({**GOOD, "observation/images": FRAME}), "Did you mean observation/image?"),
        (msgpack_numpy.pack({**GOOD, b"prompt": "a"}), "unknown key"),
        (msgpack_numpy.pack({**GOOD, "prompt": 7}), "prompt is int, expected text"),
        (msgpack_numpy.pack({**GOOD, "prompt": "go " * 400}), "prompt has 1200 characters, the limit is 1000"),
        (msgpack_numpy.pack({**GOOD, "observation/columns": {"robot": 5}}), "observation/columns: robot is 5"),
        (msgpack_numpy.pack({**GOOD, "observation/image": FRAME.astype(np.float32)}), r"image is float32 \[4, 5, 3\]"),
        (msgpack_numpy.pack({**GOOD, "observation/image": FRAME[..., :1]}), r"image is uint8 \[4, 5, 1\]"),
        (msgpack_numpy.pack({**GOOD, "observation/image": FRAME[:0]}), "has 0 x 5 pixels"),
        (
            msgpack_numpy.pack({**GOOD, "observation/image": np.zeros((MAX_EDGE + 1, 1, 3), np.uint8)}),
            "has 4097 x 1 pixels",
        ),
        (msgpack_numpy.pack({**GOOD, "observation/wrist_image": "path.png"}), "wrist_image is str"),
        (msgpack_numpy.pack({**GOOD, "observation/state": np.zeros((1, 2))}), r"state is float64 \[1, 2\]"),
        (msgpack_numpy.pack({**GOOD, "observation/state": ["a", 1]}), "state has elements that are not numbers"),
        (msgpack_numpy.pack({**GOOD, "observation/state": None}), "lacks observation/state"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": []}), "dtype is '.O'"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "i4,i4", b"shape": []}), "dtype is 'i4,i4'"),
        (msgpack.packb({b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [3]}), "needs 12 bytes"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**40, 0, -1]}), "shape is"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f8", b"shape": [2**62, 2**62]}), "needs"),
        (msgpack.packb({b"__ndarray__": True, b"dtype": "<f4", b"shape": [0]}), "has no data or no shape"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "scalar contains str"),
        (b"\x91" * 100_000, "cannot be unpacked"),
        (b"\xdc\x00\xc8" + b"\x80" * 200, "over 64 maps and lists"),
        (b"\xdd\x7f\xff\xff\xff", "cannot be unpacked"),
        (msgpack.packb(msgpack.ExtType(5, b"pickle")), "cannot be unpacked|holds ExtType"),
    ],
)
def test_malformed_messages_are_answered_and_counted(service, message, expected):
    before = service.metrics()
    connection, _ = raw(service)
    answer = exchange(connection, message)
    assert isinstance(answer, str) and answer.startswith("malformed message: ")
    assert re.search(expected, answer), answer
    assert msgpack_numpy.unpack(exchange(connection, msgpack_numpy.pack(GOOD)))["actions"].shape == (
        3,
        2,
    )  # the same connection
    after = service.metrics()
    assert {k: after[k] - before[k] for k in ("requests", "malformed", "answered", "failed", "refused")} == {
        "requests": 2, "malformed": 1, "answered": 1, "failed": 0, "refused": 0,
    }  # fmt: skip
    connection.close()


@pytest.fixture(scope="module")
def service():
    with running() as served:
        yield served


def test_what_the_policy_refuses_is_told_and_the_rest_is_logged(service, caplog):
    before = service.metrics()
    connection, _ = raw(service)
    assert (
        exchange(connection, msgpack_numpy.pack(to_message(observation(0, -1)))) == "no motion: state is out of range"
    )
    assert "RuntimeError" not in caplog.text
    assert "out of memory" in exchange(connection, msgpack_numpy.pack(to_message(observation(0, 2000))))
    assert "RuntimeError: out of memory" in caplog.text  # with its stack
    after = service.metrics()
    assert (after["refused"] - before["refused"], after["failed"] - before["failed"]) == (1, 1)
    connection.close()


# Life


def test_healthy_only_after_the_warm_up_and_during_inference():
    policy = Gated(open_for=0)
    with running(policy) as served:
        assert policy.entered.acquire(timeout=WAIT)  # the warm-up is under way
        assert served.get("/healthz") == (503, b"warming up\n") and not served.metrics()["healthy"]
        early = connect(served.url, compression=None)  # a client that comes too early waits for its metadata
        with pytest.raises(TimeoutError):
            early.recv(timeout=0.1)
        policy.gate.release()
        assert msgpack.unpackb(early.recv(timeout=WAIT))["policy"] == "fake"
        early.send(msgpack_numpy.pack(GOOD))
        assert policy.entered.acquire(timeout=WAIT)  # inference hangs
        assert served.get("/healthz") == (200, b"OK\n")
        metrics = served.metrics()
        assert metrics["healthy"] and metrics["clients"] == 1 and metrics["requests"] == 1 > metrics["answered"]
        policy.gate.release()
        assert msgpack_numpy.unpack(early.recv(timeout=WAIT))["actions"].shape == (3, 2)
        early.close()


def test_a_policy_that_fails_its_warm_up_does_not_serve():
    class Broken:
        def act(self, *arguments):
            raise PolicyError("weights are broken")

    served = Running(Broken())
    served.thread.join(WAIT)
    assert not served.thread.is_alive() and isinstance(served.error, PolicyError)


def test_percentiles():
    metrics = Metrics()
    assert metrics.to_dict()["request_ms"] is None
    metrics.seconds["request"].extend(np.random.default_rng(0).permutation(1001) / 1000)
    assert metrics.to_dict()["request_ms"] == {"p50": 500, "p95": 950, "p99": 990, "max": 1000, "mean": 500}
    metrics.seconds["request"].extend([0.002] * 10_000)  # the window forgets
    assert set(metrics.to_dict()["request_ms"].values()) == {2.0}


def test_latencies_are_those_of_the_answers():
    with running() as served:
        remote = RemotePolicy(served.url)
        for i in range(5):
            remote.act(*observation(i))
        metrics = served.metrics()
        assert metrics["answered"] == 5
        for name in ("p50", "p95", "p99", "max", "mean"):
            assert 0 < metrics["inference_ms"][name] <= metrics["request_ms"][name]


def test_shutdown_answers_what_is_under_way():
    policy = Gated(open_for=1)
    with running(policy) as served:
        busy, _ = raw(served)
        idle, _ = raw(served)
        assert policy.entered.acquire(timeout=WAIT)
        busy.send(msgpack_numpy.pack(GOOD))
        assert policy.entered.acquire(timeout=WAIT)
        served.stop()
        while served.get("/healthz")[0] == 200:
            pass
        assert served.get("/healthz") == (503, b"shutting down\n")
        with pytest.raises(InvalidStatus) as error:
            raw(served)
        assert error.value.response.status_code == 503
        policy.gate.release()
        assert msgpack_numpy.unpack(busy.recv(timeout=WAIT))["actions"].shape == (3, 2)
        for connection in (busy, idle):
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=WAIT)
            assert closed.value.rcvd.code == 1001
        served.thread.join(WAIT)
        assert served.error is None


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = exports.write_tiny(tmp_path_factory.mktemp("serve") / "export")
    config = replace(export_format.read_config(folder), recording=Recording((10.0,), ((48, 64),)))
    export_format.write_config(folder, config)
    export_format.write_sums(folder)
    return folder


def test_the_command_serves_an_export_until_sigterm(export):
    with command(export) as (process, port):
        remote, local = RemotePolicy(f"ws://127.0.0.1:{port}"), Policy.load(export)
        seen = local.example()
        np.testing.assert_allclose(remote.act(*seen), local.act(*seen), atol=1e-5)
        metadata = remote.metadata
        assert metadata["columns"]["robot"] == "tiny" and (metadata["chunk"], metadata["action_dim"]) == (4, 6)
        assert metadata["keys"] == [KEYS[k] for k in ("front", "state", "instruction", "columns")]
        np.testing.assert_allclose(metadata["state_max"], local.state_range[1], rtol=1e-6)
        with pytest.raises(PolicyError, match="robot 'tiny' and 'another'"):
            remote.act(*seen._replace(columns=replace(seen.columns, robot="another")))
        assert remote.recording == local.recording == Recording((10.0,), ((48, 64),))
        with pytest.raises(PolicyError, match="recorded at 10 Hz but is controlled at 30 Hz"):
            Controller(remote, 2, rate=30)
        with pytest.raises(PolicyError, match=r"front image has 108 x 192 pixels.*crop its frames to 108 x 144"):
            remote.act(*seen._replace(front=np.zeros((108, 192, 3), np.uint8)))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0 and not err
        first, last = out.splitlines()
        assert first == "SIGTERM: finishing the requests in progress"
        assert (json.loads(last)["answered"], json.loads(last)["refused"]) == (1, 2)


def test_the_command_names_what_stops_it(export, tmp_path, capsys):
    assert cli.main(["serve", "--policy", str(tmp_path)]) == 1
    assert "config.json is missing" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--policy", str(export), "--port", str(port)]) == 1
    assert "choose another --host or --port" in capsys.readouterr().err
    (tmp_path / "config.json").mkdir()
    assert cli.main(["serve", "--policy", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "config.json cannot be read" in error and "--port" not in error
    wrong = {
        "--port": ("70000", "65535"),
        "--frame": ("480", "not HEIGHTxWIDTH"),
        "--frame=0x64": ("", "not HEIGHTxWIDTH"),
    }
    for flag, (value, said) in wrong.items():
        assert cli.main(["serve", "--policy", str(export), flag, *filter(None, [value])])
        assert said in capsys.readouterr().err


def test_the_command_warms_up_with_the_cameras_frames(export, monkeypatch, capsys):
    def stop(policy, warm_up, *_, **options):
        raise PolicyError(f"would warm up with {warm_up.front.shape}")

    monkeypatch.setattr(server_module, "PolicyServer", stop)
    for options, shape in (([], "(48, 64, 3)"), (["--frame", "96x128"], "(96, 128, 3)")):
        assert cli.main(["serve", "--policy", str(export), *options]) == 1
        assert shape in capsys.readouterr().err


def test_the_command_serves_fewer_clients_where_few_files_may_be_open(export, monkeypatch, capsys):
    def stop(*_, limits, **options):
        raise PolicyError(f"would serve {limits.clients} clients")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 128))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: None)
    monkeypatch.setattr(server_module, "PolicyServer", stop)
    assert cli.main(["serve", "--policy", str(export), "--clients", "50"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("at most 32 clients, not 50, and 32 other connections: ") and "(ulimit -n)" in said.out
    assert "would serve 32 clients" in said.err


def test_robots_side_needs_no_torch():
    program = """
import sys
from rynnvla_jax.deploy import control, remote, server
from rynnvla_jax.cli import main
try:
    main.main(["serve", "--help"])
except SystemExit as end:
    assert not end.code
assert not {"torch", "jax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(key in done.stdout for key in KEYS.values()), done.stderr


# Load


def test_eight_clients_at_once_each_get_their_own_answers():
    def client(number):
        remote = RemotePolicy(served.url)
        for i in range(25):
            first = 100 * number + i
            np.testing.assert_array_equal(remote.act(*observation(first)), Fake().act(*observation(first)))
        remote.close()
        return 25

    with running() as served, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(client, range(8))) == 200
        metrics = served.metrics()
    assert metrics["answered"] == metrics["requests"] == 200


def garbage(rng):
    """One message that is probably no observation."""
    good = msgpack_numpy.pack(to_message(observation(rng.random())))
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return good[: rng.randrange(len(good))]
    if kind == 2:
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)
    if kind == 3:
        claim = rng.choice([b"\x91", b"\x81\xa1a", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x80"])
        return claim * rng.randrange(1, 20_000)
    if kind == 4:
        return "text " * rng.randrange(100)
    values = [None, True, -1, 2**63, 1e308, float("nan"), "x" * 2000, b"x", [], {}, [[[1]]], np.zeros(3), FRAME, "go"]
    keys = [*KEYS.values(), "observation", ""]
    return msgpack_numpy.pack({rng.choice(keys): rng.choice(values) for _ in range(rng.randrange(6))})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_thousand_malformed_messages():
    rng = random.Random(0)
    with running() as served:
        connection, _ = raw(served)
        texts = answers = 0
        memory = []
        for i in range(10_000):
            if i in (2000, 9999):
                memory.append(resident())
            answer = exchange(connection, garbage(rng))
            texts += isinstance(answer, str)
            answers += not isinstance(answer, str)
        metrics = served.metrics()
        assert metrics["requests"] == 10_000 and metrics["failed"] == 0 and metrics["answered"] == answers
        assert texts == metrics["malformed"] + metrics["refused"] > 9000
        assert memory[1] - memory[0] < 20
        assert msgpack_numpy.unpack(exchange(connection, msgpack_numpy.pack(GOOD)))["actions"].shape == (3, 2)
        connection.close()


def test_broken_connections_do_no_harm():
    rng = random.Random(0)
    handshake = (
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    )
    with running(api_key="secret") as served:
        for i in range(60):
            with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT) as client:
                start = (
                    rng.randbytes(100),
                    b"GET / HTTP/1.1\r\n\r\n",
                    handshake.encode() + b"Authorization: \xff\xfe\r\n\r\n",  # not even text
                    (handshake + "Authorization: Api-Key secret\r\n\r\n").encode() + rng.randbytes(100),  # no frames
                    handshake.encode()[: rng.randrange(100)],
                )[i % 5]
                client.sendall(start)
        assert served.get("/healthz") == (200, b"OK\n")
        assert RemotePolicy(served.url, api_key="secret").act(*observation(1)).shape == (3, 2)
