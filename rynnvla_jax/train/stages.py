"""What a stage is: the model it trains, its loss on a batch, and the frozen models it needs.

The stages of the curriculum differ in data and in these values only; the loop (`train.py`) is one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models.action_vae import UNTRAINED, ActionVAE
from rynnvla_jax.models.vla import VLA, loss_counts
from rynnvla_jax.models.vqgan import VQGAN

FRAMES_AT_ONCE = 8  # of a device, in the VQGAN's encoder

Batch = Mapping[str, jax.Array]
Counts = dict[str, jax.Array]


@dataclass(frozen=True)
class Frozen:
    """Models that a stage uses and never trains; a pytree, so that it enters the jitted step as data."""

    vqgan: Any = None  # parameters of the encoder and the codebook
    action_vae: Any = None  # parameters
    code_to_token: Any = None  # int32 [codes]


jax.tree_util.register_dataclass(Frozen, ["vqgan", "action_vae", "code_to_token"], [])


@dataclass(frozen=True)
class Stage:
    """`loss(model, frozen, batch, counts, key, config)` -> (scalar, metrics), a mean over the global batch.

    `counts(batch)` gives the denominators of the whole batch before it is cut into micro-batches.
    """

    kind: str  # of model: vla | action_vae | vqgan
    model_config: Callable[[TrainConfig], Any]
    build: Callable[[TrainConfig, nnx.Rngs], nnx.Module]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    counts: Callable[[Batch], Counts]
    frozen: Callable[[TrainConfig], tuple[str, ...]] = lambda config: ()  # names in `Frozen`
    untrained: tuple[str, ...] = ()  # top-level parameters without a gradient


def build_vla(config: TrainConfig, rngs: nnx.Rngs) -> VLA:
    dtype = jnp.dtype(config.compute_dtype)
    return VLA(config.vla, rngs=rngs, dtype=dtype, remat=config.remat, attention=config.attention)


def build_action_vae(config: TrainConfig, rngs: nnx.Rngs) -> ActionVAE:
    return ActionVAE(config.action_vae_model, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))


def build_vqgan(config: TrainConfig, rngs: nnx.Rngs) -> VQGAN:
    return VQGAN(config.vqgan_model, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))


def vla_loss(model: VLA, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig):
    """Frames to codes, action chunks to embeddings, then the losses of `VLA.loss`."""
    batch = action_targets(frames_to_tokens(batch, frozen, config), frozen, config)
    return model.loss(
        batch,
        counts,
        key=key,
        chunk=config.loss_chunk,
        z_loss_weight=config.z_loss_weight,
        action_loss_weight=config.action_loss_weight,
    )


def action_vae_loss(
    model: ActionVAE, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig
):
    """Masked L1 + KL with a sampled latent."""
    actions = batch["actions"]
    noise_key, dropout_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], config.action_vae_model.latent))
    total, metrics = model.loss(actions, batch["actions_pad"], noise, dropout_key)
    share = actions.shape[0] / counts["rows"]
    return total * share, jax.tree.map(lambda m: m * share, metrics)


def vqgan_loss(model: VQGAN, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig):
    """Reconstruction + codebook."""
    images = to_unit_range(batch["images"])
    total, metrics = model.loss(images)
    share = images.shape[0] / counts["rows"]
    return total * share, jax.tree.map(lambda m: m * share, metrics)


def count_rows(batch: Batch) -> Counts:
    """Rows of the whole batch."""
    return {"rows": jnp.float32(len(next(iter(batch.values()))))}


def frames_to_tokens(batch: Batch, frozen: Frozen, config: TrainConfig) -> dict[str, jax.Array]:
    """Encodes `front` (and `wrist`) uint8 [B,T,H,W,3] and puts the codes where `tokens` holds placeholders.

    A batch without pixels (codes made ahead) passes unchanged. Placeholders are -(1+k), k counting a row's
    codes: all front frames, then all wrist frames (`sequence.code_placeholders`).
    """
    batch = dict(batch)
    if "front" not in batch:
        return batch
    graphdef = vqgan_graph(config, decoder=False)

    def codes(params, frames):
        """Every device encodes its own rows' frames, a few at a time: activations are large."""
        pixels = frames.reshape(-1, *frames.shape[2:])
        encode = nnx.merge(graphdef, params).codes
        found = jax.lax.map(lambda x: encode(to_unit_range(x[None]))[0], pixels, batch_size=FRAMES_AT_ONCE)
        return found.reshape(frames.shape[0], -1)

    frames = jnp.concatenate([batch.pop(name) for name in ("front", "wrist") if name in batch], axis=1)
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
    """What the action head says, [B, outputs] -> normalised relative actions [B, C, A]; of embeddings their mean."""
    if config.vla.actions == "raw":
        return predicted.reshape(len(predicted), config.data.chunk, -1)
    mean, _ = jnp.split(predicted, 2, axis=-1)
    return nnx.merge(action_vae_graph(config), frozen.action_vae).decode(mean)[0]


def vqgan_graph(config: TrainConfig, decoder: bool = True) -> nnx.GraphDef:
    """Graph definition of the frozen VQGAN. float32 always: a code must not depend on the compute dtype."""
    return nnx.split(nnx.eval_shape(lambda: VQGAN(config.vqgan_model, rngs=nnx.Rngs(0), decoder=decoder)))[0]


def without_decoder(vqgan: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a VQGAN that turn frames into codes, which is all that `Frozen` holds of it."""
    return {name: vqgan[name] for name in ("encoder", "quant_conv", "codebook")}


def action_vae_graph(config: TrainConfig) -> nnx.GraphDef:
    """Graph definition of the frozen ActionVAE, float32."""
    return nnx.split(nnx.eval_shape(lambda: ActionVAE(config.action_vae_model, rngs=nnx.Rngs(0))))[0]


def to_unit_range(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1], as `images.normalize` does on the host."""
    return (pixels.astype(jnp.float32) / 255.0 - 0.5) / 0.5


ACTION_VAE = Stage(
    "action_vae",
    lambda c: c.action_vae_model,
    build_action_vae,
    action_vae_loss,
    count_rows,
    untrained=UNTRAINED,
)
VQ = Stage("vqgan", lambda c: c.vqgan_model, build_vqgan, vqgan_loss, count_rows)
VIDEO = Stage("vla", lambda c: c.vla, build_vla, vla_loss, loss_counts, frozen=lambda c: ("vqgan",))
ACTIONS = Stage(
    "vla",
    lambda c: c.vla,
    build_vla,
    vla_loss,
    loss_counts,
    frozen=lambda c: ("vqgan",) if c.vla.actions == "raw" else ("vqgan", "action_vae"),
)

STAGES = {"action_vae": ACTION_VAE, "vqgan": VQ, "video": VIDEO, "trajectory": ACTIONS, "robot": ACTIONS}
