"""`rynnvla serve`: serves an exported policy over a websocket."""

import asyncio
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, OR_HUB, parse
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.columns import describe


@dataclass(frozen=True)
class Serve:
    """Serves an exported policy to robots with the protocol of openpi's clients: websockets and msgpack.

    It serves until SIGTERM or SIGINT, and then still answers the requests in progress. GET /healthz and GET /metrics
    are on the same port.

      rynnvla serve --policy EXPORT --device cuda --dtype bfloat16 --compile --frame 480x640

    Keys of an observation:

      observation/image        uint8 [H, W, 3] RGB, the front camera
      observation/wrist_image  the same, the wrist camera; absent for a policy without one
      observation/views/NAME   the same, a camera of data.extra_views; absent for a policy without it
      observation/state        float [N], the policy's state columns, raw; absent for a policy without a state
      prompt                   text, the instruction
      observation/columns      map, optional: what state and targets mean; refused when the policy learnt another
    """

    policy: Annotated[str, tyro.conf.arg(metavar="EXPORT"), OR_BUCKET, OR_HUB]
    """Folder made by `rynnvla convert export`; one in a bucket, or hf://USER/NAME[@REV], is copied first."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 also accepts other machines, and needs an API key."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key: str | None = None
    """Key that clients send as Authorization: Api-Key ...; better set in the environment variable RYNNVLA_API_KEY."""
    without_key: bool = False
    """Listen for other machines without an API key: everybody who can connect can use the policy."""
    allow_origin: tuple[str, ...] = ()
    """Origin of a web page that may use the policy, such as https://robots.example.org; other pages are refused."""
    certificate: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    """Certificate chain for TLS (wss://); needs --private-key."""
    private_key: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    """Private key of the certificate."""
    clients: int = 64
    """Clients connected at once; further ones are refused."""
    device: str = "cpu"
    """PyTorch device that the policy runs on, for example cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the transformer's weights."""
    compile: bool = False
    """Use torch.compile: a slower start, but faster inference."""
    frame: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Shape of the cameras' frames, such as 480x640, for the warm-up: --compile compiles once per shape."""
    max_message_mb: float = 16.0
    """A larger message (in 2^20 bytes) closes the connection."""


def _tls(certificate: Path | None, private_key: Path | None) -> ssl.SSLContext | None:
    """The TLS settings of the two files; None without them. Raises UsageError."""
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise UsageError("--certificate and --private-key belong together; give both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--certificate {certificate} with --private-key {private_key}: {error}") from None
    return context


def main(argv: list[str]) -> int:
    """Returns 0 after SIGTERM or SIGINT."""
    arguments = parse(Serve, "rynnvla serve", argv)
    if not 0 <= arguments.port < 2**16:
        raise UsageError(f"--port {arguments.port} is not between 0 and {2**16 - 1}")
    from rynnvla_jax.deploy import server
    from rynnvla_jax.deploy.export_format import PolicyError
    from rynnvla_jax.deploy.limits import Limits, fit
    from rynnvla_jax.deploy.observation import frame_shape
    from rynnvla_jax.recording import hertz

    frame = None if arguments.frame is None else frame_shape(arguments.frame)
    api_key = arguments.api_key or os.environ.get(server.API_KEY) or None
    logging.basicConfig(format="rynnvla serve: %(message)s")
    if not (api_key or arguments.without_key or arguments.host in ("127.0.0.1", "localhost", "::1")):
        raise UsageError(
            f"--host {arguments.host} accepts other machines: set an API key in {server.API_KEY}, or add --without-key "
            "to let everybody use the policy"
        )
    tls = _tls(arguments.certificate, arguments.private_key)
    wanted = Limits(clients=arguments.clients, message_mb=arguments.max_message_mb)
    if (limits := fit(wanted)) != wanted:
        print(
            f"at most {limits.clients} clients, not {wanted.clients}, and {limits.strangers} other connections: this "
            "process may not open more files (ulimit -n)",
            flush=True,
        )
    from rynnvla_jax.deploy.policy import DTYPES, Policy

    dtype = DTYPES[arguments.dtype]
    policy = Policy.load(arguments.policy, arguments.device, dtype, arguments.compile, keep_memory=True)
    served = server.PolicyServer(
        policy,
        policy.example(frame),
        server.metadata_of(policy),
        host=arguments.host,
        port=arguments.port,
        api_key=api_key,
        origins=arguments.allow_origin,
        tls=tls,
        limits=limits,
    )
    how = f"{arguments.device}, {arguments.dtype}, {describe(policy.statistics.columns.state) or 'no state'}"
    if policy.recording.rates:
        how += f", recorded at {hertz(policy.recording.rates)}"

    def listening(port: int) -> None:
        print(
            f"{arguments.policy} on {'wss' if tls else 'ws'}://{arguments.host}:{port} ({how}); warming up", flush=True
        )

    try:
        asyncio.run(server.until_signal(served, listening))
    except OSError as error:
        raise PolicyError(f"{error}; choose another --host or --port") from error
    return 0
