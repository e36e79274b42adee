"""The model and the loss of each stage (`rynnvla_jax.stage`), in JAX.

The stages of the curriculum differ only in these values and in their data; the training loop (`loop.py`) is the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.models.action_vae import UNTRAINED, ActionVAE
from rynnvla_jax.models.frozen import Frozen, action_targets, frames_to_tokens
from rynnvla_jax.models.vla import VLA, build_vla, loss_counts, token_counts
from rynnvla_jax.models.vqgan import VQGAN, to_unit_range

Batch = Mapping[str, jax.Array]
Counts = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """`loss(model, frozen, batch, counts, key, config)` -> (scalar, metrics), a mean over the global batch.

    `counts(batch)` gives the denominators of the whole batch before it is cut into micro-batches.
    """

    build: Callable[[TrainConfig, nnx.Rngs], nnx.Module]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    counts: Callable[[Batch], Counts]
    untrained: tuple[str, ...] = ()  # top-level parameters without a gradient


def build_action_vae(config: TrainConfig, rngs: nnx.Rngs) -> ActionVAE:
    return ActionVAE(config.action_vae_model, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))


def build_vqgan(config: TrainConfig, rngs: nnx.Rngs) -> VQGAN:
    return VQGAN(config.vqgan_model, rngs=rngs, dtype=jnp.dtype(config.compute_dtype))


def vla_loss(model: VLA, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig):
    """Frames to codes, action chunks to embeddings, then the losses of `VLA.loss`."""
    batch = action_targets(frames_to_tokens(batch, frozen, config), frozen, config)
    if frozen.kinds is not None:
        batch = {**batch, "kinds": frozen.kinds[batch["tokens"]]}
    total, metrics = model.loss(
        batch,
        counts,
        key=key,
        chunk=config.loss_chunk,
        z_loss_weight=config.z_loss_weight,
        action_loss_weight=config.action_loss_weight,
    )
    more = token_counts(batch)
    return total, {**more, **metrics, "parts": {**more["parts"], **metrics.get("parts", {})}}


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
    """The number of rows of the whole batch."""
    return {"rows": jnp.float32(len(next(iter(batch.values()))))}


VLA_OBJECTIVE = Objective(build_vla, vla_loss, loss_counts)
OBJECTIVES = {
    "vqgan": Objective(build_vqgan, vqgan_loss, count_rows),
    "action_vae": Objective(build_action_vae, action_vae_loss, count_rows, untrained=UNTRAINED),
    "video": VLA_OBJECTIVE,
    "trajectory": VLA_OBJECTIVE,
    "robot": VLA_OBJECTIVE,
}
