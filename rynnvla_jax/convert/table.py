"""Conversion tables: one `Entry` for each public tensor, in both directions.

A model's table (`vla.py`, `action_vae.py`, `vqgan.py` in this folder) is a list of entries.
Layers that we stack on a leading axis are entries with a `layer` index, so a converter can
stream one foreign tensor at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rynnvla_jax.convert import ConversionError
from rynnvla_jax.errors import listing


def axis_size(shapes: Mapping[str, tuple[int, ...]], key: str, axis: int, rank: int = 2) -> int:
    """One axis of a foreign tensor. Raises ConversionError when it is missing or has not `rank` axes."""
    if key not in shapes:
        raise ConversionError(f"{key} is missing")
    if len(shapes[key]) != rank or not min(shapes[key]):
        raise ConversionError(f"{key} has shape {list(shapes[key])}, expected {rank} axes that are not empty")
    return shapes[key][axis]


class Transform(NamedTuple):
    """`to_ours(foreign)` and `to_foreign(ours)`: numpy arrays, inverse of each other."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_foreign: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(np.transpose, np.transpose)  # torch [out, in] <-> [in, out]
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def split_out(heads: int) -> Transform:
    """Torch [H*E, D] <-> [D, H, E]."""
    return Transform(
        lambda x: x.T.reshape(x.shape[1], heads, -1),
        lambda x: x.reshape(x.shape[0], -1).T,
    )


def split_in(heads: int) -> Transform:
    """Torch [D, H*E] <-> [H, E, D]."""
    return Transform(
        lambda x: x.T.reshape(heads, -1, x.shape[0]),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    )


@dataclass(frozen=True)
class Entry:
    """One public tensor and its counterpart in our parameter tree."""

    foreign: str  # key in the foreign state dict
    ours: str  # dotted path in our parameter tree
    transform: Transform = SAME
    layer: int | None = None  # index on our leading "layers" axis; None: the whole parameter
    rows: int | None = None  # leading rows of ours that the foreign tensor fills; the rest are padding (zeros)


def to_params(
    entries: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    template: Mapping[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Foreign tensors -> our nested parameter tree, layered entries stacked. Holds everything in memory.

    Args:
      tensors: foreign key -> array, complete.
      template: nested dict of anything with a `.shape` (arrays, `jax.ShapeDtypeStruct`): the tree to fill. With it
        every shape is checked, no path may be missing, and entries with `rows` are padded; they need it.
      ignored: prefixes of keys that are not converted.
    Raises:
      ValueError: missing, unexpected or wrongly shaped tensors: their number and the first ten.
    """
    entries = list(entries)
    known = {e.foreign for e in entries}
    faults = [f"{e.foreign}: missing" for e in entries if e.foreign not in tensors]
    faults += [f"{k}: unexpected" for k in tensors if k not in known and not k.startswith(ignored)]
    wanted = None if template is None else {path: tuple(leaf.shape) for path, leaf in leaves(template)}
    if wanted is not None:
        covered = {e.ours for e in entries}
        faults += [f"{path}: no entry fills it" for path in wanted if path not in covered]
        faults += [f"{e.foreign}: {e.ours} is not in the template" for e in entries if e.ours not in wanted]
    found: dict[str, dict[Any, np.ndarray]] = {}  # by layer; None: not of a layer
    for entry in entries:
        if entry.foreign not in tensors or (wanted is not None and entry.ours not in wanted):
            continue
        foreign = np.asarray(tensors[entry.foreign])
        if wanted is None and entry.rows is not None:
            faults.append(f"{entry.foreign}: padding {entry.rows} rows needs a template")
            continue
        if wanted is not None:
            ours_shape = wanted[entry.ours] if entry.layer is None else wanted[entry.ours][1:]
            padded = entry.transform.to_foreign(np.broadcast_to(np.float32(0), ours_shape)).shape
            expected = padded if entry.rows is None else (entry.rows, *padded[1:])
            if foreign.shape != expected:
                faults.append(f"{entry.foreign}: shape {foreign.shape}, expected {expected}")
                continue
            if expected != padded:
                foreign = np.pad(foreign, [(0, padded[0] - expected[0])] + [(0, 0)] * (foreign.ndim - 1))
        found.setdefault(entry.ours, {})[entry.layer] = np.ascontiguousarray(entry.transform.to_ours(foreign))
    for path, layers in found.items():
        shapes = {v.shape for v in layers.values()}
        if len(shapes) > 1:
            faults.append(f"{path}: layers differ in shape {sorted(shapes)}")
        elif None not in layers and sorted(layers) != list(range(len(layers))):
            faults.append(f"{path}: layers {sorted(layers)} are not 0..{len(layers) - 1}")
        elif wanted is not None and None not in layers and len(layers) != wanted[path][0]:
            faults.append(f"{path}: {len(layers)} layers, expected {wanted[path][0]}")
    if faults:
        raise ValueError(f"{len(faults)} tensors do not fit the model: {listing(faults, 10, '; ')}")
    tree: dict[str, Any] = {}
    for path, layers in found.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = layers[None] if None in layers else np.stack([layers[i] for i in range(len(layers))])
    return tree


def to_foreign(entries: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: our nested tree -> foreign key -> array; padding rows are dropped.

    Raises:
      ValueError: a parameter that no entry reads, or an entry whose parameter is missing.
    """
    entries = list(entries)
    ours = dict(leaves(params))
    faults = [f"{path}: no entry reads it" for path in ours if path not in {e.ours for e in entries}]
    faults += [f"{e.ours}: missing" for e in entries if e.ours not in ours]
    if faults:
        raise ValueError(f"{len(faults)} parameters do not fit the model: {listing(faults, 10, '; ')}")
    out = {}
    for e in entries:
        value = np.asarray(ours[e.ours] if e.layer is None else ours[e.ours][e.layer])
        out[e.foreign] = np.ascontiguousarray(e.transform.to_foreign(value)[: e.rows] if value.ndim else value)
    return out


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields (dotted path, leaf) of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
