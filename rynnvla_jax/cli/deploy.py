"""`rynnvla deploy check`: whether an exported policy runs on this machine, its latency and its range of motion."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, OR_HUB, parse
from rynnvla_jax.cli.main import Command, dispatch

COMMANDS = {
    "check": Command("answer one observation: latency and ranges, as JSON", __name__, "deploy", "check"),
}
Frame = Annotated[str | None, tyro.conf.arg(metavar="HxW")]


@dataclass(frozen=True)
class Check:
    """Loads an exported policy, runs it on a synthetic observation, and prints latency and ranges as JSON.

    It reports the time of the first call and the median of the later ones.

      rynnvla deploy check EXPORT --device cuda --dtype bfloat16 --compile
    """

    export: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPORT"), OR_BUCKET, OR_HUB]
    """Folder made by `rynnvla convert export`; one in a bucket, or hf://USER/NAME[@REV], is copied first."""
    device: str = "cpu"
    """PyTorch device that the policy runs on, for example cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the transformer's weights."""
    compile: bool = False
    """Use torch.compile: a slower start, but faster inference."""
    frame: Frame = None
    """Shape of the cameras' frames, such as 480x640, for the warm-up: --compile compiles once per shape."""
    repeats: int = 3
    """Timed calls after the first one."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    return dispatch("rynnvla deploy", COMMANDS, argv)


def check(argv: list[str]) -> int:
    """`rynnvla deploy check`. Returns the exit status."""
    arguments = parse(Check, "rynnvla deploy check", argv)
    from rynnvla_jax.deploy import export_format
    from rynnvla_jax.deploy.check import check
    from rynnvla_jax.deploy.observation import frame_shape
    from rynnvla_jax.deploy.policy import DTYPES

    frame = frame_shape(arguments.frame) if arguments.frame else None
    folder = export_format.local(arguments.export)  # first: only what follows counts as loading
    report = check(folder, arguments.device, DTYPES[arguments.dtype], arguments.compile, arguments.repeats, frame)
    print(json.dumps(report, indent=2))
    return 0
