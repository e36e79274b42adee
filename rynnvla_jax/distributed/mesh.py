"""Mesh, logical-axis rules and activation constraints: the only module that writes a PartitionSpec.

Mesh axes, slowest network first: `replica` (one per TPU slice), `data`, `fsdp_x`, `fsdp_y`, `fsdp_z`, `sequence`,
`tensor`; see `MeshConfig`. Its `fsdp` has an axis here for each axis of the TPU's torus: the compiler scatters a sum
along one of them, but sends the whole sum when it goes along several at once. Elsewhere all of `fsdp` is `fsdp_x`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rynnvla_jax.config import ConfigError, MeshConfig

FSDP = ("fsdp_x", "fsdp_y", "fsdp_z")
MESH_AXES = ("replica", "data", *FSDP, "sequence", "tensor")
WEIGHT_AXES = (*FSDP, "sequence", "tensor")  # these cut weights

# Logical axis -> mesh axis (or axes). An axis that is not named here is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "data", *FSDP),
    "sequence": "sequence",
    "embed": (*FSDP, "sequence"),
    "part": ("replica", "data", *FSDP, "sequence"),  # parts of a sum, one for each group of tokens
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "adapter": (*FSDP, "sequence", "tensor"),  # the long axis of a low-rank adapter
}
# Axes that may stay whole when the mesh does not divide them: GQA has fewer KV heads than tensor shards.
MAY_REPLICATE = ("kv_heads",)
SMALL_SLICE = 64  # devices; in smaller ones a TPU's compiler makes rings of gathers and sums by itself
LARGE = 2**20  # weights; a parameter of at least so many may not be whole on every device of a mesh that cuts weights


def make_mesh(config: MeshConfig, devices: list[Any] | None = None, torus: tuple[int, ...] | None = None) -> Mesh:
    """A mesh over all devices, ordered by the network: neighbours in `tensor` are neighbours in the pod, and `replica`
    runs over TPU slices.

    Args:
      torus: devices along each axis of a slice's network; by default what the devices say.

    Raises:
      ConfigError: the product of the axes is not the number of devices, or slices do not fit `replica`.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    named = {**vars(config), "replica": config.replica or slices}
    if list(named.values()).count(-1) == 1:
        known = math.prod(s for s in named.values() if s != -1)
        named = {axis: max(len(devices) // known, 1) if s == -1 else s for axis, s in named.items()}
    if math.prod(named.values()) != len(devices):
        shape = " x ".join(f"{a}={s}" for a, s in named.items())
        raise ConfigError(
            f"config.mesh needs {shape}, but there are {len(devices)} devices; at most one axis may be -1"
        )
    if named["replica"] % slices:
        raise ConfigError(f"config.mesh.replica {named['replica']} is not a multiple of the {slices} slices")
    others = [named["replica"] // slices, *(named[axis] for axis in ("data", "sequence", "tensor"))]
    fsdp = _along(torus or _torus(devices), named["fsdp"], others)
    sizes = [named["replica"], named["data"], *fsdp, named["sequence"], named["tensor"]]
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        across = (slices, *[1] * (len(sizes) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: between our constraints the compiler chooses the shardings.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _torus(devices: list[Any]) -> tuple[int, ...]:
    """Devices along each axis of a TPU slice's network; of other devices, of small slices, and where places are empty,
    all in one."""
    places = [(*d.coords, d.core_on_chip) for d in devices if hasattr(d, "coords")]
    sizes = tuple(len(set(along)) for along in zip(*places, strict=True))
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    whole = math.prod(sizes) * slices == len(devices) == len(places)
    return sizes if whole and math.prod(sizes) >= SMALL_SLICE else (len(devices),)


def _along(torus: tuple[int, ...], fsdp: int, others: list[int]) -> list[int]:
    """The factors of `fsdp` in the torus's axes, after the other mesh axes have taken theirs from the last ones."""
    left = list(torus)
    for size in others:
        for axis in reversed(range(len(left))):
            taken = math.gcd(size, left[axis])
            left[axis], size = left[axis] // taken, size // taken
    left = [size for size in left if size > 1]
    if math.prod(left) != fsdp or len(left) > len(FSDP):
        left = [fsdp]
    return left + [1] * (len(FSDP) - len(left))


def sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Devices along each axis, as `MeshConfig` names them."""
    fsdp = math.prod(mesh.shape[axis] for axis in FSDP)
    return {axis: fsdp if axis == "fsdp" else mesh.shape[axis] for axis in MeshConfig.__dataclass_fields__}


def axes_line(mesh: Mesh | AbstractMesh) -> str:
    """Its axes of more than one device, for messages."""
    return " ".join(f"{axis}={size}" for axis, size in sizes(mesh).items() if size > 1) or "of one device"


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec."""
    return PartitionSpec(*(RULES.get(a) if a else None for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shards an array, and its gradient, by logical axes; a no-op outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(tuple(map(unless_whole, axes, x.shape))))


def unless_whole(axis: str | None, size: int) -> str | None:
    """A logical axis of `size`; None where it stays whole on every device (`MAY_REPLICATE`)."""
    return None if axis in MAY_REPLICATE and size % shards(axis) else axis


def shards(logical: str) -> int:
    """The number of shards of a logical axis on the current mesh; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _size(mesh, RULES.get(logical))


def on_torus() -> bool:
    """Whether the current mesh lays fsdp along several axes of a torus."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[FSDP[1]] > 1


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


def gather(weight: jax.Array, *axes: str | None) -> jax.Array:
    """A weight whole along "embed", on every device; what "tensor" cuts stays cut. Elsewhere than on a torus it is
    returned as it is, and the compiler gathers it."""
    if "embed" not in axes or not on_torus():
        return weight
    return constrain(weight, *(None if axis == "embed" else axis for axis in axes))


def scatter_sum(x: jax.Array, dimension: int, beside: jax.Array | None = None) -> jax.Array:
    """In a `shard_map`: the sum over all devices that share a batch, cut along `dimension` as "embed" is.

    The axes of a torus go one after the other: over several at once, a TPU's compiler would send whole sums. What cuts
    no weight comes last, when there is least left to send: it may be the network between slices.

    Args:
      beside: what may be computed while the first axis sends, which has the most to send. The other axes wait for it:
        the compiler's scheduler works from the end, and would give it to the last one.
    """
    cut = [axis for axis in RULES["embed"] if jax.lax.axis_size(axis) > 1]
    for turn, axis in enumerate(cut):
        if turn == 1 and beside is not None:
            x, _ = jax.lax.optimization_barrier((x, beside))
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in RULES["batch"] if axis not in RULES["embed"]))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def one_per_device(mesh: Mesh) -> NamedSharding:
    """The sharding of a vector with one element per device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same shards in the memory of the device's host."""
    return sharding.with_memory_kind("pinned_host")


def without_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """The sharding of an array that lacks one axis of another, and is cut like it along all others."""
    names = [name for i, name in enumerate(sharding.spec) if i != axis]
    return NamedSharding(sharding.mesh, PartitionSpec(*names))


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
    names = [axes] if isinstance(axes, str) else ["fsdp" if axis in FSDP else axis for axis in axes]
    return "*".join(dict.fromkeys(names))


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
