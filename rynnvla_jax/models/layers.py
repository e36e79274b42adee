"""Matrix products in the compute dtype whose weight gradients are summed in float32."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rynnvla_jax.distributed.mesh import constrain, shards


@jax.custom_vjp
def matmul(x: Float[Array, "*N I"], weight: Float[Array, "I O"]) -> Float[Array, "*N O"]:
    """x @ weight, both in the compute dtype.

    The weight's gradient is a float32 sum over tokens and, as the program is written, over devices, and is rounded to
    the compute dtype after that. Source: published recipe, "fp32 gradient reduction". On 64 chips and more the TPU
    compiler rounds each device's part first (docs/performance.md).
    """
    return jnp.matmul(x, weight)


def _forward(x, weight):
    return matmul(x, weight), (x, weight)


def _backward(saved, g):
    x, weight = saved
    rows = tuple(range(x.ndim - 1))
    gradient = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return jnp.matmul(g, weight.T), gradient.astype(weight.dtype)


matmul.defvjp(_forward, _backward)


def project(x: Float[Array, "B S *I"], weight: Float[Array, "..."], inputs: int = 1) -> Float[Array, "B S *O"]:
    """Contracts the last `inputs` axes of x with the first of `weight`; in x's dtype."""
    width = math.prod(weight.shape[:inputs])
    y = matmul(rows(x.reshape(*x.shape[:2], width)), weight.reshape(width, -1).astype(x.dtype))
    return y.reshape(*x.shape[:2], *weight.shape[inputs:])


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "B S F"], up: Float[Array, "B S F"], weight: Float[Array, "F D"]
) -> Float[Array, "B S D"]:
    """(silu(gate) * up) @ weight, in the inputs' dtype (SwiGLU).

    The backward pass is done with the product that needs the hidden values before it makes their gradient, so fewer
    arrays of the feed-forward's width live at a time (7B on v6e 8x8, batch 4: 9.10 GiB became 8.89).
    """
    return project(_gated(gate, up), weight)


def _gated(gate, up):
    return constrain(jax.nn.silu(gate) * up, "batch", "sequence", "feed_forward")


def _swiglu_forward(gate, up, weight):
    return swiglu(gate, up, weight), (gate, up, weight)


def _swiglu_backward(saved, g):
    gate, up, weight = saved
    _, pull = jax.vjp(lambda w: project(_gated(gate, up), w), weight)
    g, weight_gradient = jax.lax.optimization_barrier((g, *pull(g)))
    hidden_gradient = constrain(project(g, weight.T), "batch", "sequence", "feed_forward")
    return *jax.vjp(_gated, gate, up)[1](hidden_gradient), weight_gradient


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def rows(x: Float[Array, "*N I"]) -> Float[Array, "*M I"]:
    """x as one matrix: XLA's CPU back end makes gradients of products with more axes several times slower.

    Not when the mesh cuts the sequence: a joined axis could not stay cut both ways.
    """
    return x if shards("sequence") > 1 else x.reshape(-1, x.shape[-1])
