"""Models that the VLA uses and never trains: the VQGAN, which turns frames into codes, and the ActionVAE."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import TrainConfig, VQGANConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.models.vqgan import VQGAN

FRAMES_AT_ONCE = 8  # of a device, in the VQGAN's encoder

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Frozen:
    """What a stage uses and never trains; a pytree, so that it enters the jitted step as data."""

    vqgan: Any = None  # parameters of the encoder and the codebook
    action_vae: Any = None  # parameters
    code_to_token: Any = None  # int32 [codes]
    kinds: Any = None  # int32 [tokens of the vocabulary]: `Vocabulary.kinds`
    base: Any = None  # parameters of the model that trains which do not (`config.finetune`), cut as they are there


jax.tree_util.register_dataclass(Frozen, ["vqgan", "action_vae", "code_to_token", "kinds", "base"], [])


def frames_to_tokens(batch: Batch, frozen: Frozen, config: TrainConfig) -> dict[str, jax.Array]:
    """Encodes the frames of every view, uint8 [B,T,H,W,3], and puts the codes where `tokens` holds placeholders.

    A batch without pixels (codes made ahead) passes unchanged. Placeholders are -(1+k), k counting a row's
    codes: all frames of the first view, then all of the next (`sequence.code_placeholders`).
    """
    batch = dict(batch)
    if "front" not in batch:
        return batch
    graphdef = vqgan_graph(config.vqgan_model, decoder=False)

    def codes(params, frames):
        """Every device encodes its own rows' frames, a few at a time: activations are large."""
        pixels = frames.reshape(-1, *frames.shape[2:])
        vqgan = nnx.merge(graphdef, params)
        found = jax.lax.map(lambda x: vqgan.frames_to_codes(x[None])[0], pixels, batch_size=FRAMES_AT_ONCE)
        return found.reshape(frames.shape[0], -1)

    frames = jnp.concatenate([batch.pop(view) for view in config.sequence.views], axis=1)
    encode = mesh_lib.shard_map(codes, ((), ("batch",)), ("batch",))
    image_tokens = frozen.code_to_token[encode(frozen.vqgan, frames)]
    tokens = batch["tokens"]
    index = jnp.maximum(-tokens - 1, 0)
    batch["tokens"] = jnp.where(tokens < 0, jnp.take_along_axis(image_tokens, index, axis=1), tokens)
    return batch


def action_targets(batch: Batch, frozen: Frozen, config: TrainConfig) -> dict[str, jax.Array]:
    """Replaces `actions` [B,T,C,A] by `action_targets`: the ActionVAE encoder's mean and log-variance [B,T,64].

    Raw actions are their own targets, [B,T,C*A].
    """
    batch = dict(batch)
    if "actions" not in batch:
        return batch
    actions, pad = batch.pop("actions"), batch.pop("actions_pad")
    if config.vla.actions == "raw":
        batch["action_targets"] = actions.reshape(*actions.shape[:2], -1).astype(jnp.float32)
        return batch
    vae = nnx.merge(action_vae_graph(config), frozen.action_vae)
    latent = vae.encode(actions.reshape(-1, *actions.shape[2:]), pad.reshape(-1, pad.shape[-1]))
    batch["action_targets"] = jax.lax.stop_gradient(latent.reshape(*actions.shape[:2], -1).astype(jnp.float32))
    return batch


def predicted_actions(predicted: jax.Array, frozen: Frozen, config: TrainConfig) -> jax.Array:
    """Outputs of the action head [B, outputs] -> normalised relative actions [B, C, A]; uses the mean of embeddings."""
    if config.vla.actions == "raw":
        return predicted.reshape(len(predicted), config.data.chunk, -1)
    mean, _ = jnp.split(predicted, 2, axis=-1)
    return nnx.merge(action_vae_graph(config), frozen.action_vae).decode(mean)[0]


def vqgan_graph(config: VQGANConfig, decoder: bool = True) -> nnx.GraphDef:
    """Graph definition of a frozen VQGAN. float32 always: a code must not depend on the compute dtype."""
    return nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0), decoder=decoder)))[0]


def without_decoder(vqgan: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a VQGAN that encode frames; `Frozen` contains only these."""
    return {name: vqgan[name] for name in ("encoder", "quant_conv", "codebook")}


def action_vae_graph(config: TrainConfig) -> nnx.GraphDef:
    """Graph definition of the frozen ActionVAE, float32."""
    return nnx.split(nnx.eval_shape(lambda: ActionVAE(config.action_vae_model, rngs=nnx.Rngs(0))))[0]
