"""ActionVAE: a chunk of relative actions <-> one small embedding, an ACT-style transformer VAE.

The VLA regresses the encoder's output (mean and log-variance); the robot decodes the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rynnvla_jax.config import ActionVAEConfig
from rynnvla_jax.models.layers import Linear, fast_dropout, layer_norm, project
from rynnvla_jax.models.params import constant, normal, uniform

UNTRAINED = ("is_pad_head", "encoder_joint_proj")  # in every public checkpoint, yet outside the loss: no gradient


class ActionVAE(nnx.Module):
    """Transformer VAE over action chunks; parameters correspond 1:1 to the public checkpoint's.

    `dtype` is the compute dtype; parameters, LayerNorm, softmax and losses are float32. `key=None` means no dropout.

    Source: reference implementation of arXiv 2509.15212 (ACT, arXiv 2304.13705). Post-norm, a decoder layer's
    cross-attention reads targets and memory together; with `pre_norm` it reads the memory alone, and both encoders end
    in a LayerNorm, as DETR's do.
    """

    def __init__(self, config: ActionVAEConfig, state_dim: int = 6, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        width, latent = config.width, config.latent
        self.encoder = Stack(config, config.encoder_layers, cross=False, final_norm=config.pre_norm, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(uniform(rngs, (inputs, outputs), inputs**-0.5, (None, None)))

        self.encoder_action_proj = linear(config.action_dim, width)
        self.encoder_joint_proj = linear(state_dim, width)
        self.latent_proj = linear(width, 2 * latent)
        self.latent_out_proj = linear(latent, width)
        self.action_head = linear(width, config.action_dim)
        self.is_pad_head = linear(width, 1)
        self.cls_embed = normal(rngs, (width,), 1.0, ("embed",))
        self.pos = normal(rngs, (width,), 1.0, ("embed",))
        self.query_embed = normal(rngs, (config.chunk, width), 1.0, (None, "embed"))

    def encode(self, actions: jax.Array, is_pad: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """Actions [B, C, A] (normalised, relative), is_pad bool [B, C] or None -> [B, 2*Z] float32: mean, log-variance.

        Padded steps are not attended to; a chunk that is all padding still has its class token.
        """
        B, C, A = actions.shape
        if self.config.chunk != C or self.config.action_dim != A:
            raise ValueError(
                f"chunks of {C} x {A} numbers do not fit the ActionVAE: its data.chunk is {self.config.chunk} and its "
                f"action_vae_model.action_dim {self.config.action_dim}"
            )
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
    ) -> tuple[jax.Array, dict[str, Any]]:
        """L1 over steps that are not padding + kl_weight * KL (summed over Z, mean over B).

        Args:
          actions: [B, C, A]; is_pad: bool [B, C]; noise: [B, Z] standard normal; key: dropout.
        Returns:
          total and {"l1", "kl"}, float32 scalars, with "rows": (sums [B], counts [B]) of L1. The L1 mean runs over
          padded elements too, as published, unless `config.masked_mean`.
        """
        encode_key, decode_key = (None, None) if key is None else jax.random.split(key)
        mean, log_variance = jnp.split(self.encode(actions, is_pad, encode_key), 2, axis=-1)
        predicted, _ = self.decode(mean + jnp.exp(log_variance / 2) * noise, decode_key)
        valid = ~is_pad[..., None]
        error = jnp.where(valid, jnp.abs(actions.astype(jnp.float32) - predicted), 0.0)
        elements = valid.sum() * actions.shape[-1] if self.config.masked_mean else actions.size
        l1 = error.sum() / jnp.maximum(elements, 1)
        each = (
            valid.sum((1, 2)) * actions.shape[2] if self.config.masked_mean else jnp.full(len(actions), error[0].size)
        )
        kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1).mean()
        rows = {"l1": (error.sum((1, 2)), each.astype(jnp.float32))}
        return l1 + self.config.kl_weight * kl, {"l1": l1, "kl": kl, "rows": rows}


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """[length, width] float32, sines in even columns and cosines in odd ones (the public `pos_table`)."""
    column = np.arange(width)
    angle = np.arange(length)[:, None] / np.power(10000, 2 * (column // 2) / width)
    return np.where(column % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


class Transformer(nnx.Module):
    """The decoder and the small encoder over its one memory token."""

    def __init__(self, config: ActionVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Stack(config, config.encoder_layers, cross=False, final_norm=config.pre_norm, rngs=rngs)
        self.decoder = Stack(config, config.decoder_layers, cross=True, final_norm=True, rngs=rngs)


class Stack(nnx.Module):
    """L identical layers, parameters stacked on a leading axis and scanned.

    A layer is self-attention, then (with `cross`) attention to the memory, then a ReLU MLP.
    """

    def __init__(self, config: ActionVAEConfig, layers: int, *, cross: bool, final_norm: bool, rngs: nnx.Rngs):
        self.config, self.cross, self.final_norm = config, cross, final_norm
        L, D, F, H = layers, config.width, config.feed_forward, config.num_heads
        E = D // H
        glorot = lambda fan_in, fan_out: (6 / (fan_in + fan_out)) ** 0.5  # noqa: E731

        def drawn(name, shape, bound, *axes):
            setattr(self, name, uniform(rngs, (L, *shape), bound, ("layers", *axes)))

        def filled(name, shape, value, *axes):
            setattr(self, name, constant((L, *shape), value, ("layers", *axes)))

        for block in ("self", "cross") if cross else ("self",):
            # Query, key and value side by side (axis 2), so that one product makes all three.
            drawn(f"{block}_in_kernel", (D, 3, H, E), glorot(D, 3 * D), "embed", None, "heads", None)
            filled(f"{block}_in_bias", (3, H, E), 0.0, None, "heads", None)
            drawn(f"{block}_out_kernel", (H, E, D), D**-0.5, "heads", None, "embed")
            filled(f"{block}_out_bias", (D,), 0.0, "embed")
        drawn("up_kernel", (D, F), glorot(D, F), "embed", "feed_forward")
        filled("up_bias", (F,), 0.0, "feed_forward")
        drawn("down_kernel", (F, D), glorot(D, F), "feed_forward", "embed")
        filled("down_bias", (D,), 0.0, "embed")
        for block in ("self", "cross", "mlp") if cross else ("self", "mlp"):
            filled(f"{block}_norm_scale", (D,), 1.0, "embed")
            filled(f"{block}_norm_bias", (D,), 0.0, "embed")
        if final_norm:
            self.norm_scale = constant((D,), 1.0, ("embed",))
            self.norm_bias = constant((D,), 0.0, ("embed",))

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
        return layer_norm(x, self.norm_scale[...], self.norm_bias[...]) if self.final_norm else x

    def _layer(self, w, x, positions, keys, is_pad, memory, memory_positions):
        rate = self.config.dropout

        def block(name, x, function):
            norm = lambda y: layer_norm(y, w[f"{name}_norm_scale"], w[f"{name}_norm_bias"])  # noqa: E731
            if self.config.pre_norm:
                return x + fast_dropout(function(norm(x)), rate, keys.get(name))
            return norm(x + fast_dropout(function(x), rate, keys.get(name)))

        def self_attention(x):
            return _attention(w, "self", x, positions, rate, keys.get("self_weights"), is_pad)

        def cross_attention(x):
            own = not self.config.pre_norm  # a peculiarity of the public code: only post-norm layers see the targets
            key = keys.get("cross_weights")
            return _attention(w, "cross", x, positions, rate, key, None, memory, memory_positions, own)

        def mlp(x):
            hidden = jax.nn.relu(project(x, w["up_kernel"]) + w["up_bias"])
            hidden = fast_dropout(hidden, rate, keys.get("mlp_hidden"))
            return project(hidden, w["down_kernel"]) + w["down_bias"]

        x = block("self", x, self_attention)
        if self.cross:
            x = block("cross", x, cross_attention)
        return block("mlp", x, mlp)


_FINAL = ("norm_scale", "norm_bias")
_DROPOUTS = ("self_weights", "self", "cross_weights", "cross", "mlp_hidden", "mlp")


def _attention(w, name, x, positions, rate, key, is_pad, memory=None, memory_positions=None, own=True):
    """Attention of x [B, S, D] to itself (unless `own` is false) and, if given, to `memory` [B, M, D]."""
    kernel, bias = w[f"{name}_in_kernel"], w[f"{name}_in_bias"]

    def queries_keys_values(x, positions):
        # Positions reach queries and keys only. Projected apart they cost nothing: no batch axis.
        offset = jnp.einsum("sd,dnhe->snhe", positions, kernel[:, :2].astype(x.dtype))
        offset = jnp.pad(offset, ((0, 0), (0, 1), (0, 0), (0, 0))) + bias
        return project(x, kernel) + offset

    q, k, v = jnp.unstack(queries_keys_values(x, positions), axis=2)
    if memory is not None:
        _, memory_k, memory_v = jnp.unstack(queries_keys_values(memory, memory_positions), axis=2)
        k = jnp.concatenate([k, memory_k], axis=1) if own else memory_k
        v = jnp.concatenate([v, memory_v], axis=1) if own else memory_v
    scores = jnp.einsum("bshe,bthe->bhst", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if is_pad is not None:
        scores = jnp.where(is_pad[:, None, None], jnp.finfo(jnp.float32).min, scores)
    probabilities = fast_dropout(jax.nn.softmax(scores, axis=-1).astype(x.dtype), rate, key)
    out = jnp.einsum("bhst,bthe->bshe", probabilities, v)
    return project(out, w[f"{name}_out_kernel"], inputs=2) + w[f"{name}_out_bias"]
