"""Causal grouped-query attention: XLA anywhere, splash (Pallas) on TPU, cuDNN on GPU, all with the same meaning.

Token i sees token j when j <= i and both belong to the same segment (the same clip of a packed sequence). When the
mesh cuts the sequence (context parallel), every device keeps its own queries and gathers all keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from rynnvla_jax.distributed.mesh import platform, shard_map, shards, spec

QUERY_BLOCK = 256  # queries that a block of XLA attention at least has
MAX_QUERY_BLOCKS = 8  # and how many blocks there are at most: they are unrolled
# Cycles of a splash tile that is not masked away, forward and backward, by its edge: instruction bundles that libtpu
# 0.0.42 schedules for v6e and a head of 128 (xla_jf_dump_llo_text; nothing was timed). 1024 was better than 512 on v4,
# v5e and v5p, too.
SPLASH_TILES = {1024: 8901, 896: 6910, 768: 5285, 640: 3876, 512: 2417, 384: 1773, 256: 1355, 128: 552}
SPLASH_STEP = 370  # further cycles of every tile, masked away or not
FORWARD_KEYS = {1024: 512, 768: 384}  # keys that the forward kernel computes at a time; elsewhere the whole tile's
FUSED_TILES = 8  # tiles of keys up to which one kernel makes all gradients; see `_splash_kernel`
IMPLEMENTATIONS = ("auto", "xla", "splash", "splash_interpreted", "cudnn")


def self_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    segments: Int[Array, "B S"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B S H E"]:
    """Attention of a whole sequence to itself, softmax in float32.

    Args:
      segments: clip that each token belongs to; None is one clip.
      implementation: "auto" takes splash on TPU, cuDNN on GPU where the dtype allows it (16 bits), else XLA;
        "splash_interpreted" runs the TPU kernel's program anywhere, slowly, for tests.
    """
    if implementation == "auto":
        sixteen = q.dtype in (jnp.bfloat16, jnp.float16)
        implementation = {"tpu": "splash", "gpu": "cudnn" if sixteen else "xla"}.get(platform(), "xla")
    if k.shape[2] % shards("heads"):  # fewer KV heads than the mesh has tensor shards
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    if implementation.startswith("splash"):
        return _splash(q, k, v, segments, interpret=implementation == "splash_interpreted")
    # The name that rematerialisation policies keep; splash gives it to its output and the softmax's sums itself.
    if implementation == "cudnn":
        return checkpoint_name(_by_device(_cudnn, q, k, v, segments), "attention")
    if shards("sequence") == 1:
        out = attend(q, k, v, 0, None if segments is None else (segments, segments))
    else:
        out = _by_device(attend, q, k, v, segments)
    return checkpoint_name(out, "attention")


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    start: Int[Array, ""] | int,
    segments: tuple[Int[Array, "B S"], Int[Array, "B T"]] | None = None,
) -> Float[Array, "B S H E"]:
    """XLA attention; query i stands at position `start` + i of the keys.

    Without a cache (S == T) the queries go in a few blocks, each over the keys up to its own end only, which
    halves the work and never holds the whole score matrix.
    """
    B, S, H, E = q.shape
    K, T = k.shape[2], k.shape[1]
    q = q.reshape(B, S, K, H // K, E).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    block = max(QUERY_BLOCK, -(-S // MAX_QUERY_BLOCKS)) if S == T else S

    def one(first: int) -> Array:
        last = min(first + block, S)
        end = last if S == T else T
        # The heads of a group are more rows of one plain batched product.
        rows = q[..., first:last, :].reshape(B, K, -1, E)
        scores = jnp.matmul(rows * E**-0.5, k[..., :end], preferred_element_type=jnp.float32)
        seen = jnp.arange(end)[None, :] <= start + jnp.arange(first, last)[:, None]
        if segments is not None:
            seen = seen & (segments[0][:, first:last, None] == segments[1][:, None, :end])
            seen = seen[:, None]
        # Rows of `scores` are (head of the group, query), and every head sees the same.
        seen = jnp.tile(seen, (*[1] * (seen.ndim - 2), H // K, 1))
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        # Softmax with the division after the product, on E numbers a row instead of T. The largest score cancels out
        # of it; without stop_gradient its gradient, which is zero, would be computed.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.matmul(weights.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
        return out.reshape(B, K, H // K, last - first, E)

    out = jnp.concatenate([one(first) for first in range(0, S, block)], axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, E)


def _cudnn(q, k, v, start, segments):
    """cuDNN's fused attention; it knows causality, everything else is a mask."""
    if segments is None and q.shape[1] == k.shape[1]:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    seen = jnp.arange(k.shape[1]) <= start + jnp.arange(q.shape[1])[:, None]
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    mask = jnp.broadcast_to(seen, (q.shape[0], *seen.shape[-2:]))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


