"""The token loss, computed in chunks of the vocabulary so that full-vocabulary logits never exist at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.distributed.mesh import RULES, scatter_sum, shard_map


class TokenSums(NamedTuple):
    """Sums over trained tokens, and the loss of every position, float32."""

    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]  # squared log-partition
    correct: Float[Array, ""]  # tokens whose arg-max is right
    losses: Float[Array, "B S"]  # cross-entropy of each target, trained or not; for metrics: it passes no gradient on


HIDDEN, HEAD, TOKENS, COLUMNS = ("batch", "sequence", None), ("embed", "vocab"), ("batch", "sequence"), ("vocab",)
LOWEST = jnp.finfo(jnp.float32).min  # not -inf: where a device has only padding columns, -inf - -inf would be NaN
LANES = 128  # of a TPU's vector registers


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    allowed: Bool[Array, " V"],
    chunk: int,
) -> TokenSums:
    """Weighted sums of cross-entropy, squared log-partition and correct predictions.

    Each device takes its own tokens through the vocabulary piece by piece, and gathers a piece of the head in the
    compute dtype while it works on the one before. The backward pass computes every piece's logits again, and sums that
    piece of the head's gradient over devices in float32. Neither logits nor head nor its gradient are ever whole on a
    device; the products are as many and as large on any number of devices.

    Args:
      hidden: of the position that predicts, compute dtype.
      head: LM head, float32.
      targets: token to predict.
      weights: 1 where trained, else 0.
      allowed: rows of the vocabulary that may be predicted (no padding).
      chunk: columns of the vocabulary whose logits exist at once, about.
    """
    return _forward(hidden, head, targets, weights, allowed, chunk)[0]


def _forward(hidden, head, targets, weights, allowed, chunk):
    local = functools.partial(_local_sums, chunk=chunk)
    run = shard_map(local, (HIDDEN, HEAD, TOKENS, TOKENS, COLUMNS), ((), TOKENS, TOKENS))
    (cross_entropy, z, correct), log_partition, losses = run(hidden, head, targets, weights, allowed)
    return TokenSums(cross_entropy, z, correct, losses), (hidden, head, targets, weights, allowed, log_partition)


def _backward(chunk, saved, gradient: TokenSums):
    local = functools.partial(_local_gradients, chunk=chunk)
    run = shard_map(local, (HIDDEN, HEAD, TOKENS, TOKENS, COLUMNS, TOKENS, (), ()), (HIDDEN, HEAD))
    return (*run(*saved, gradient.cross_entropy, gradient.z), None, None, None)


chunked_cross_entropy.defvjp(_forward, _backward)


def _local_sums(hidden, head, targets, weights, allowed, chunk: int) -> tuple[tuple[Array, ...], Array, Array]:
    rows = hidden.reshape(-1, hidden.shape[-1])
    target = targets.reshape(-1)

    def body(carry, piece):  # sums of exponentials are kept relative to the largest logit so far
        total, target_logit, best = carry
        logits = piece.logits(rows)
        new_best = jnp.maximum(best, logits.max(axis=-1))
        total = total * jnp.exp(best - new_best) + jnp.sum(jnp.exp(logits - new_best[:, None]), axis=-1)
        target_logit += jnp.sum(jnp.where(piece.holds(target), logits, 0.0), axis=-1)
        return (total, target_logit, new_best), None

    zero = jnp.zeros(target.shape, jnp.float32)
    start = (zero, zero, jnp.full_like(zero, LOWEST))
    (total, target_logit, own_best), _ = _over_pieces(body, start, head, allowed, rows.dtype, chunk)
    # Each tensor shard has seen its own columns only: to one maximum first, then the sums can be added.
    best = jax.lax.pmax(own_best, "tensor")
    total, target_logit = jax.lax.psum((total * jnp.exp(own_best - best), target_logit), "tensor")
    log_partition = best + jnp.log(total)
    weights = weights.reshape(-1)
    sums = (
        jnp.sum(weights * (log_partition - target_logit)),
        jnp.sum(weights * log_partition**2),
        jnp.sum(weights * (target_logit >= best)),  # no token is above the target; a tie counts as right
    )
    sums = jax.lax.psum(sums, (*RULES["batch"], RULES["sequence"]))
    return sums, log_partition.reshape(targets.shape), (log_partition - target_logit).reshape(targets.shape)


def _local_gradients(hidden, head, targets, weights, allowed, log_partition, entropy_gradient, z_gradient, chunk: int):
    rows = hidden.reshape(-1, hidden.shape[-1])
    target, weights, log_partition = (x.reshape(-1, 1) for x in (targets, weights, log_partition))
    scale = weights * (entropy_gradient + 2.0 * z_gradient * log_partition)

    def body(rows_gradient, piece):
        softmax = jnp.exp(piece.logits(rows) - log_partition)  # the log-partition's own gradient
        g = scale * softmax - jnp.where(piece.holds(target[:, 0]), weights * entropy_gradient, 0.0)
        g = g.astype(rows.dtype)  # factors of products are in the compute dtype, sums in float32
        rows_gradient += jnp.matmul(g, piece.head.T, preferred_element_type=jnp.float32)
        product = jnp.matmul(rows.T, g, preferred_element_type=jnp.float32)
        return rows_gradient, scatter_sum(product, 0, beside=rows_gradient).astype(rows.dtype)

    start = jnp.zeros(rows.shape, jnp.float32)
    rows_gradient, pieces = _over_pieces(body, start, head, allowed, rows.dtype, chunk)
    rows_gradient = jax.lax.psum(rows_gradient.astype(rows.dtype), "tensor").reshape(hidden.shape)
    head_gradient = jnp.moveaxis(pieces, 0, 1).reshape(head.shape[0], -1)[:, : head.shape[1]]
    return rows_gradient, head_gradient.astype(head.dtype)


class _Piece(NamedTuple):
    """Some columns of the vocabulary, all rows gathered."""

    head: Float[Array, "D P"]
    allowed: Bool[Array, " P"]
    first: Int[Array, ""]  # token id of the first column

    def logits(self, rows):
        logits = jnp.matmul(rows, self.head, preferred_element_type=jnp.float32)
        return jnp.where(self.allowed, logits, LOWEST)

    def holds(self, target):
        """Where a column is the token's target; a comparison instead of a gather."""
        return (self.first + jnp.arange(self.allowed.size) == target[:, None]) & self.allowed


