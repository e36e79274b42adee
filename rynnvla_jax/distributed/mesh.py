"""Mesh, logical-axis rules and activation constraints: the only module that writes a PartitionSpec.

Mesh axes, slowest network first: `replica` (one per TPU slice), `data`, `fsdp`, `sequence`, `tensor`; see `MeshConfig`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rynnvla_jax.config import ConfigError, MeshConfig

MESH_AXES = ("replica", "data", "fsdp", "sequence", "tensor")
WEIGHT_AXES = ("fsdp", "sequence", "tensor")  # these cut weights

# Logical axis -> mesh axis (or axes). An axis that is not named here is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "sequence": "sequence",
    "embed": ("fsdp", "sequence"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
}
# Axes that may stay whole when the mesh does not divide them: GQA has fewer KV heads than tensor shards.
MAY_REPLICATE = ("kv_heads",)
LARGE = 2**20  # weights; a parameter of at least so many may not be whole on every device of a mesh that cuts weights


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices, ordered by the network: neighbours in `tensor` are neighbours in the pod, and `replica`
    runs over TPU slices.

    Raises:
      ConfigError: the product of the axes is not the number of devices, or slices do not fit `replica`.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    sizes[0] = sizes[0] or slices
    if sizes.count(-1) == 1:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh needs {shape}, but there are {len(devices)} devices; at most one axis may be -1"
        )
    if sizes[0] % slices:
        raise ConfigError(f"config.mesh.replica {sizes[0]} is not a multiple of the {slices} slices")
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        across = (slices, *[1] * (len(sizes) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: between our constraints the compiler chooses the shardings.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec."""
    return PartitionSpec(*(RULES.get(a) if a else None for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an array, and its gradient, by logical axes; a no-op outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    whole = [name in MAY_REPLICATE and size % shards(name) for name, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(tuple(None if w else a for a, w in zip(axes, whole, strict=True))))


def shards(logical: str) -> int:
    """The number of shards of a logical axis on the current mesh; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _size(mesh, RULES.get(logical))


def platform() -> str:
    """Platform of the devices that the current mesh names: cpu, tpu or gpu. Under ahead-of-time compilation these are
    not the devices of this process."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device else jax.default_backend()


def shard_map(f: Callable, inputs: tuple[Any, ...], outputs: Any) -> Callable:
    """`f` on every device's own shards (`jax.shard_map` over all mesh axes; one device outside a mesh).

    Args:
      inputs: logical axes of every argument, or a ready tree of PartitionSpecs.
      outputs: logical axes of the results, in a tuple where there are several.
    """
    mesh: Mesh | AbstractMesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = Mesh(np.asarray(jax.devices()[:1]).reshape([1] * len(MESH_AXES)), MESH_AXES)

    def specs(axes):
        if type(axes) is not tuple:
            return axes
        return tuple(map(specs, axes)) if any(type(a) is tuple for a in axes) else spec(axes)

    in_specs = tuple(map(specs, inputs))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=specs(outputs), check_vma=False)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def one_per_device(mesh: Mesh) -> NamedSharding:
    """The sharding of a vector with one element per device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same shards in the memory of the device's host."""
    return sharding.with_memory_kind("pinned_host")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch along its leading axis."""
    return NamedSharding(mesh, spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of a batch."""
    return _size(mesh, RULES["batch"])


def _size(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[a] for a in axes)


def param_shardings(axes: Any, shapes: Any, mesh: Any) -> Any:
    """A tree of NamedSharding for a tree of logical axes and one of shapes (arrays or ShapeDtypeStruct).

    Raises:
      ConfigError: a dimension is not a multiple of its mesh axis, or a large parameter would be replicated on
        every device; names the parameter.
    """
    cut = math.prod(mesh.shape[a] for a in WEIGHT_AXES)

    def one(path, axes_, shape):
        names = list(axes_)
        for i, name in enumerate(names):
            size = _size(mesh, RULES.get(name))
            if shape.shape[i] % size:
                if name in MAY_REPLICATE:
                    names[i] = None
                    continue
                raise ConfigError(
                    f"{path_string(path)} {tuple(shape.shape)}: axis '{name}' of {shape.shape[i]} is not a multiple of "
                    f"mesh axis {_named(RULES[name])}={size}; choose another config.mesh or model size"
                )
        whole = all(_size(mesh, RULES.get(n)) == 1 for n in names)
        if whole and cut > 1 and math.prod(shape.shape) >= LARGE and any(n in RULES for n in axes_):
            raise ConfigError(
                f"{path_string(path)} {tuple(shape.shape)} would be replicated on all devices although the mesh shards "
                f"weights {cut} ways; use mesh.fsdp, or another mesh.tensor"
            )
        return NamedSharding(mesh, spec(tuple(names)))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _named(axes: str | tuple[str, ...]) -> str:
    return axes if isinstance(axes, str) else "*".join(axes)


def check_placed(params: Any, abstract: Any) -> None:
    """Raises ConfigError when an array does not have its expected sharding (replicated instead of sharded)."""

    def one(path, array, wanted):
        if not array.sharding.is_equivalent_to(wanted.sharding, array.ndim):
            raise ConfigError(f"{path_string(path)} has sharding {array.sharding}, expected {wanted.sharding.spec}")

    jax.tree_util.tree_map_with_path(one, params, abstract)


def describe(params: Any, smallest: int = 0) -> list[str]:
    """The sharding of each parameter, one line each: path, shape, mesh axes and MiB per device.

    Args:
      params: arrays or ShapeDtypeStructs with shardings.
      smallest: minimum number of weights of a listed parameter.
    """
    lines = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if math.prod(x.shape) < smallest:
            continue
        names = [_named(a) if a else "-" for a in (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))]
        local = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        shape = ",".join(map(str, x.shape))
        lines.append(f"{path_string(path)} [{shape}] ({', '.join(names)}) {local / 2**20:.3f} MiB")
    return lines


def path_string(path: tuple[Any, ...]) -> str:
    """A key path as dotted names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def bytes_per_device(tree: Any) -> int:
    """Bytes of `tree` (arrays or ShapeDtypeStructs with shardings) that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
