"""The model and the loss of each stage (`rynnvla_jax.stage`), in JAX.

The stages of the curriculum differ only in these values and in their data; the training loop (`loop.py`) is the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models.action_vae import UNTRAINED, ActionVAE
from rynnvla_jax.models.frozen import Frozen, action_targets, frames_to_tokens, predicted_actions
from rynnvla_jax.models.vla import VLA, build_adapted_vla, loss_counts, token_counts
from rynnvla_jax.models.vqgan import VQGAN, nearest_code, to_unit_range

Batch = Mapping[str, jax.Array]
Counts = dict[str, jax.Array]
Rows = Mapping[str, tuple[jax.Array, jax.Array]]


class Measured(NamedTuple):
    """What a batch of held-out data gives, of the rows that are `real`."""

    means: dict[str, tuple[jax.Array, jax.Array]]  # name: (sum, number of what is summed), float32
    chunks: jax.Array | None = None  # [B, N, C, A] normalised relative actions, as a policy would make them
    present: jax.Array | None = None  # bool [B, N]: where there is such a chunk
    codes: jax.Array | None = None  # float32 [codes]: how often each was used


@dataclass(frozen=True)
class Objective:
    """`loss(model, frozen, batch, counts, key, config)` -> (scalar, metrics), a mean over the global batch.

    `counts(batch)` gives the denominators of the whole batch before it is cut into micro-batches.
    `measure(model, frozen, batch, config)` evaluates, without dropout and noise, a batch of `Loader.fixed` whose frames
    are tokens already. `predict_codes(model, frozen, batch, rows)` gives the codes of frames that are drawn of such a
    batch.
    """

    build: Callable[[TrainConfig, nnx.Rngs], nnx.Module]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    counts: Callable[[Batch], Counts]
    measure: Callable[..., Measured] | None = None
    predict_codes: Callable[..., jax.Array] | None = None
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
    more, rows = token_counts(batch), metrics.pop("rows")
    parts = {**more["parts"], **metrics.get("parts", {})}
    return total, {**more, **metrics, "parts": parts, **by_source(rows, batch, config)}


def by_source(rows: Rows, batch: Batch, config: TrainConfig) -> dict[str, dict[str, jax.Array]]:
    """{"by_source": values [sources] by name} where a batch tells its rows' sources: the number of rows, and of each of
    `rows`, (sums [B], counts [B]) by name, both sums. They add up over micro-batches and steps."""
    if "source" not in batch:
        return {}
    of = batch["source"][:, None] == jnp.arange(len(config.data.mixture))  # [B, sources]
    found = {"rows": jnp.sum(of, axis=0, dtype=jnp.float32)}
    for name, pair in rows.items():
        sums, counts = (jnp.sum(jnp.where(of, x[:, None], 0.0), axis=0) for x in pair)
        found |= {f"{name}/sum": sums, f"{name}/count": counts}
    return {"by_source": found}


def measure_vla(model: VLA, frozen: Frozen, batch: Batch, config: TrainConfig) -> Measured:
    """Cross-entropy and accuracy of tokens, L1 on action embeddings at every frame, and the chunk at each clip's first
    frame, before which the model has seen what a robot's policy sees."""
    real, batch = batch["real"], action_targets(batch, frozen, config)
    hidden = model.hidden(batch)
    mask = batch["loss_mask"] & real[:, None]
    sums, tokens = model.token_sums(hidden, batch["tokens"], mask, config.loss_chunk), mask[:, 1:].sum()
    means = {"cross_entropy": (sums.cross_entropy, tokens), "token_accuracy": (sums.correct, tokens)}
    if "action_targets" not in batch:
        return Measured(means)
    positions = jnp.where(real[:, None], batch["action_positions"], -1)
    predicted, present = model.actions_at(hidden, positions), positions > 0
    error = jnp.where(present[..., None], jnp.abs(predicted - batch["action_targets"]), 0.0)
    means["action_l1"] = error.sum(), present.sum() * error.shape[-1]
    first = slice(None, None, config.sequence.num_frames)
    chosen = predicted[:, first]
    chunks = predicted_actions(chosen.reshape(-1, chosen.shape[-1]), frozen, config)
    return Measured(means, chunks.reshape(*chosen.shape[:2], *chunks.shape[1:]), present[:, first])


