"""Optimizers and learning rates by name, from optax; the default is AdamW with the published settings."""

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rynnvla_jax.config import ConfigError, OptimizerConfig
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.errors import did_you_mean, listing

MUON_RMS = 0.2  # of Muon's updates, as AdamW's have, so that one learning rate fits both (arXiv 2502.16982)
EMA_RAMP = 10.0  # updates; the decay of the average is at most (1 + n) / (EMA_RAMP + n) after n updates


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate used at a step (0-based).

    "vla": linear from 0 over `warmup_steps` (may be a fraction), then half a cosine to `min_lr`; step 0 has rate 0.
    "action_vae": linear from `warmup_lr`, then half a cosine that is counted from the end of the warm-up and lasts
    `total_steps`; the whole curve lags one step, as published.
    The others rise linearly from 0 to `peak_lr` over `warmup_steps`; then "cosine" and "linear" fall to `min_lr` at the
    end of the run, "constant" stays, "wsd" stays and falls linearly to `min_lr` over the last `decay_share` of the run,
    and "rsqrt" falls with the square root of the step.

    Source: "vla" and "action_vae": the public training code's schedules (tests/golden/lr_schedules.json).
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

    published = {"vla": vla, "action_vae": action_vae}
    return published[c.schedule] if c.schedule in published else _after_warmup(c, total_steps)