QUERIES, KEYS = ("batch", "sequence", "heads", None), ("batch", None, "heads", None)


def _by_device(local: Any, q, k, v, segments):
    """`local(q, k, v, start, (segments of q, of k))` on every device's own queries and all keys."""

    def one(q, k, v, *segments):
        start = jax.lax.axis_index("sequence") * q.shape[1]  # position of this device's first query
        return local(q, k, v, start, segments or None)

    extra = () if segments is None else (segments, segments)
    return shard_map(one, _specs(extra), QUERIES)(q, k, v, *extra)


def _specs(segments: tuple[Array, ...]) -> tuple[tuple[str | None, ...], ...]:
    return (QUERIES, KEYS, KEYS, *((QUERIES[:2], KEYS[:2]) if segments else ()))


def _splash(q, k, v, segments, interpret: bool):
    S, E = q.shape[1], q.shape[3]
    cut = shards("sequence")
    edge = _tile_edge(S, cut)
    pad = -S % (edge * cut)  # padding stands at the end, where causality hides it
    if pad:
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, pad)))
    kernel = _splash_kernel(S + pad, q.shape[2], shards("heads"), cut, edge, interpret)

    def one(kernel, q, k, v, *segments):
        # The kernel takes one example [H, S, E], and does not scale the scores.
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(E**-0.5, q.dtype), k, v))
        if segments:
            ids = splash_attention_kernel.SegmentIds(*segments)
            out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(q, k, v, ids)
        else:
            out = jax.vmap(kernel)(q, k, v)
        return jnp.swapaxes(out, 1, 2)

    extra = () if segments is None else (segments, segments)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return one(kernel, q, k, v, *extra)[:, :S]
    # The kernel carries tables of the mask's tiles, which are cut along heads and queries as q is.
    kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, spec(("heads", "sequence"))))
    return shard_map(one, (kernel_spec, *_specs(extra)), QUERIES)(kernel, q, k, v, *extra)[:, :S]


def _tile_edge(length: int, cut: int) -> int:
    """The tile with the fewest cycles, padding too, on the device that sees most; `cut` devices share a sequence."""

    def cycles(edge: int) -> int:
        queries = -(-length // (edge * cut))
        tiles = queries * queries * cut
        return (tiles - queries * (queries - 1) // 2) * SPLASH_TILES[edge] + tiles * SPLASH_STEP

    return min(SPLASH_TILES, key=cycles)


def _splash_kernel(length: int, heads: int, head_shards: int, sequence_shards: int, edge: int, interpret: bool):
    """One kernel for all gradients makes five products a tile, two make seven; it has 0.7 of their cycles.

    But it writes the queries' gradient, rounded to their dtype, once for every tile of keys, and these are summed after
    it. Up to 7 tiles that is below the peak of the 7B step, which is in the MLP; as it grows with the square of the
    sequence, long ones get two kernels.
    """
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    sizes: dict[str, Any] = {name: edge for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")}
    sizes.update(block_kv_compute=FORWARD_KEYS.get(edge, edge), block_kv_dkv_compute=edge)
    if length // edge > FUSED_TILES:
        sizes.update(block_q_dq=edge, block_kv_dq=edge)
    else:
        sizes["use_fused_bwd_kernel"] = True
    return splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=head_shards,
        q_seq_shards=sequence_shards,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
