"""The chips of the pods that can be compiled for, and how libtpu is told of a pod that is not here."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.train.lowering import GIB


@dataclass(frozen=True)
class Chip:
    """Sources: `hbm` is what libtpu 0.0.42 names when a program does not fit. `hbm_rate` and `dcn` are Google's
    published rates (cloud.google.com/tpu/docs; v4's of the network between slices is not published, v5e's stands for
    it). `clock` follows from the published peak and the size of the matrix units. `link` is what libtpu's scheduler
    reckons with (53.3 bytes per cycle on v5p and v6e, 31.1 on v5e, 42.7 on v4), 90 to 93 % of the published rates.
    `products` is FLOPs / (`estimated_cycles` / `clock`) of a product of bf16[8192,8192] by itself, over the peak.
    """

    topology: str  # the compiler's name of the generation
    peak: str  # its key in `flops.PEAK_FLOPS`
    hbm: float  # bytes a program may use
    hbm_rate: float  # bytes/s
    link: float  # bytes/s in one direction of one link between chips
    dcn: float  # bytes/s of a chip to other slices
    clock: float  # Hz
    products: float  # share of the peak that the compiler expects of a large product


CHIPS = {
    "v4": Chip("v4", "TPU v4", 31.75 * GIB, 1200e9, 44.8e9, 3.125e9, 1.05e9, 0.93),
    "v5e": Chip("v5e", "TPU v5e", 15.75 * GIB, 819e9, 46.65e9, 3.125e9, 1.5e9, 0.88),
    "v5p": Chip("v5", "TPU v5p", 95.74 * GIB, 2765e9, 93.35e9, 6.25e9, 1.75e9, 0.9),
    "v6e": Chip("v6e", "TPU v6", 31.25 * GIB, 1640e9, 93.35e9, 12.5e9, 1.75e9, 0.7),
}
GPUS = {"a100": 80 * GIB, "h100": 80 * GIB, "h200": 141 * GIB}  # memory as sold; lowered, never compiled


def kind(topology: str) -> str:
    """v5e of v5e:4x4."""
    return topology.partition(":")[0]


def pod(topology: str, slices: int = 1) -> list[Any]:
    """Devices of a described pod, for example v5e:16x16, v5p:4x4x4 or the one chip of v6e:1x1; of all slices.

    Raises:
      ConfigError: libtpu is missing, it does not know the topology, or `slices` is not valid.
    """
    if slices < 1:
        raise ConfigError(f"--slices is {slices}; it must be at least 1")
    name, _, shape = topology.partition(":")
    if name in GPUS and shape.isdigit():
        if slices != 1:
            raise ConfigError(f"--slices is only for TPU pods; topology {topology!r} already gives the number of GPUs")
        if len(jax.devices()) < int(shape):
            raise ConfigError(
                f"topology {topology!r} needs {shape} virtual devices: --xla_force_host_platform_device_count"
            )
        return jax.devices()[: int(shape)]
    sides = shape.split("x")
    if name not in CHIPS or not all(side.isdigit() for side in sides) or len(sides) not in (2, 3):
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"topology {topology!r} is not KIND:AxB or KIND:AxBxC with KIND one of {known}, nor GPU:COUNT with one of "
            f"{', '.join(GPUS)}"
        )
    options: dict[str, Any] = {"wrap": wrap(name, [int(side) for side in sides])}
    if name == "v4":  # one device for both cores, as on Cloud TPU; the others' default
        options["chip_config_name"] = "megacore"
    if slices > 1:
        options["num_slices"] = slices
    if all(int(side) == 1 for side in sides):  # by default a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{CHIPS[name].topology}:{shape}", **options)
    except Exception as error:  # libtpu's errors have no common type
        missing = importlib.util.find_spec("libtpu") is None
        remedy = "pip install 'rynnvla_jax[tpu]'" if missing else "give the sides of a slice that exists, like v5e:4x4"
        raise ConfigError(f"topology {topology!r}: {shorten(error)}; {remedy}") from error
    return list(found.devices)


def wrap(name: str, sides: list[int]) -> tuple[bool, bool, bool]:
    """Along which axes the last chip of a slice is linked to the first. libtpu describes none unless it is told.

    v4 and v5p are made of cubes of 4 x 4 x 4 whose faces are switched together; of v5e and v6e, only a whole side of
    16 is a ring. Source: MaxText's `accelerator_to_spec_map.py`.
    """
    if name in ("v4", "v5p"):
        cubes = all(side % 4 == 0 for side in sides)
        return cubes, cubes, cubes
    x, y, *_ = [side == 16 for side in sides]
    return x, y, False
