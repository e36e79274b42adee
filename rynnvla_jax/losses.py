"""The token loss, computed in chunks of the sequence so that full-vocabulary logits never exist at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.models.linear import matmul
from rynnvla_jax.sharding import constrain


class TokenSums(NamedTuple):
    """Sums over trained tokens, float32."""

    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]  # squared log-partition
    correct: Float[Array, ""]  # tokens whose arg-max is right


def chunked_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    allowed: Bool[Array, " V"],
    chunk: int,
) -> TokenSums:
    """Weighted sums of cross-entropy, squared log-partition and correct predictions.

    At most `B * chunk * V` logits exist at a time, forward and backward: each chunk's are computed
    again for its gradient.

    Args:
      hidden: of the position that predicts, compute dtype.
      head: LM head, float32; its gradient is summed over the chunks in float32.
      targets: token to predict.
      weights: 1 where trained, else 0.
      allowed: rows of the vocabulary that may be predicted (no padding).
    """
    B, S, _ = hidden.shape
    chunk = min(chunk, S)
    pad = -S % chunk
    if pad:
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, pad))) for x in (targets, weights))

    def split(x):
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def body(sums, piece):
        h, target, weight = piece
        logits = matmul(h.reshape(-1, h.shape[-1]), head, jnp.float32)
        logits = logits.reshape(*target.shape, -1)
        logits = constrain(jnp.where(allowed, logits, jnp.finfo(jnp.float32).min), "batch", None, "vocab")
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        # A comparison instead of a gather: it stays local when the vocabulary is sharded.
        is_target = jnp.arange(logits.shape[-1]) == target[..., None]
        target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        best = jax.lax.stop_gradient(logits.max(axis=-1))
        piece_sums = TokenSums(
            jnp.sum(weight * (log_partition - target_logit)),
            jnp.sum(weight * log_partition**2),
            jnp.sum(weight * (target_logit >= best)),
        )
        return jax.tree.map(jnp.add, sums, piece_sums), None

    zero = TokenSums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    return jax.lax.scan(body, zero, (split(hidden), split(targets), split(weights)))[0]