def predict_codes(model: VLA, frozen: Frozen, batch: Batch, rows: int) -> jax.Array:
    """The likeliest image code at each place of the first `rows` rows, after all that was recorded before it, int32
    [rows, S]; only where there is an image code it means something."""
    hidden = mesh_lib.constrain(model.hidden(batch)[:rows], None, None, None)
    head = model.transformer.head[...][:, frozen.code_to_token].astype(hidden.dtype)

    def likeliest(row: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.matmul(row, head, preferred_element_type=jnp.float32), axis=-1).astype(jnp.int32)

    return jnp.roll(jax.lax.map(likeliest, hidden), 1, axis=1)  # row by row: logits of all would take gigabytes


def measure_action_vae(model: ActionVAE, frozen: Frozen, batch: Batch, config: TrainConfig) -> Measured:
    """L1, KL divergence and chunks of the latents' means."""
    real, actions = batch["real"], batch["actions"]
    mean, log_variance = jnp.split(model.encode(actions, batch["actions_pad"]), 2, axis=-1)
    chunks, _ = model.decode(mean)
    kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
    valid = (real[:, None] & ~batch["actions_pad"])[..., None]
    error = jnp.where(valid, jnp.abs(actions - chunks), 0.0)
    means = {"l1": (error.sum(), valid.sum() * actions.shape[-1]), "kl": (jnp.sum(kl * real), real.sum())}
    return Measured(means, chunks[:, None], real[:, None])


def measure_vqgan(model: VQGAN, frozen: Frozen, batch: Batch, config: TrainConfig) -> Measured:
    """Reconstruction (L1 + L2), the codebook's distance (L2), and the codes that were used."""
    real, images = batch["real"], to_unit_range(batch["images"])
    z = model.encode(images).astype(jnp.float32)
    codes = nearest_code(z, model.codebook[...])
    chosen = jnp.take(model.codebook[...], codes, axis=0)
    error = model.decode(chosen) - images
    each = {
        "reconstruction": jnp.abs(error) + error**2,
        "codebook": (1 + config.vqgan_model.commitment) * (chosen - z) ** 2,
    }
    means = {name: (jnp.sum(x.mean((1, 2, 3)) * real), real.sum()) for name, x in each.items()}
    used = jnp.zeros((config.vqgan_model.num_codes,)).at[codes].add(real[:, None, None].astype(jnp.float32))
    return Measured(means, codes=used)


def action_vae_loss(
    model: ActionVAE, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig
):
    """Masked L1 + KL with a sampled latent."""
    actions = batch["actions"]
    noise_key, dropout_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (actions.shape[0], config.action_vae_model.latent))
    total, metrics = model.loss(actions, batch["actions_pad"], noise, dropout_key)
    share, rows = actions.shape[0] / counts["rows"], metrics.pop("rows")
    return total * share, jax.tree.map(lambda m: m * share, metrics) | by_source(rows, batch, config)


def vqgan_loss(model: VQGAN, frozen: Frozen, batch: Batch, counts: Counts, key: jax.Array, config: TrainConfig):
    """Reconstruction + codebook."""
    images = to_unit_range(batch["images"])
    total, metrics = model.loss(images)
    share, rows = images.shape[0] / counts["rows"], metrics.pop("rows")
    return total * share, jax.tree.map(lambda m: m * share, metrics) | by_source(rows, batch, config)


def count_rows(batch: Batch) -> Counts:
    """The number of rows of the whole batch."""
    return {"rows": jnp.float32(len(next(iter(batch.values()))))}


VLA_OBJECTIVE = Objective(build_adapted_vla, vla_loss, loss_counts, measure_vla, predict_codes)
OBJECTIVES = {
    "vqgan": Objective(build_vqgan, vqgan_loss, count_rows, measure_vqgan),
    "action_vae": Objective(build_action_vae, action_vae_loss, count_rows, measure_action_vae, untrained=UNTRAINED),
    "video": VLA_OBJECTIVE,
    "trajectory": VLA_OBJECTIVE,
    "robot": VLA_OBJECTIVE,
}
