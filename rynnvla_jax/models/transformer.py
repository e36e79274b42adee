"""The Chameleon decoder.

Source: Chameleon (arXiv 2405.09818) as released: pre-norm (7B) or `swin_norm` (34B) blocks, LayerNorm
on queries and keys before rotary positions, SwiGLU, dropout on both residual branches. Weights are
stored in float32 and cast to the compute dtype at use; layers are stacked and scanned.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.config import TransformerConfig
from rynnvla_jax.distributed.mesh import RULES, constrain, shard_map, shards, unless_whole
from rynnvla_jax.models.attention import attend, self_attention
from rynnvla_jax.models.layers import DOWN, dropout, gated, layer_norm, project, rms_norm, swiglu, together
from rynnvla_jax.models.lora import Adapter
from rynnvla_jax.models.params import constant, normal

_policies = jax.checkpoint_policies
# What the backward pass finds in memory; everything else of a layer is computed again. Least memory last.
REMAT = {
    "none": None,
    "projections": _policies.save_only_these_names("q", "k", "v", "attention", "gate", "up"),
    "attention": _policies.save_only_these_names("attention"),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for decoding."""

    k: Float[Array, "L B S K E"]
    v: Float[Array, "L B S K E"]
    length: Int[Array, ""]  # tokens already in the cache


class Block(nnx.Module):
    """All decoder layers, stacked on a leading axis; `Transformer` calls it on one layer's slice."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        attention: str,
        sums: DTypeLike,
        lora: nnx.Dict | None = None,
    ):
        """`lora`: adapters by the name of their matrix (`lora.adapters`)."""
        c = config
        L, D, F, H, K, E = c.num_layers, c.width, c.feed_forward, c.num_heads, c.num_kv_heads, c.head_dim
        std = c.init_std
        self.config, self.dtype, self.implementation, self.sums = c, dtype, attention, sums
        self.attention_norm = constant((L, D), 1.0, ("layers", None))
        self.wq = normal(rngs, (L, D, H, E), std, ("layers", "embed", "heads", None))
        self.wk = normal(rngs, (L, D, K, E), std, ("layers", "embed", "kv_heads", None))
        self.wv = normal(rngs, (L, D, K, E), std, ("layers", "embed", "kv_heads", None))
        self.wo = normal(rngs, (L, H, E, D), std, ("layers", "heads", None, "embed"))
        if c.attention_bias:
            self.bq = constant((L, H, E), 0.0, ("layers", "heads", None))
            self.bk = constant((L, K, E), 0.0, ("layers", "kv_heads", None))
            self.bv = constant((L, K, E), 0.0, ("layers", "kv_heads", None))
            self.bo = constant((L, D), 0.0, ("layers", None))
        self.q_norm_scale = constant((L, c.q_norm_rows, E), 1.0, ("layers", None, None))
        self.q_norm_bias = constant((L, c.q_norm_rows, E), 0.0, ("layers", None, None))
        self.k_norm_scale = constant((L, c.k_norm_rows, E), 1.0, ("layers", None, None))
        self.k_norm_bias = constant((L, c.k_norm_rows, E), 0.0, ("layers", None, None))
        self.mlp_norm = constant((L, D), 1.0, ("layers", None))
        self.w_gate = normal(rngs, (L, D, F), std, ("layers", "embed", "feed_forward"))
        self.w_up = normal(rngs, (L, D, F), std, ("layers", "embed", "feed_forward"))
        self.w_down = normal(rngs, (L, F, D), std, ("layers", "feed_forward", "embed"))
        if c.mlp_bias:
            self.b_gate = constant((L, F), 0.0, ("layers", "feed_forward"))
            self.b_up = constant((L, F), 0.0, ("layers", "feed_forward"))
            self.b_down = constant((L, D), 0.0, ("layers", None))
        if lora is not None:
            self.lora = lora

    def __call__(self, x, rotary, key=None, cache=None, segments=None):
        """One layer on x [B,S,D]; `cache` is (k, v [B,T,K,E], index) or None. Returns (x, (k, v))."""
        c = self.config
        x = checkpoint_name(x, "residual")  # a layer's input, all that the policy "offload" keeps
        keys = (None, None) if key is None else jax.random.split(key)
        if c.swin_norm:
            attended, kv = self.attention(x, rotary, cache, segments)
            x = x + dropout(rms_norm(attended, self.attention_norm, c.norm_eps), c.dropout, keys[0])
            fed = rms_norm(self.mlp(x), self.mlp_norm, c.norm_eps)
        else:
            attended, kv = self.attention(rms_norm(x, self.attention_norm, c.norm_eps), rotary, cache, segments)
            x = x + dropout(attended, c.dropout, keys[0])
            fed = self.mlp(rms_norm(x, self.mlp_norm, c.norm_eps))
        x = constrain(x + dropout(fed, c.dropout, keys[1]), "batch", "sequence", None)
        return x, kv

    def attention(self, x, rotary, cache, segments):
        c = self.config
        # Named before bias, norm and rotation: these are cheap to compute again, the products are not.
        kv_heads = unless_whole("kv_heads", c.num_kv_heads)

        def inner(weight, name, heads):
            axes = "embed", heads
            y = project(x, weight[...], axes=axes, sums=self.sums)
            y = self.adapted(y, name, x, axes)
            return checkpoint_name(constrain(y, "batch", "sequence", heads, None), name)

        q, k, v = inner(self.wq, "q", "heads"), inner(self.wk, "k", kv_heads), inner(self.wv, "v", kv_heads)
        if c.attention_bias:
            q, k, v = q + self.cast(self.bq), k + self.cast(self.bk), v + self.cast(self.bv)
        q = apply_rope(qk_norm(q, self.q_norm_scale, self.q_norm_bias), rotary)
        k = apply_rope(qk_norm(k, self.k_norm_scale, self.k_norm_bias), rotary)
        if cache is None:
            attended = self_attention(q, k, v, segments, self.implementation)
        else:
            past_k, past_v, index = cache
            k = jax.lax.dynamic_update_slice_in_dim(past_k, k, index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past_v, v, index, axis=1)
            attended = attend(q, k, v, index)
        out = project(attended, self.wo[...], inputs=2, axes=("heads", "embed"), sums=self.sums)
        out = self.adapted(out, "o", attended, ("heads", "embed"))
        if c.attention_bias:
            out = out + self.cast(self.bo)
        return out, (k, v)

    def mlp(self, x):
        x, (w_gate, w_up, w_down) = together(x, tuple(self.cast(w) for w in (self.w_gate, self.w_up, self.w_down)))
        gate, up = (
            checkpoint_name(self.adapted(project(x, w, axes=DOWN[::-1], sums=self.sums), name, x, DOWN[::-1]), name)
            for w, name in ((w_gate, "gate"), (w_up, "up"))
        )
        if self.config.mlp_bias:
            gate, up = gate + self.cast(self.b_gate), up + self.cast(self.b_up)
        y = swiglu(gate, up, w_down, self.sums)
        if "down" in self.adapters:
            y = self.adapted(y, "down", gated(gate, up), DOWN)
        return y + self.cast(self.b_down) if self.config.mlp_bias else y

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return getattr(self, "lora", {})

    def adapted(self, y, name, x, axes):
        """y = x @ the matrix `name` [B,S,*O], with what the matrix's adapter adds, if it has one."""
        if name not in self.adapters:
            return y
        return y + self.adapters[name](x.reshape(*x.shape[:2], -1), axes, self.sums).reshape(y.shape)

    def cast(self, param):
        return param[...].astype(self.dtype)