def _after_warmup(c: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """A schedule of optax after a linear warm-up from 0."""
    warm = max(c.warmup_steps, 1.0)
    left = total_steps - c.warmup_steps
    decay = c.decay_share * total_steps
    later = {
        "cosine": lambda: optax.schedules.cosine_decay_schedule(c.peak_lr, left, c.min_lr / max(c.peak_lr, 1e-30)),
        "linear": lambda: optax.schedules.linear_schedule(c.peak_lr, c.min_lr, left),
        "constant": lambda: optax.schedules.constant_schedule(c.peak_lr),
        "wsd": lambda: optax.schedules.linear_schedule(c.peak_lr, c.min_lr, decay, transition_begin=left - decay),
        "rsqrt": lambda: lambda step: c.peak_lr * jnp.sqrt(warm / (warm + jnp.maximum(step, 0))),  # optax has none
    }[c.schedule]()
    rises = optax.schedules.linear_schedule(0.0, c.peak_lr, c.warmup_steps)
    return optax.schedules.join_schedules([rises, later], [c.warmup_steps]) if c.warmup_steps else later


def make_optimizer(
    config: OptimizerConfig, total_steps: int, untrained: tuple[str, ...] = (), axes: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config: clips by global norm, updates, scales by `rates`, and averages with `ema`.

    AdamW decays every parameter (norms, biases and embeddings too, as published) but those of `no_decay`. Lion's and
    AdamW's moments have the parameters' shapes. Adafactor has no first moment; its second moment is factored over the
    two largest axes, so that of a stack of layers each has its own; updates are not scaled by the weights' size, and
    clipped to an RMS of 1 over a whole stack. Muon orthogonalises the weight matrices of stacked layers, each layer's
    for itself, heads joined; their updates have AdamW's size. All else, embeddings and heads too, gets AdamW.

    `update` takes the learning rate as `rate`: an argument of the program, so that one program serves all schedules.
    Without it, the rate is that of the optimizer's own count of steps.

    Args:
      untrained: top-level parameter names that never receive a gradient; torch does not decay those, nor do we.
      axes: logical axes of the parameters (`params.axes`), which tell Muon what a matrix is.

    Raises:
      ConfigError: Muon, and no parameter is a stack of matrices.
    """
    planned = _with_schedule(config, schedule(config, total_steps), untrained, axes)

    def update(updates, state, params=None, *, rate=None, **_):
        given = planned if rate is None else _with_schedule(config, lambda count: rate, untrained, axes)
        return given.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(planned.init, update)


def _with_schedule(
    config: OptimizerConfig, rate: optax.Schedule, untrained: tuple[str, ...], axes: Mapping[str, Any] | None
) -> optax.GradientTransformation:
    c = config

    def decays(params):
        def one(path, _):
            name = path_string(path)
            return name.partition(".")[0] not in untrained and not _matches(name, c.no_decay)

        return jax.tree_util.tree_map_with_path(one, params)

    mask = decays if untrained or c.no_decay else None
    # Where optax decays nothing, or not all kinds of parameters alike: updates come with rate -1.
    decayed = optax.add_decayed_weights(-c.weight_decay, mask), optax.scale_by_schedule(rate)
    if c.name == "adamw":
        update = optax.adamw(rate, b1=c.beta1, b2=c.beta2, eps=c.eps, weight_decay=c.weight_decay, mask=mask)
    elif c.name == "lion":
        update = optax.lion(rate, b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=mask)
    elif c.name == "adafactor":
        update = optax.chain(optax.adafactor(multiply_by_parameter_scale=False), *decayed)
    else:
        options = {"eps": c.eps, "adam_b1": c.beta1, "adam_b2": c.beta2, "consistent_rms": MUON_RMS}
        muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=_matrices(axes or {}), **options)
        update = optax.chain(muon, *decayed)
    links = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
    links.append(_with_rates(update, c.rates) if c.rates else update)
    links += [average_weights(c.ema)] if c.ema else []
    return optax.chain(*links) if len(links) > 1 else links[0]


def _matrices(axes: Mapping[str, Any]) -> Any:
    """For Muon: the axes of each parameter that is a stack of matrices, one a layer; None for all others.

    A matrix joins the model's width ("embed") to all other axes together: heads and their dimensions are one side.
    """

    def one(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        if names[0] != "layers" or "embed" not in names or len(names) < 3:
            return None
        others = tuple(i for i, name in enumerate(names) if name not in ("layers", "embed"))
        return optax.contrib.MuonDimensionNumbers((names.index("embed"),), others)

    found = jax.tree.map(one, axes, is_leaf=lambda x: isinstance(x, tuple))
    if not jax.tree.leaves(found):
        raise ConfigError(
            "config.optimizer.name is 'muon', but this model has no stacked layers, whose matrices it is for; "
            "use adamw, adafactor or lion"
        )
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _with_rates(
    optimizer: optax.GradientTransformation, rates: tuple[tuple[str, float], ...]
) -> optax.GradientTransformation:
    """`optimizer` with the same state, whose updates are times the factor of the first pattern that matches their
    parameter's path."""

    def one(path, update):
        factor = next((factor for pattern, factor in rates if _matches(path_string(path), (pattern,))), 1.0)
        return update if factor == 1.0 else update * factor

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def describe(config: OptimizerConfig, total_steps: int) -> str:
    """The optimizer, the learning rate over the run, and what differs between parameters, in one line."""
    c, rate = config, schedule(config, total_steps)
    warm = min(math.ceil(c.warmup_steps), total_steps)
    at = {0: "at the start"} | ({warm: f"after {warm} updates"} if warm else {}) | {total_steps: "at the end"}
    rates = ", ".join(f"{float(rate(step)):.3g} {when}" for step, when in at.items())
    parts = [f"{c.name}, schedule {c.schedule}: learning rate {rates}", f"weight decay {c.weight_decay:g}"]
    parts[-1] += f" but for {', '.join(c.no_decay)}" if c.no_decay else ""
    parts += [f"rates {', '.join(f'{pattern} x {factor:g}' for pattern, factor in c.rates)}"] if c.rates else []
    parts += [f"average of the weights with {c.ema:g}"] if c.ema else []
    return ", ".join(parts)


def check_patterns(config: OptimizerConfig, params: Any) -> None:
    """Raises ConfigError when a pattern of `no_decay` or `rates` matches no parameter."""
    names = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for key, patterns in (("no_decay", config.no_decay), ("rates", [pattern for pattern, _ in config.rates])):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in names):
                hint = did_you_mean(pattern, names, otherwise=f" Parameters: {listing(names, 12)}.")
                told = f"optimizer.{key}: {pattern!r} matches no parameter"
                raise ConfigError(f"{told}; correct it or leave it out.{hint}")


def check_continues(saved: OptimizerConfig, config: OptimizerConfig, workdir: Path) -> None:
    """Raises ConfigError when the state that a run saved is not the state of this optimizer."""
    changes = [
        f"optimizer.{key} was {getattr(saved, key)!r} and is {getattr(config, key)!r}"
        for key, same in (
            ("name", saved.name == config.name),
            ("clip_norm", bool(saved.clip_norm) == bool(config.clip_norm)),
            ("ema", bool(saved.ema) == bool(config.ema)),
        )
        if not same
    ]
    if changes:
        raise ConfigError(
            f"the optimizer's state in {workdir} does not fit: {' and '.join(changes)}; set it back, or start from "
            "these weights with config.init_from.path in another --workdir"
        )


class AverageState(NamedTuple):
    """State of `average_weights`."""

    steps: jax.Array  # int32: updates so far
    average: Any  # like the parameters, float32


def average_weights(decay: float) -> optax.GradientTransformation:
    """The last link of a chain: passes updates on, and keeps an exponential moving average of the updated weights.

    After n updates the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights, so that it forgets the
    initial ones in short runs too.

    Source: TensorFlow's `ExponentialMovingAverage` with `num_updates`, also in diffusers and timm.
    """

    def init(params):
        # Copies: the step gives away both weights and state, which must not be one array.
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AverageState(jnp.zeros((), jnp.int32), average)

    def update(updates, state, params):
        steps = optax.safe_increment(state.steps)
        n = steps.astype(jnp.float32)
        share = 1.0 - jnp.minimum(decay, (1.0 + n) / (EMA_RAMP + n))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + share * (p.astype(jnp.float32) - a), state.average, new)
        return updates, AverageState(steps, average)

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: Any, params: Any) -> Any:
    """The average of the weights that the optimizer keeps (`optimizer.ema`), float32 and placed as `params`.

    `params` themselves where it keeps none. For arrays, outside of a jitted function.
    """
    is_average = lambda x: isinstance(x, AverageState)  # noqa: E731
    for state in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
        return jax.tree.map(lambda a, p: jax.device_put(a, p.sharding), state.average, params)
    return params
