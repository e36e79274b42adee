"""Converts between a Flax NNX module and the nested dicts of the training loop, Orbax and the converter."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 weight sampled from N(0, std), with its logical axes."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * std, axes=axes)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 weight sampled evenly from [-bound, bound), with its logical axes."""
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound), axes=axes)


def constant(shape: tuple[int, ...], value: float, axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 weight filled with `value`, with its logical axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graph definition, nested dict of arrays); `nnx.merge` puts them together again."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def axes(model: nnx.Module) -> dict[str, Any]:
    """The logical axes of every parameter, as a nested dict of tuples."""
    _, state = nnx.split(model)
    flat = [(path, v.get_metadata().get("axes", (None,) * len(v.shape))) for path, v in nnx.to_flat_state(state)]
    return nnx.traversals.unflatten_mapping(dict(flat))


def flat(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of every leaf of a nested dict; all that is no dict is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*above, name))
        else:
            yield (*above, name), value


def joined(one: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """The nested dict with the leaves of both; where both have a leaf, that of `other`."""
    both = dict(one)
    for name, value in (other or {}).items():
        both[name] = joined(both.get(name, {}), value) if isinstance(value, dict) else value
    return both


def fingerprint(params: Any) -> str:
    """SHA-256 of all weights, in the order of their names."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()


def count(params: Any) -> int:
    """Number of weights."""
    return sum(int(x.size) for x in jax.tree.leaves(params))