class Transformer(nnx.Module):
    """Embedding, scanned decoder blocks, final norm and untied LM head."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        sums: DTypeLike = jnp.float32,
        lora: nnx.Dict | None = None,
    ):
        """`remat`: one of `REMAT`; `attention`: one of `attention.IMPLEMENTATIONS`; `sums`: see `layers.project`;
        `lora`: see `Block`."""
        c = config
        self.config, self.dtype, self.remat = c, dtype, remat
        # The vocabulary is padded to a multiple that tensor shards divide.
        row = jnp.arange(c.padded_vocab) < c.vocab_size  # padding rows start, and by masking stay, at zero
        embed = jax.random.normal(rngs.params(), (c.padded_vocab, c.width)) * c.init_std
        self.embed = nnx.Param(jnp.where(row[:, None], embed, 0.0), axes=("vocab", "embed"))
        self.blocks = Block(c, rngs=rngs, dtype=dtype, attention=attention, sums=sums, lora=lora)
        self.final_norm = constant((c.width,), 1.0, (None,))
        head = jax.random.normal(rngs.params(), (c.width, c.padded_vocab)) * c.init_std
        self.head = nnx.Param(jnp.where(row[None], head, 0.0), axes=("embed", "vocab"))

    def embed_tokens(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Token embeddings in the compute dtype."""
        if shards("embed") * shards("vocab") == 1:
            return constrain(
                self.embed[...][tokens].astype(self.dtype), "batch", "sequence", None
            )  # cast: read rows only
        run = shard_map(self._embed_shard, (("vocab", "embed"), ("batch", "sequence")), ("batch", "sequence", None))
        return run(self.embed[...], tokens)

    def _embed_shard(self, table, tokens):
        """Every device looks up its own columns for the tokens of all devices that have the others, and swaps them.

        Left to itself, the compiler sums a whole gradient of the table over all devices on large pods.
        """
        others = RULES["embed"]
        rows = jax.lax.all_gather(tokens.reshape(-1), others) - jax.lax.axis_index("tensor") * table.shape[0]
        inside = (rows >= 0) & (rows < table.shape[0])
        columns = jnp.where(inside[..., None], table[jnp.where(inside, rows, 0)], 0).astype(self.dtype)
        whole = jax.lax.all_to_all(columns, others, 0, 2, tiled=True).reshape(*tokens.shape, -1)
        return jax.lax.psum(whole, "tensor")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        collect: bool = False,
        positions: Int[Array, "B S"] | None = None,
        segments: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Runs the blocks and the final norm.

        Args:
          x: embeddings, compute dtype.
          key: dropout key; None is deterministic.
          cache: keys and values before x. Attention is causal over cache and x together.
          collect: return a Cache that holds x's keys and values (prefill).
          positions: rotary positions; None counts from the start of the row (or the end of the cache).
          segments: clip that each token belongs to; tokens see their own clip only. None is one clip.
        """
        c = self.config
        start = 0 if cache is None else cache.length
        length = start + x.shape[1]
        rotary = rotary_angles(
            start + jnp.arange(x.shape[1]) if positions is None else positions, c.head_dim, c.rope_theta
        )
        graphdef, stacked = nnx.split(self.blocks)
        # The matrices are cast once a step, outside the scan: devices gather half the bytes, and no layer casts twice.
        stacked = _each(stacked, lambda w, axes: w.astype(self.dtype) if "embed" in axes else w)

        def body(x, layer):
            weights, index, kv = layer
            # Said again for one layer, so that its gradient is scattered at once and never whole on a device.
            weights = _each(weights, lambda w, axes: constrain(w, *axes[1:]))
            layer_key = None if key is None else jax.random.fold_in(key, index)
            past = None if kv is None else (*kv, start)
            x, new_kv = nnx.merge(graphdef, weights)(x, rotary, layer_key, past, segments)
            return x, new_kv if collect or cache is not None else None

        if self.remat != "none":
            # Inside a scan the compiler cannot merge the second computation with the first, so JAX need not prevent it.
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        past = None if cache is None else (cache.k, cache.v)
        x, kv = jax.lax.scan(body, x, (stacked, jnp.arange(c.num_layers), past))
        new_cache = None if kv is None else Cache(kv[0], kv[1], jnp.asarray(length, jnp.int32))
        return rms_norm(x, self.final_norm, c.norm_eps), new_cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens."""
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), jnp.zeros((), jnp.int32))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of all padded rows; pads, and image codes under `mask_image_logits`, are at -inf's stand-in.

        Training never calls this on a whole sequence: `losses.chunked_cross_entropy` does it in pieces.
        """
        return masked_logits(hidden, self.head[...].astype(self.dtype), self.allowed())

    def allowed(self) -> Bool[Array, " V"]:
        """Which vocabulary rows may be predicted."""
        row = jnp.arange(self.config.padded_vocab)
        allowed = row < self.config.vocab_size
        if self.config.mask_image_logits:
            first, last = self.config.image_tokens
            allowed &= (row < first) | (row >= last)
        return allowed


def _each(state: nnx.State, f) -> nnx.State:
    """`f(array, logical axes)` of every parameter."""
    return jax.tree.map(
        lambda v: v.replace(f(v[...], v.get_metadata("axes"))), state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )


def masked_logits(hidden, head, allowed):
    """hidden [..., D] @ head [D, V] in float32, forbidden columns at the lowest finite value."""
    # Not -inf: softmax and its gradient of a row of -inf are NaN.
    logits = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
    return jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)


def qk_norm(x, scale, bias):
    """LayerNorm over the head size of x [B,S,H,E]; scale and bias [rows,E], each row repeated over H/rows heads."""
    heads = x.shape[-2]
    scale, bias = (jnp.repeat(p[...], heads // p.shape[0], axis=0) for p in (scale, bias))
    return layer_norm(x, scale, bias)


def rotary_angles(positions: Int[Array, "*B S"], head_dim: int, theta: float) -> Float[Array, "*B S E2"]:
    """Angles of each position for the half-split layout.

    Frequencies are rounded once, from float64, as in `deploy.torch_transformer`: positions multiply their last bit.
    """
    frequencies = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return positions[..., None].astype(jnp.float32) * frequencies


def apply_rope(x, angles):
    """Rotary positions, half-split layout: component i turns with component i + E/2. x [B,S,H,E].

    The halves are swapped, one with a new sign, by an exact product with a signed permutation: on TPU, arrays of half a
    head would take the memory of whole ones, because they half fill the vector registers. By the compiler's cycles on
    v6e a roll, or a product in one pass of bfloat16, is slower.
    """
    half = x.shape[-1] // 2
    swap = np.roll(np.diag([1.0] * half + [-1.0] * half), half, axis=1)
    # "highest", or TPUs would round float32 factors to bfloat16 and the product would not be exact.
    other = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision="highest")
    cos, sin = (jnp.concatenate([f(angles)] * 2, axis=-1)[..., None, :] for f in (jnp.cos, jnp.sin))
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)
