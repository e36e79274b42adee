"""Building blocks of the models: matrix products with weight gradients summed in float32, norms, dropout."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rynnvla_jax.distributed.mesh import constrain, gather, scatter_sum, shard_map, shards
from rynnvla_jax.models.params import constant

DOWN = ("feed_forward", "embed")  # logical axes of the MLP's last matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "B S I"], weight: Float[Array, "I O"], axes: tuple[str | None, str | None]
) -> Float[Array, "B S O"]:
    """x @ weight, both in the compute dtype; `axes` are the logical axes of the weight.

    Where the mesh cuts the weight along "embed", it is gathered for the product, and its gradient is scattered. The
    gradient is a float32 sum over tokens and devices, and is rounded to the compute dtype after that. Source: published
    recipe, "fp32 gradient reduction".
    """
    return _rows_matmul(x, gather(weight, *axes))


def _rows_matmul(x, weight):
    """As one matrix: XLA's CPU back end makes gradients of products with more axes several times slower.

    Not when the mesh cuts the sequence: a joined axis could not stay cut both ways.
    """
    if shards("sequence") > 1:
        return jnp.matmul(x, weight)
    return jnp.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


def _forward(x, weight, axes):
    return matmul(x, weight, axes), (x, weight)


def _backward(axes, saved, g):
    x, weight = saved
    if "embed" in axes and shards("embed") > 1:
        tokens = ("batch", "sequence")
        cut = [None if axis == "embed" else axis for axis in axes]
        local = functools.partial(_scattered_gradient, dimension=axes.index("embed"))
        gradient = shard_map(local, ((*tokens, cut[0]), (*tokens, cut[1])), axes)(x, g)
    else:
        gradient = _sum_over_tokens(x, g)
    return _rows_matmul(g, gather(weight, *axes).T), gradient.astype(weight.dtype)


def _sum_over_tokens(x, g):
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _scattered_gradient(x, g, dimension):
    return scatter_sum(_sum_over_tokens(x, g), dimension)


matmul.defvjp(_forward, _backward)


def project(
    x: Float[Array, "B S *I"],
    weight: Float[Array, "..."],
    inputs: int = 1,
    axes: tuple[str | None, str | None] = (None, None),
) -> Float[Array, "B S *O"]:
    """Contracts the last `inputs` axes of x with the first of `weight`; in x's dtype.

    Args:
      axes: the logical axes of the weight's inputs, together, and of its outputs.
    """
    width = math.prod(weight.shape[:inputs])
    y = matmul(x.reshape(*x.shape[:2], width), weight.reshape(width, -1).astype(x.dtype), axes)
    return y.reshape(*x.shape[:2], *weight.shape[inputs:])


@jax.custom_vjp
def swiglu(
    gate: Float[Array, "B S F"], up: Float[Array, "B S F"], weight: Float[Array, "F D"]
) -> Float[Array, "B S D"]:
    """(silu(gate) * up) @ weight, in the inputs' dtype (SwiGLU).

    The backward pass finishes the product that needs the hidden values before it computes their gradient, so that fewer
    arrays of the MLP's width exist at a time (7B on v6e 8x8, batch 4: 9.10 GiB became 8.89).
    """
    return project(_gated(gate, up), weight, axes=DOWN)


def _gated(gate, up):
    return constrain(jax.nn.silu(gate) * up, "batch", "sequence", "feed_forward")


def _swiglu_forward(gate, up, weight):
    return swiglu(gate, up, weight), (gate, up, weight)


def _swiglu_backward(saved, g):
    gate, up, weight = saved
    _, pull = jax.vjp(lambda w: project(_gated(gate, up), w, axes=DOWN), weight)
    g, weight_gradient = jax.lax.optimization_barrier((g, *pull(g)))
    hidden_gradient = constrain(project(g, weight.T, axes=DOWN[::-1]), "batch", "sequence", "feed_forward")
    return *jax.vjp(_gated, gate, up)[1](hidden_gradient), weight_gradient


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


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
