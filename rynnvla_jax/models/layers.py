"""Building blocks of the models: matrix products with weight gradients summed in float32, norms, dropout."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rynnvla_jax.distributed.mesh import constrain, gather, on_torus, scatter_sum, shard_map, shards
from rynnvla_jax.models.params import constant

Axes = tuple[str | None, str | None]  # logical axes of a matrix: of its inputs, together, and of its outputs
DOWN: Axes = ("feed_forward", "embed")  # of the MLP's last matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: Float[Array, "B S I"], weight: Float[Array, "I O"], axes: Axes, sums: DTypeLike) -> Float[Array, "B S O"]:
    """x @ weight, both in the compute dtype.

    The gradient of the weight is a float32 sum over tokens and devices and is rounded to the compute dtype after that.
    Source: published recipe, "fp32 gradient reduction". On a torus (`mesh.on_torus`) the weight is gathered for the
    product, and devices add their parts of its gradient in the dtype `sums`; elsewhere the compiler does both.
    """
    return _rows_matmul(x, gather(weight, *axes))


def _forward(x, weight, axes, sums):
    return matmul(x, weight, axes, sums), (x, weight)


def _backward(axes, sums, saved, g):
    x, weight = saved
    gradient = _summed(_partial_gradient(x, g, axes, sums), axes).astype(weight.dtype)
    return _rows_matmul(g, gather(weight, *axes).T), gradient


matmul.defvjp(_forward, _backward)


def _rows_matmul(x, weight):
    """As one matrix: XLA's CPU back end makes gradients of products with more axes several times slower.

    Not when the mesh cuts the sequence: a joined axis could not stay cut both ways.
    """
    if shards("sequence") > 1:
        return jnp.matmul(x, weight)
    return jnp.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


def _partial_gradient(x, g, axes, sums):
    """A weight's gradient from the tokens of each device: [devices, I, O], or [devices, O, I] so that "embed" comes
    first; without devices where the compiler does what comes then: elsewhere than on a torus."""
    if axes[1] == "embed":
        x, g, axes = g, x, axes[::-1]
    if axes[0] != "embed" or not on_torus():
        return _sum_over_tokens(x, g, jnp.float32)
    tokens = ("batch", "sequence")
    inputs = (*tokens, None), (*tokens, axes[1])
    return shard_map(lambda x, g: _sum_over_tokens(x, g, sums)[None], inputs, ("part", None, axes[1]))(x, g)


def _summed(partial, axes):
    """The gradient [I, O], of all devices."""
    if partial.ndim == 3:
        other = axes[0] if axes[1] == "embed" else axes[1]
        # The first axis is scattered, because a TPU scatters no axis of fewer than 128 numbers along its lanes.
        partial = shard_map(lambda x: scatter_sum(x[0], 0), (("part", None, other),), ("embed", other))(partial)
        # The compiler for SparseCores fails at sums whose result is rounded in the same operation (libtpu 0.0.42).
        partial = jax.lax.optimization_barrier(partial)
    return partial.T if axes[1] == "embed" else partial


def _sum_over_tokens(x, g, dtype):
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(dtype)


def project(
    x: Float[Array, "B S *I"],
    weight: Float[Array, "..."],
    inputs: int = 1,
    axes: Axes = (None, None),
    sums: DTypeLike = jnp.float32,
) -> Float[Array, "B S *O"]:
    """Contracts the last `inputs` axes of x with the first of `weight`; in x's dtype.

    Args:
      axes: logical axes of the weight's inputs, together, and of its outputs.
      sums: dtype in which the devices of a torus add their parts of the weight's gradient.
    """
    width = math.prod(weight.shape[:inputs])
    y = matmul(x.reshape(*x.shape[:2], width), weight.reshape(width, -1).astype(x.dtype), axes, sums)
    return y.reshape(*x.shape[:2], *weight.shape[inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def swiglu(
    gate: Float[Array, "B S F"], up: Float[Array, "B S F"], weight: Float[Array, "F D"], sums: DTypeLike
) -> Float[Array, "B S D"]:
    """(silu(gate) * up) @ weight, in the inputs' dtype (SwiGLU); `sums` as in `project`.

    The gated values are not kept for the backward pass.
    """
    return matmul(gated(gate, up), weight, DOWN, sums)


def gated(gate: Float[Array, "B S F"], up: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
    """silu(gate) * up."""
    return constrain(jax.nn.silu(gate) * up, "batch", "sequence", "feed_forward")


def _swiglu_forward(gate, up, weight, sums):
    return swiglu(gate, up, weight, sums), (gate, up, weight)


def _swiglu_backward(sums, saved, g):
    gate, up, weight = saved
    hidden, pull = jax.vjp(gated, gate, up)
    hidden_gradient, gradient = _backward(DOWN, sums, (hidden, weight), g)
    return *pull(constrain(hidden_gradient, "batch", "sequence", "feed_forward")), gradient


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def together(x, weights):
    """Both as they are. In the backward pass, the gradient of x goes on when those of the weights are sums of all
    devices.

    Without it a TPU's scheduler leaves the sums of a layer to its end, where no product is left that could hide them.
    Weights that do not train are left out: the barrier would keep their gradients, which nothing needs.
    """
    return x, weights


def _together_forward(x, weights):
    trained = tuple([()] if weight.perturbed else [] for weight in weights)  # static: a tree without arrays
    return (x.value, tuple(weight.value for weight in weights)), trained


def _together_backward(trained, g):
    x, weights = g
    x, kept = jax.lax.optimization_barrier((x, [w for w, trains in zip(weights, trained, strict=True) if trains]))
    rest = iter(kept)
    return x, tuple(next(rest) if trains else None for trains in trained)


together.defvjp(_together_forward, _together_backward, symbolic_zeros=True)


class Linear(nnx.Module):
    """x @ kernel [in, out] + bias [out], in x's dtype; the bias starts at zero."""

    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel
        self.bias = constant(kernel.shape[1:], 0.0, (None,))

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


def layer_norm(x: Float[Array, "*N D"], scale: Array, bias: Array, eps: float = 1e-5) -> Float[Array, "*N D"]:
    """LayerNorm over the last axis, in float32; scale and bias broadcast against x. In x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    return (normed * scale + bias).astype(x.dtype)


def rms_norm(x, scale, eps: float):
    """RMSNorm over the last axis: normalised in float32, scaled in x's dtype (as Llama does)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale[...].astype(x.dtype)


def dropout(x, rate: float, key: jax.Array | None):
    """Inverted dropout; identity without a key. Drawn element by element, so that a sharded array stays sharded."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an element instead of bernoulli's 32; they give the rate to 1e-5.
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def fast_dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`dropout` for arrays that are not sharded along their last axis, with other random bits; faster on a CPU."""
    if key is None or rate == 0:
        return x
    # 16 random bits decide about an element, to 1 / 65536: drawn two from a word, at a third of bernoulli's cost.
    threshold = round((1 - rate) * 65536)
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)))
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(halves < threshold, x * (65536 / threshold), 0).astype(x.dtype)
