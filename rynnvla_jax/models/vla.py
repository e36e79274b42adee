"""The vision-language-action model: Chameleon decoder, state projection, action head, losses.

Source: RynnVLA-001, arXiv 2509.15212, section 3. One embedding in the sequence carries the state;
the hidden state just before each `<action>` placeholder regresses the ActionVAE embedding of the
chunk that starts there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.config import TrainConfig, VLAConfig
from rynnvla_jax.models.layers import Linear
from rynnvla_jax.models.lora import adapters
from rynnvla_jax.models.losses import TokenSums, chunked_cross_entropy
from rynnvla_jax.models.params import normal
from rynnvla_jax.models.transformer import Transformer
from rynnvla_jax.vocabulary import KINDS

MLP_WIDTHS = (2048, 1024, 512, 256)


class VLA(nnx.Module):
    """See the module docstring."""

    def __init__(
        self,
        config: VLAConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        sums: DTypeLike = jnp.float32,
        lora: nnx.Dict | None = None,
    ):
        """`lora`: adapters of the transformer (`lora.adapters`)."""
        D = config.transformer.width
        self.config, self.dtype = config, dtype
        self.transformer = Transformer(
            config.transformer, rngs=rngs, dtype=dtype, remat=remat, attention=attention, sums=sums, lora=lora
        )
        if not config.acts:  # stage 1: tokens only
            return
        if config.state_dim:
            self.state_projection = Linear(normal(rngs, (config.state_dim, D), config.state_dim**-0.5, (None, "embed")))
        widths = (D, *(MLP_WIDTHS if config.action_head == "MLP" else ()), config.action_outputs)
        self.action_head = nnx.Dict(
            {
                f"layer_{i}": Linear(normal(rngs, (a, b), a**-0.5, ("embed", None)))
                for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            }
        )

    def embed(
        self,
        tokens: Int[Array, "B S"],
        state: Float[Array, "B T N"] | None = None,
        state_positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Token embeddings, with the projected (normalised) state at `state_positions`; -1 there is absent. Without
        `state` the state's token stands for itself."""
        x = self.transformer.embed_tokens(tokens)
        if state is None or state_positions is None:
            return x
        projected = self.state_projection(state.astype(self.dtype))
        rows = jnp.arange(tokens.shape[0])[:, None]
        # Past the end, which "drop" leaves out: -1 itself would be the last token.
        positions = jnp.where(state_positions < 0, tokens.shape[1], state_positions)
        return x.at[rows, positions].set(projected, mode="drop")

    def predict_action(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
        """ActionVAE embedding (mean and log-variance) from the hidden state before `<action>`, float32."""
        layers = list(self.action_head.values())
        for layer in layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return layers[-1](hidden).astype(jnp.float32)

    def hidden(self, batch: Mapping[str, Array], key: jax.Array | None = None) -> Float[Array, "B S D"]:
        """Final hidden states of a batch: `tokens`; with robots `state`, `state_positions`; when packed `positions`,
        `segments`."""
        x = self.embed(batch["tokens"], batch.get("state"), batch.get("state_positions"))
        return self.transformer(x, key=key, positions=batch.get("positions"), segments=batch.get("segments"))[0]

    def action_latent(
        self,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        state: Float[Array, "B T N"] | None,
        state_positions: Int[Array, "B T"],
    ) -> Float[Array, "B N"]:
        """Inference: one forward pass, the action head at the last prompt position only, no LM head.

        Args:
          tokens: prompts, padded on the right.
          lengths: true length of each prompt.
        """
        x = self.embed(tokens, state, state_positions)
        hidden, _ = self.transformer(x)
        return self.predict_action(hidden[jnp.arange(tokens.shape[0]), lengths - 1])

    def token_sums(
        self, hidden: Float[Array, "B S D"], tokens: Int[Array, "B S"], loss_mask: Bool[Array, "B S"], chunk: int
    ) -> TokenSums:
        """Sums over the tokens that `loss_mask` marks; the first of a row has none before it that predicts it."""
        # Shifted targets instead of shorter hidden states: the sequence keeps a length that the mesh divides.
        weights = loss_mask.at[:, 0].set(False).astype(jnp.float32)
        return chunked_cross_entropy(
            hidden,
            self.transformer.head[...],
            jnp.roll(tokens, -1, axis=1),
            jnp.roll(weights, -1, axis=1),
            self.transformer.allowed(),
            chunk,
        )

    def actions_at(self, hidden: Float[Array, "B S D"], positions: Int[Array, "B T"]) -> Float[Array, "B T N"]:
        """`predict_action` before the `<action>` tokens at `positions`; anything where these are -1."""
        before = jnp.maximum(positions - 1, 0)
        return self.predict_action(jnp.take_along_axis(hidden, before[..., None], axis=1))

    def loss(
        self,
        batch: Mapping[str, Array],
        counts: Mapping[str, Array],
        *,
        key: jax.Array | None = None,
        chunk: int = 512,
        z_loss_weight: float = 1e-5,
        action_loss_weight: float = 1.0,
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Cross-entropy + L1 on action embeddings + z-loss, each a mean over the *global* batch.

        Args:
          batch: `tokens` int32 [B,S], `loss_mask` bool [B,S]; with actions also `state` [B,T,N],
            `state_positions`, `action_positions` int32 [B,T] (-1 absent) and `action_targets` [B,T,64].
            With `kinds` int32 [B,S], indices of `vocabulary.KINDS`, the cross-entropy is also told by kind of token.
          counts: `loss_counts` of the whole batch, so that micro-batches add up to the exact mean.

        Returns:
          (loss, metrics); `metrics["parts"]`: (sum, count) by name, of means that `step.gradients` divides;
          `metrics["rows"]`: (sums [B], counts [B]) by name, of the rows.

        The public code drops the action loss when `z_loss_weight` is 0; here the parts are independent.
        """
        hidden = self.hidden(batch, key)
        sums = self.token_sums(hidden, batch["tokens"], batch["loss_mask"], chunk)
        tokens = counts["tokens"]
        metrics: dict[str, Any] = {"cross_entropy": sums.cross_entropy / tokens, "z_loss": sums.z / tokens}
        metrics["token_accuracy"] = sums.correct / tokens
        total = metrics["cross_entropy"] + z_loss_weight * metrics["z_loss"]
        mask = batch["loss_mask"].at[:, 0].set(False).astype(jnp.float32)
        trained = jnp.roll(mask, -1, axis=1)
        metrics["rows"] = {"cross_entropy": (jnp.sum(sums.losses * trained, axis=1), jnp.sum(trained, axis=1))}
        if "kinds" in batch:
            kinds = jnp.roll(batch["kinds"], -1, axis=1)
            of_kind = {name: jnp.where(kinds == i, trained, 0.0) for i, name in enumerate(KINDS)}
            metrics["parts"] = {
                f"cross_entropy/{name}": jnp.stack([jnp.sum(sums.losses * mask), jnp.sum(mask)])
                for name, mask in of_kind.items()
            }
        if "action_targets" in batch:
            positions = batch["action_positions"]
            error = jnp.abs(self.actions_at(hidden, positions) - batch["action_targets"].astype(jnp.float32))
            present = (positions > 0)[..., None]
            error = jnp.where(present, error, 0.0)
            metrics["action_l1"] = jnp.sum(error) / (counts["actions"] * error.shape[-1])
            each = jnp.sum(present, axis=(1, 2)) * float(error.shape[-1])
            metrics["rows"]["action_l1"] = jnp.sum(error, axis=(1, 2)), each
            total = total + action_loss_weight * metrics["action_l1"]
        return total, metrics


def loss_counts(batch: Mapping[str, Array]) -> dict[str, Array]:
    """Denominators of the losses of a whole batch: trained tokens and present action embeddings (at least 1)."""
    counts = {"tokens": jnp.maximum(batch["loss_mask"][:, 1:].sum(), 1).astype(jnp.float32)}
    if "action_positions" in batch:
        counts["actions"] = jnp.maximum((batch["action_positions"] > 0).sum(), 1).astype(jnp.float32)
    return counts


def token_counts(batch: Mapping[str, Array]) -> dict[str, Any]:
    """Metrics that tell how much of a batch is work: padding is none, nor is attention across packed clips.

    `tokens`: those that are no padding. `attention_pairs`: of one of these and one that it attends to, itself included.
    `parts`, as in `VLA.loss`: the shares of all positions that are trained and that are padding.
    """
    tokens = batch["tokens"]
    places = jnp.arange(tokens.shape[1])
    if "segments" in batch:
        real, places = batch["segments"] > 0, batch["positions"]
    else:  # padding is token 0 on the right, which a text begins with, too
        real = places <= jnp.max(jnp.where(tokens != 0, places, -1), axis=1, keepdims=True)
    count, every = jnp.sum(real, dtype=jnp.float32), jnp.float32(tokens.size)
    trained = jnp.sum(batch["loss_mask"][:, 1:], dtype=jnp.float32)
    return {
        "tokens": count,
        "attention_pairs": jnp.sum(jnp.where(real, places + 1, 0), dtype=jnp.float32),
        "parts": {
            "trained_share": jnp.stack([trained, every]),
            "padding_share": jnp.stack([every - count, every]),
        },
    }


def build_vla(config: TrainConfig, rngs: nnx.Rngs, lora: nnx.Dict | None = None) -> VLA:
    """The model of a config, whole: what `finetune` adds during training is `lora`."""
    dtype = jnp.dtype(config.compute_dtype)
    sums = jnp.dtype(config.gradient_sums)
    return VLA(config.vla, rngs=rngs, dtype=dtype, remat=config.remat, attention=config.attention, sums=sums, lora=lora)


def build_adapted_vla(config: TrainConfig, rngs: nnx.Rngs) -> VLA:
    """The model as it trains: with the adapters of `finetune.lora`."""
    return build_vla(config, rngs, adapters(config.vla.transformer, config.finetune.lora, rngs))
