"""AdamW with the published settings and schedules."""

import jax
import jax.numpy as jnp
import optax

from rynnvla_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate used at a step (0-based).

    "vla": linear from 0 over `warmup_steps` (may be a fraction), then half a cosine to `min_lr`; step 0 has rate 0.
    "action_vae": linear from `warmup_lr`, then half a cosine that is counted from the end of the warm-up and lasts
    `total_steps`; the whole curve lags one step, as published.

    Source: the public training code's schedules (tests/golden/lr_schedules.json).
    """
    c = config

    def cosine(remaining):  # from 1 to 0; squared sine is 0.5 * (1 - cos) without its cancellation near the end
        return c.min_lr + (c.peak_lr - c.min_lr) * jnp.sin(0.5 * jnp.pi * jnp.clip(remaining, 0.0, 1.0)) ** 2

    def vla(step):
        step = jnp.asarray(step, jnp.float32)
        warm = c.peak_lr * step / max(c.warmup_steps, 1e-9)  # a run may have no warm-up; `where` takes the other branch
        decay = cosine((total_steps - step) / max(total_steps - c.warmup_steps, 1e-9))
        return jnp.where(step < c.warmup_steps, warm, decay)

    def action_vae(step):
        step = jnp.maximum(jnp.asarray(step, jnp.float32) - 1.0, 0.0)
        warm = c.warmup_lr + step * (c.peak_lr - c.warmup_lr) / max(c.warmup_steps, 1e-9)
        return jnp.where(step < c.warmup_steps, warm, cosine((total_steps + c.warmup_steps - step) / total_steps))

    return {"vla": vla, "action_vae": action_vae}[c.schedule]


def make_optimizer(
    config: OptimizerConfig, total_steps: int, untrained: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """AdamW on every parameter (norms, biases and embeddings decay too, as published), clipped by global norm.

    Args:
      untrained: top-level parameter names that never receive a gradient; torch does not decay those, nor do we.
    """
    c = config

    def decays(params):
        return {name: jax.tree.map(lambda _, on=name not in untrained: on, v) for name, v in params.items()}

    adamw = optax.adamw(
        schedule(c, total_steps),
        b1=c.beta1,
        b2=c.beta2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=decays if untrained else None,
    )
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw) if c.clip_norm else adamw
