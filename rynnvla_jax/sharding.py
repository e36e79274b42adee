"""Mesh, logical-axis rules and activation constraints: the only place where a PartitionSpec is written.

Mesh axes: `data` replicates weights, `fsdp` shards weights and batch, `tensor` shards heads,
feed-forward and vocabulary.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rynnvla_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes). An axis that is not named here is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
}
# Axes that may stay whole when the mesh does not divide them: GQA has fewer KV heads than tensor shards.
MAY_REPLICATE = ("kv_heads",)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A `data x fsdp x tensor` mesh over all devices.

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        shape = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh asks for {shape} but there are {len(devices)} devices; at most one axis may be -1"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec."""
    return PartitionSpec(*(RULES.get(a) if a else None for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an activation by logical axes; a no-op outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of logical axes and one of shapes (arrays or ShapeDtypeStruct).

    Raises:
      ConfigError: a dimension is not a multiple of its mesh axis; names the parameter.
    """

    def one(path, axes_, shape):
        names = list(axes_)
        for i, name in enumerate(names):
            size = mesh.shape[RULES[name]] if name in RULES else 1
            if shape.shape[i] % size:
                if name in MAY_REPLICATE:
                    names[i] = None
                    continue
                raise ConfigError(
                    f"{path_string(path)} {tuple(shape.shape)}: axis '{name}' of {shape.shape[i]} is not a multiple of "
                    f"mesh axis {RULES[name]}={size}; choose another config.mesh or model size"
                )
        return NamedSharding(mesh, spec(tuple(names)))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def path_string(path: tuple[Any, ...]) -> str:
    """A key path as dotted names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def bytes_per_device(tree: Any) -> int:
    """Bytes of `tree` that one (the first addressable) device holds."""
    return sum(int(x.addressable_shards[0].data.nbytes) for x in jax.tree.leaves(tree))
