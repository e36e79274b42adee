"""Low-rank adapters beside the matrices of the decoder's layers, which stay as they are.

Source: LoRA, arXiv 2106.09685: y = x W + (alpha / rank) x A B, A random as in PEFT, B zero, so that the first step is
the base's. Matrices with several axes of inputs or outputs (heads) are flat here: A is [inputs, rank], B is
[rank, outputs].
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rynnvla_jax.config import LoraConfig, TransformerConfig
from rynnvla_jax.distributed.mesh import constrain
from rynnvla_jax.models.layers import project
from rynnvla_jax.models.params import constant, uniform

PATHS = "transformer.blocks.lora.*"  # of the adapters' parameters


class Adapter(nnx.Module):
    """The adapters of one matrix in all layers, stacked; called on one layer's slice, as `transformer.Block` is."""

    def __init__(self, layers: int, inputs: int, outputs: int, lora: LoraConfig, rngs: nnx.Rngs):
        self.scale = lora.scale
        self.a = uniform(rngs, (layers, inputs, lora.rank), inputs**-0.5, ("layers", "adapter", None))
        self.b = constant((layers, lora.rank, outputs), 0.0, ("layers", None, "adapter"))

    def __call__(
        self, x: Float[Array, "B S I"], axes: tuple[str | None, str | None], sums: DTypeLike
    ) -> Float[Array, "B S O"]:
        """What the adapter adds to x @ W, in x's dtype. `axes`: W's, as in `layers.project`."""
        inputs, outputs = (None if axis == "embed" else axis for axis in axes)
        # Whole but for what "tensor" cuts: they are small, and activations must not be cut as they are.
        a = constrain(self.a[...].astype(x.dtype), inputs, None)
        b = constrain(self.b[...].astype(x.dtype), None, outputs)
        low = project(x, a, axes=(inputs, None), sums=sums)
        return project(low, b, axes=(None, outputs), sums=sums) * jnp.asarray(self.scale, x.dtype)


def adapters(config: TransformerConfig, lora: LoraConfig, rngs: nnx.Rngs) -> nnx.Dict | None:
    """An `Adapter` for every matrix that `lora.targets` names, by its name; None without any."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = {
        "q": (c.width, heads),
        "k": (c.width, kv_heads),
        "v": (c.width, kv_heads),
        "o": (heads, c.width),
        "gate": (c.width, c.feed_forward),
        "up": (c.width, c.feed_forward),
        "down": (c.feed_forward, c.width),
    }
    # A key of their own, which no count reaches: other parameters are drawn alike with and without adapters.
    rngs = nnx.Rngs(jax.random.fold_in(rngs.params.key[...], 2**31 - 1))
    made = {name: Adapter(c.num_layers, *sizes[name], lora, rngs) for name in lora.adapted}
    return nnx.Dict(made) if made else None
