"""ActionVAE: a chunk of relative actions <-> one small embedding, an ACT-style transformer VAE.

The VLA regresses the encoder's output (mean and log-variance); the robot decodes the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rynnvla_jax.config import ActionVAEConfig
from rynnvla_jax.models import layers as layers_lib

UNTRAINED = ("is_pad_head", "encoder_joint_proj")  # in every public checkpoint, yet outside the loss: no gradient


class ActionVAE(nnx.Module):
    """Transformer VAE over action chunks; parameters correspond 1:1 to the public checkpoint's.

    `dtype` is the compute dtype; parameters, LayerNorm, softmax and losses are float32. `key=None` means no dropout.

    Source: reference implementation of arXiv 2509.15212 (ACT, arXiv 2304.13705, with cross-attention over targets
    and memory together). With `pre_norm` a layer's cross-attention reads the normalised targets beside the memory,
    and both encoders end in a LayerNorm, as DETR's do.
    """

    def __init__(self, config: ActionVAEConfig, state_dim: int = 6, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        width, latent = config.width, config.latent
        self.encoder = Stack(config, config.encoder_layers, cross=False, final_norm=config.pre_norm, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.encoder_action_proj = Linear(config.action_dim, width, rngs=rngs)
        self.encoder_joint_proj = Linear(state_dim, width, rngs=rngs)
        self.latent_proj = Linear(width, 2 * latent, rngs=rngs)
        self.latent_out_proj = Linear(latent, width, rngs=rngs)
        self.action_head = Linear(width, config.action_dim, rngs=rngs)
        self.is_pad_head = Linear(width, 1, rngs=rngs)
        self.cls_embed = nnx.Param(jax.random.normal(rngs.params(), (width,)), axes=("embed",))
        self.pos = nnx.Param(jax.random.normal(rngs.params(), (width,)), axes=("embed",))
        self.query_embed = nnx.Param(jax.random.normal(rngs.params(), (config.chunk, width)), axes=(None, "embed"))

    def encode(self, actions: jax.Array, is_pad: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """Actions [B, C, A] (normalised, relative), is_pad bool [B, C] or None -> [B, 2*Z] float32: mean, log-variance.

        Padded steps are not attended to; a chunk that is all padding still has its class token.
        """
        B, C, A = actions.shape
        if self.config.chunk != C or self.config.action_dim != A:
            raise ValueError(f"actions [..., {C}, {A}] do not fit chunk {self.config.chunk} x {self.config.action_dim}")
        x = self.encoder_action_proj(actions.astype(self.dtype))
        x = jnp.concatenate([jnp.broadcast_to(self.cls_embed[...].astype(self.dtype), (B, 1, x.shape[-1])), x], axis=1)
        mask = None if is_pad is None else jnp.pad(is_pad, ((0, 0), (1, 0)))
        positions = jnp.asarray(sinusoidal_positions(C + 1, x.shape[-1]), self.dtype)
        x = self.encoder(x, positions, key=key, is_pad=mask)
        return self.latent_proj(x[:, 0]).astype(jnp.float32)

    def decode(self, latent: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Latent [B, Z] -> (normalised relative actions [B, C, A], padding logits [B, C, 1]), float32."""
        memory_key, key = (None, None) if key is None else jax.random.split(key)
        memory = self.latent_out_proj(latent.astype(self.dtype))[:, None]
        target = jnp.repeat(memory, self.config.chunk, axis=1)
        pos, query = self.pos[...].astype(self.dtype)[None], self.query_embed[...].astype(self.dtype)
        memory = self.transformer.encoder(memory, pos, key=memory_key)
        x = self.transformer.decoder(target, query, key=key, memory=memory, memory_positions=pos)
        return self.action_head(x).astype(jnp.float32), self.is_pad_head(x).astype(jnp.float32)

    def loss(
        self, actions: jax.Array, is_pad: jax.Array, noise: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """L1 over steps that are not padding + kl_weight * KL (summed over Z, mean over B).

        Args:
          actions: [B, C, A]; is_pad: bool [B, C]; noise: [B, Z] standard normal; key: dropout.
        Returns:
          total and {"l1", "kl"}, float32 scalars. The L1 mean runs over padded elements too, as published, unless
          `config.masked_mean`.
        """
        encode_key, decode_key = (None, None) if key is None else jax.random.split(key)
        mean, log_variance = jnp.split(self.encode(actions, is_pad, encode_key), 2, axis=-1)
        predicted, _ = self.decode(mean + jnp.exp(log_variance / 2) * noise, decode_key)
        valid = ~is_pad[..., None]
        error = jnp.where(valid, jnp.abs(actions.astype(jnp.float32) - predicted), 0.0)
        elements = valid.sum() * actions.shape[-1] if self.config.masked_mean else actions.size
        l1 = error.sum() / jnp.maximum(elements, 1)
        kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1).mean()
        return l1 + self.config.kl_weight * kl, {"l1": l1, "kl": kl}


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """[length, width] float32, sines in even columns and cosines in odd ones (the public `pos_table`)."""
    column = np.arange(width)
    angle = np.arange(length)[:, None] / np.power(10000, 2 * (column // 2) / width)
    return np.where(column % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


class Linear(nnx.Module):
    """x @ kernel [in, out] + bias [out]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_uniform(rngs, (inputs, outputs), inputs**-0.5), axes=(None, None))
        self.bias = nnx.Param(jnp.zeros((outputs,)), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Transformer(nnx.Module):
    """The decoder and the small encoder over its one memory token."""

    def __init__(self, config: ActionVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Stack(config, config.encoder_layers, cross=False, final_norm=config.pre_norm, rngs=rngs)
        self.decoder = Stack(config, config.decoder_layers, cross=True, final_norm=True, rngs=rngs)


class Stack(nnx.Module):
    """L identical layers, parameters stacked on a leading axis and scanned.

    A layer is self-attention, then (with `cross`) attention over targets and memory together, then a ReLU MLP.
    """

    def __init__(self, config: ActionVAEConfig, layers: int, *, cross: bool, final_norm: bool, rngs: nnx.Rngs):
        self.config, self.cross, self.final_norm = config, cross, final_norm
        L, D, F, H = layers, config.width, config.feed_forward, config.num_heads
        E = D // H
        glorot = lambda fan_in, fan_out: (6 / (fan_in + fan_out)) ** 0.5  # noqa: E731

        def param(name, value, *axes):
            setattr(self, name, nnx.Param(value, axes=("layers", *axes)))

        for block in ("self", "cross") if cross else ("self",):
            # Query, key and value side by side (axis 2), so that one product makes all three.
            param(f"{block}_in_kernel", _uniform(rngs, (L, D, 3, H, E), glorot(D, 3 * D)), "embed", None, "heads", None)
            param(f"{block}_in_bias", jnp.zeros((L, 3, H, E)), None, "heads", None)
            param(f"{block}_out_kernel", _uniform(rngs, (L, H, E, D), D**-0.5), "heads", None, "embed")
            param(f"{block}_out_bias", jnp.zeros((L, D)), "embed")
        param("up_kernel", _uniform(rngs, (L, D, F), glorot(D, F)), "embed", "feed_forward")
        param("up_bias", jnp.zeros((L, F)), "feed_forward")
        param("down_kernel", _uniform(rngs, (L, F, D), glorot(D, F)), "feed_forward", "embed")
        param("down_bias", jnp.zeros((L, D)), "embed")
        for block in ("self", "cross", "mlp") if cross else ("self", "mlp"):
            param(f"{block}_norm_scale", jnp.ones((L, D)), "embed")
            param(f"{block}_norm_bias", jnp.zeros((L, D)), "embed")
        if final_norm:
            self.norm_scale = nnx.Param(jnp.ones((D,)), axes=("embed",))
            self.norm_bias = nnx.Param(jnp.zeros((D,)), axes=("embed",))

    def __call__(self, x, positions, *, key=None, is_pad=None, memory=None, memory_positions=None):
        """x [B, S, D]; positions [S, D] are added to queries and keys; memory [B, M, D]; is_pad bool [B, S]."""
        weights = {k: v[...] for k, v in vars(self).items() if isinstance(v, nnx.Param) and k not in _FINAL}
        keys = None if key is None else jax.random.split(key, weights["down_bias"].shape[0])

        def layer(x, inputs):
            weights, key = inputs
            keys = {} if key is None else dict(zip(_DROPOUTS, jax.random.split(key, len(_DROPOUTS)), strict=True))
            weights = {k: v if "norm" in k or "kernel" in k else v.astype(x.dtype) for k, v in weights.items()}
            return self._layer(weights, x, positions, keys, is_pad, memory, memory_positions), None

        x, _ = jax.lax.scan(layer, x, (weights, keys))
        return _layer_norm(x, self.norm_scale[...], self.norm_bias[...]) if self.final_norm else x

    def _layer(self, w, x, positions, keys, is_pad, memory, memory_positions):
        rate = self.config.dropout

        def block(name, x, function):
            norm = lambda y: _layer_norm(y, w[f"{name}_norm_scale"], w[f"{name}_norm_bias"])  # noqa: E731
            if self.config.pre_norm:
                return x + dropout(function(norm(x)), rate, keys.get(name))
            return norm(x + dropout(function(x), rate, keys.get(name)))

        def self_attention(x):
            return _attention(w, "self", x, positions, rate, keys.get("self_weights"), is_pad)

        def cross_attention(x):
            return _attention(w, "cross", x, positions, rate, keys.get("cross_weights"), None, memory, memory_positions)

        def mlp(x):
            hidden = jax.nn.relu(layers_lib.project(x, w["up_kernel"]) + w["up_bias"])
            hidden = dropout(hidden, rate, keys.get("mlp_hidden"))
            return layers_lib.project(hidden, w["down_kernel"]) + w["down_bias"]

        x = block("self", x, self_attention)
        if self.cross:
            x = block("cross", x, cross_attention)
        return block("mlp", x, mlp)


_FINAL = ("norm_scale", "norm_bias")
_DROPOUTS = ("self_weights", "self", "cross_weights", "cross", "mlp_hidden", "mlp")


def _attention(w, name, x, positions, rate, key, is_pad, memory=None, memory_positions=None):
    """Attention of x [B, S, D] over itself and, where given, `memory` [B, M, D] behind it."""
    kernel, bias = w[f"{name}_in_kernel"], w[f"{name}_in_bias"]

    def project(x, positions):
        # Positions reach queries and keys only. Projected apart they cost nothing: no batch axis.
        offset = jnp.einsum("sd,dnhe->snhe", positions, kernel[:, :2].astype(x.dtype))
        offset = jnp.pad(offset, ((0, 0), (0, 1), (0, 0), (0, 0))) + bias
        return layers_lib.project(x, kernel) + offset

    q, k, v = jnp.unstack(project(x, positions), axis=2)
    if memory is not None:
        _, memory_k, memory_v = jnp.unstack(project(memory, memory_positions), axis=2)
        k, v = jnp.concatenate([k, memory_k], axis=1), jnp.concatenate([v, memory_v], axis=1)
    scores = jnp.einsum("bshe,bthe->bhst", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if is_pad is not None:
        scores = jnp.where(is_pad[:, None, None], jnp.finfo(jnp.float32).min, scores)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1).astype(x.dtype), rate, key)
    out = jnp.einsum("bhst,bthe->bshe", probabilities, v)
    return layers_lib.project(out, w[f"{name}_out_kernel"], inputs=2) + w[f"{name}_out_bias"]


def _layer_norm(x, scale, bias):
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales up the rest; nothing without a key."""
    if key is None or rate == 0:
        return x
    # 16 random bits decide about an element, to 1 / 65536: drawn two from a word, at a third of bernoulli's cost.
    threshold = round((1 - rate) * 65536)
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)))
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return jnp.where(halves < threshold, x * (65536 / threshold), 0).astype(x.dtype)


def _uniform(rngs, shape, bound):
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