def _over_pieces(body, carry, head, allowed, dtype, chunk: int):
    """`jax.lax.scan` of `body(carry, piece)` over this device's columns."""
    D, columns = head.shape
    count = -(-columns // chunk)
    width = -(-columns // count)  # equal pieces: the last one is not a short rest
    width += -width % LANES if width > LANES else 0
    pad = count * width - columns
    # Pieces on the leading axis, because a scan can only slice that one.
    shards = jnp.moveaxis(jnp.pad(head.astype(dtype), ((0, 0), (0, pad))).reshape(D, count, width), 1, 0)
    allowed = jnp.pad(allowed, (0, pad)).reshape(count, width)
    first = jax.lax.axis_index("tensor") * columns + width * jnp.arange(count)

    def gather(shard):
        return jax.lax.all_gather(shard, RULES["embed"], axis=0, tiled=True)

    def step(state, piece):
        carry, gathered = state
        following, allowed, first = piece
        upcoming = gather(following)  # nothing below needs it: it travels meanwhile (the last one in vain)
        carry, y = body(carry, _Piece(gathered, allowed, first))
        return (carry, upcoming), y

    pieces = jnp.roll(shards, -1, axis=0), allowed, first
    (carry, _), ys = jax.lax.scan(step, (carry, gather(shards[0])), pieces)
    return carry, ys
