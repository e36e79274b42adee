"""Matrix products with float32 weights: computed in the compute dtype, weight gradients in float32."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "N I"], weight: Float[Array, "I O"], dtype: jnp.dtype) -> Float[Array, "N O"]:
    """x @ weight, the float32 weight cast to x's dtype, the result in `dtype`.

    The weight's gradient leaves its product in float32, so its sum over devices (and over the chunks of the token
    loss) is a float32 sum under bf16 compute too. Source: published recipe, "fp32 gradient reduction".
    """
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=dtype)


def _forward(x, weight, dtype):
    return matmul(x, weight, dtype), (x, weight)


def _backward(dtype, saved, g):
    x, weight = saved
    g = g.astype(x.dtype)
    return (
        jnp.matmul(g, weight.astype(x.dtype).T),
        jnp.matmul(x.T, g, preferred_element_type=weight.dtype),
    )


matmul.defvjp(_forward, _backward)


def project(x: Float[Array, "B S *I"], weight: Float[Array, "..."], inputs: int = 1) -> Float[Array, "B S *O"]:
    """Contracts the last `inputs` axes of x with the first of the float32 `weight`; in x's dtype.

    Written as one product of two matrices: XLA's CPU back end makes the gradient of the same einsum several times
    slower.
    """
    width = math.prod(weight.shape[:inputs])
    y = matmul(x.reshape(-1, width), weight.reshape(width, -1), x.dtype)
    return y.reshape(*x.shape[:2], *weight.shape[inputs:])
