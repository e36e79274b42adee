"""Optimizers and schedules by name, groups of parameters, the average of weights, and where the state lies."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rynnvla_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.train import optimizer as optimizers
from rynnvla_jax.train.optimizer import make_optimizer, schedule
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import abstract_state, fresh_state, make_now, make_step, state_shardings, with_counts
from tests.distributed.test_sharding import CONFIG

NAMES = ("adamw", "adafactor", "lion", "muon")


def rates_at(steps, total=100, **keys):
    rate = schedule(OptimizerConfig(peak_lr=1.0, min_lr=0.1, **keys), total)
    return [round(float(rate(step)), 4) for step in steps]


def test_schedules_by_name():
    half = 0.1 + 0.9 / 2
    assert rates_at((0, 5, 10, 55, 100), schedule="cosine", warmup_steps=10.0) == [0, 0.5, 1, half, 0.1]
    assert rates_at((0, 5, 10, 55, 100), schedule="linear", warmup_steps=10.0) == [0, 0.5, 1, half, 0.1]
    assert rates_at((0, 5, 10, 100, 900), schedule="constant", warmup_steps=10.0) == [0, 0.5, 1, 1, 1]
    assert rates_at((5, 10, 80, 90, 100), schedule="wsd", warmup_steps=10.0) == [0.5, 1, 1, half, 0.1]
    assert rates_at((5, 10, 40, 90), schedule="rsqrt", warmup_steps=10.0) == [0.5, 1, 0.5, round(1 / 3, 4)]
    for name in ("cosine", "linear", "constant", "wsd", "rsqrt"):
        assert rates_at((0,), schedule=name, warmup_steps=0.0) == [1], name
    np.testing.assert_allclose(
        rates_at(range(100), schedule="cosine", warmup_steps=7.0),
        rates_at(range(100), schedule="vla", warmup_steps=7.0),
        atol=2e-4,
    )


def test_the_last_steps_of_wsd_are_a_share_of_the_run():
    assert rates_at((49, 50, 75, 100), schedule="wsd", warmup_steps=0.0, decay_share=0.5) == [1, 1, 0.55, 0.1]
    assert rates_at((0, 99), schedule="wsd", warmup_steps=0.0, decay_share=0.0) == [1, 1]


def test_the_start_says_what_the_learning_rate_will_be():
    rates = (("action_head.*", 10.0),)
    config = OptimizerConfig(
        name="lion", peak_lr=1e-3, min_lr=1e-5, schedule="wsd", warmup_steps=2.5, no_decay=("*norm*",), rates=rates
    )
    assert optimizers.describe(config, 100) == (
        "lion, schedule wsd: learning rate 0 at the start, 0.001 after 3 updates, 1e-05 at the end, weight decay 0.1 "
        "but for *norm*, rates action_head.* x 10"
    )
    assert "schedule vla: learning rate 2e-05 at the start" in optimizers.describe(OptimizerConfig(warmup_steps=0.0), 9)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": "adam"}, r"optimizer.name is 'adam'; choose one of adamw, .* Did you mean adamw\?"),
        ({"schedule": "cosin"}, r"optimizer.schedule is 'cosin'; choose one of .* Did you mean cosine\?"),
        ({"ema": 1.0}, "optimizer.ema is 1.0; it must be from 0 to below 1"),
        ({"decay_share": -0.1}, "optimizer.decay_share is -0.1; it must be from 0 to below 1"),
        ({"rates": (("*", -1.0),)}, r"optimizer.rates has -1.0 for '\*'; it must be a number from 0 on"),
        ({"rates": (("*", math.nan),)}, r"optimizer.rates has nan for '\*'"),
    ],
)
def test_wrong_values_are_refused(keys, told):
    with pytest.raises(ConfigError, match=told):
        OptimizerConfig(**keys)


def test_a_run_that_ends_before_its_schedule_is_refused():
    short = {"stage": "video", "total_steps": 50}
    with pytest.raises(ConfigError, match="warmup_steps 45 and 10 updates of decay do not fit in .*total_steps 50"):
        TrainConfig(**short, optimizer=OptimizerConfig(schedule="wsd", warmup_steps=45.0))
    with pytest.raises(ConfigError, match=r"warmup_steps 50 and the decay do not fit .* 'cosine'; reduce"):
        TrainConfig(**short, optimizer=OptimizerConfig(schedule="cosine", warmup_steps=50.0))
    TrainConfig(**short, optimizer=OptimizerConfig(warmup_steps=50.0))  # the published one takes any numbers


PARAMS = {
    "embed": jnp.ones((4, 8)),
    "blocks": {"w_up": jnp.ones((2, 8, 16)), "norm": jnp.ones((2, 8)), "bias": jnp.ones((2, 16))},
    "action_head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)},
}
AXES = {
    "embed": ("vocab", "embed"),
    "blocks": {"w_up": ("layers", "embed", "feed_forward"), "norm": ("layers", None), "bias": ("layers", None)},
    "action_head": {"kernel": ("embed", None), "bias": (None,)},
}


def updated(gradients, steps=1, **keys):
    """PARAMS after some updates with the same gradients, by dotted path."""
    config = OptimizerConfig(peak_lr=0.1, min_lr=0.1, warmup_steps=0.0, clip_norm=0.0, **keys)
    optimizer = make_optimizer(config, 100, axes=AXES)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return {mesh_lib.path_string(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}, state


def gradients_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_leaves_out_what_the_patterns_name(name):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    decayed, _ = updated(zero, name=name, weight_decay=0.5)
    assert {round(float(x.flat[0]), 6) for x in decayed.values()} == {0.95}  # all of them, as published
    masked, _ = updated(zero, name=name, weight_decay=0.5, no_decay=("*norm*", "*bias", "*embed*"))
    kept = {path for path, x in masked.items() if float(x.flat[0]) == 1.0}
    assert kept == {"embed", "blocks.norm", "blocks.bias", "action_head.bias"}


@pytest.mark.parametrize("name", NAMES)
def test_rates_scale_the_updates_of_a_group(name):
    gradients = gradients_like(PARAMS)
    plain, _ = updated(gradients, name=name, steps=2)
    rates = (("action_head.bias", 0.0), ("action_head.*", 3.0))
    scaled, _ = updated(gradients, name=name, steps=1, rates=rates)
    first, _ = updated(gradients, name=name, steps=1)
    for path in first:
        factor = {"action_head.kernel": 3.0, "action_head.bias": 0.0}.get(path, 1.0)
        np.testing.assert_allclose(scaled[path] - 1.0, factor * (first[path] - 1.0), rtol=1e-4, atol=1e-6, err_msg=path)
    assert any((plain[path] != first[path]).any() for path in plain)


def test_patterns_that_match_nothing_are_refused():
    config = OptimizerConfig(no_decay=("*norm*", "blocks.w_upp"))
    with pytest.raises(ConfigError, match=r"no_decay: 'blocks.w_upp' matches no .* Did you mean blocks.w_up\?"):
        optimizers.check_patterns(config, PARAMS)
    with pytest.raises(ConfigError, match=r"optimizer.rates: 'lora' matches no parameter; correct it or leave it out"):
        optimizers.check_patterns(OptimizerConfig(rates=(("lora", 2.0),)), PARAMS)


def test_muon_orthogonalises_each_layer_for_itself():
    """One layer's update is the same whatever the others' gradients are, and its singular values are about equal."""
    gradients = gradients_like(PARAMS)
    other = {**gradients, "blocks": {**gradients["blocks"], "w_up": gradients["blocks"]["w_up"].at[1].mul(7.0)}}
    one, _ = updated(gradients, name="muon", weight_decay=0.0)
    two, _ = updated(other, name="muon", weight_decay=0.0)
    np.testing.assert_array_equal(one["blocks.w_up"][0], two["blocks.w_up"][0])
    values = np.linalg.svd(1.0 - one["blocks.w_up"][0], compute_uv=False) / 0.1 / optimizers.MUON_RMS / 16**0.5
    assert values.min() > 0.5 and values.max() < 1.5
    adam, _ = updated(gradients, name="adamw", weight_decay=0.0)
    np.testing.assert_allclose(one["embed"], adam["embed"], atol=0.1)  # AdamW with Nesterov's momentum


def test_muon_is_refused_where_no_layers_are_stacked():
    with pytest.raises(ConfigError, match="optimizer.name is 'muon', but this model has no stacked layers"):
        make_optimizer(OptimizerConfig(name="muon"), 10, axes={"w": (None, None)})


def test_the_default_is_the_published_adamw_bit_for_bit():
    config = OptimizerConfig()
    ours = make_optimizer(config, 100)
    rate = schedule(config, 100)
    published = optax.chain(
        optax.clip_by_global_norm(4.0), optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    )
    a, b = ours.init(PARAMS), published.init(PARAMS)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for seed in range(3):
        one, a = ours.update(gradients_like(PARAMS, seed), a, PARAMS)
        two, b = published.update(gradients_like(PARAMS, seed), b, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, (one, a), (two, b))


def test_the_average_follows_its_formula():
    gradients = gradients_like(PARAMS)
    average = 1.0
    for steps in range(1, 13):
        params, state = updated(gradients, steps=steps, ema=0.6)
        share = 1.0 - min(0.6, (1 + steps) / (10 + steps))
        average = average + share * (params["blocks.w_up"] - average)
        found = optimizers.ema_params(state, PARAMS)["blocks"]["w_up"]
        np.testing.assert_allclose(found, average, rtol=1e-5, err_msg=str(steps))
    _, state = updated(gradients)
    assert optimizers.ema_params(state, PARAMS) is PARAMS


WIDE = {
    "encoder": {
        "kernel": jax.ShapeDtypeStruct((2, 128, 256), np.float32),  # Adafactor factors axes of 128 and more
        "square": jax.ShapeDtypeStruct((2, 256, 256), np.float32),
        "norm": jax.ShapeDtypeStruct((2, 128), np.float32),
    },
    "embed": jax.ShapeDtypeStruct((512, 128), np.float32),
}
WIDE_AXES = {
    "encoder": {
        "kernel": ("layers", "embed", "feed_forward"),
        "square": ("layers", "feed_forward", "embed"),
        "norm": ("layers", None),
    },
    "embed": ("vocab", "embed"),
}
MESH = MeshConfig(fsdp=4, tensor=2)


def placed_state(name, mesh, **keys):
    """(optimizer, shapes of its state, shardings of WIDE, shardings of the state)."""
    config = OptimizerConfig(name=name, ema=0.9, peak_lr=1e-3, min_lr=1e-3, warmup_steps=0.0)
    optimizer = make_optimizer(config, 100, axes=WIDE_AXES)
    shapes = jax.eval_shape(optimizer.init, WIDE)
    placed = mesh_lib.param_shardings(WIDE_AXES, WIDE, mesh)
    return optimizer, shapes, placed, state_shardings(shapes, WIDE, placed, mesh, **{"offload": False, **keys})


@pytest.mark.parametrize("name", NAMES)
def test_state_lies_where_its_parameters_do(name):
    mesh = mesh_lib.make_mesh(MESH)
    optimizer, shapes, placed, found = placed_state(name, mesh)
    if name in ("adamw", "lion"):  # optax can tell by itself where moments have the shapes of the parameters
        everywhere = mesh_lib.replicated(mesh)
        tell = functools.partial(optax.tree.map_params, optimizer, lambda _, sharding: sharding)
        assert found == tell(shapes, placed, transform_non_params=lambda _: everywhere)
    together = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    state = mesh_lib.bytes_per_device(jax.tree.map(together, shapes, found))
    times = state / mesh_lib.bytes_per_device(jax.tree.map(together, WIDE, placed))
    low, high = {"adamw": (3, 3.01), "adafactor": (1, 1.05), "lion": (2, 2.01), "muon": (2, 3)}[name]
    assert low <= times <= high  # the average is one of them
    if name != "adafactor":
        return
    (moments,) = (s for s in jax.tree.leaves(found, is_leaf=is_factored) if is_factored(s))
    for kernel, row, column in (("kernel", ROW, "tensor"), ("square", "tensor", ROW)):
        assert tuple(moments.v_row["encoder"][kernel].spec) == (None, row)
        assert tuple(moments.v_col["encoder"][kernel].spec) == (None, column)
    assert tuple(moments.v_row["embed"].spec) == (ROW,) and tuple(moments.v_col["embed"].spec) == ("tensor",)
    assert moments.v["encoder"]["norm"].spec == placed["encoder"]["norm"].spec


ROW = mesh_lib.RULES["embed"]


def is_factored(state):
    return hasattr(state, "v_row")


def test_offloaded_state_waits_on_the_host():
    _, _, _, found = placed_state("adafactor", mesh_lib.make_mesh(MESH), offload=True)
    kinds = [(s.memory_kind, s.is_fully_replicated) for s in jax.tree.leaves(found)]
    assert ("pinned_host", False) in kinds and all(whole or kind == "pinned_host" for kind, whole in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_any_mesh_makes_the_updates_of_one_device(name):
    results = []
    for mesh in (mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1]), mesh_lib.make_mesh(MESH)):
        optimizer, _, *shardings = placed_state(name, mesh)

        def update(gradients, opt_state, params, optimizer=optimizer):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params = jax.device_put(gradients_like(WIDE, 9), shardings[0])
        opt_state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
        step = jax.jit(update, out_shardings=tuple(shardings), donate_argnums=(1, 2))
        for seed in range(2):
            params, opt_state = step(jax.device_put(gradients_like(WIDE, seed), shardings[0]), opt_state, params)
        results.append(jax.tree.map(np.asarray, (params, optimizers.ema_params(opt_state, params))))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6, err_msg=mesh_lib.path_string(path))


def test_a_skipped_update_changes_neither_moments_nor_average_but_the_counts():
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, stage="action_vae", optimizer=OptimizerConfig(name="adafactor", ema=0.9))
    rng = np.random.default_rng(0)
    rows = {"actions": rng.normal(size=(16, 5, 6)).astype(np.float32), "actions_pad": np.zeros((16, 5), bool)}
    seen, objective = [], OBJECTIVES["action_vae"]
    with jax.set_mesh(mesh):
        abstract, graphdef, optimizer = abstract_state(config, objective, mesh)
        state = fresh_state(config, objective, abstract, optimizer, {}, Frozen())
        step = make_step(config, objective, graphdef, optimizer, abstract)
        params, opt_state, now = state.params, state.opt_state, make_now(config, mesh)
        for number, factor in enumerate((1.0, 1.0, np.nan)):
            batch = {**rows, "actions": rows["actions"] * np.float32(factor)}
            batch = {k: jax.device_put(v, mesh_lib.batch_sharding(mesh)) for k, v in batch.items()}
            params, opt_state, metrics = step(params, opt_state, now(np.int32(number)), Frozen(), batch)
            assert float(metrics["skipped"]) == (number == 2)
            seen.append(jax.tree.map(np.asarray, (params, opt_state)))
    first, good, bad = (jax.tree.leaves(x) for x in seen)
    assert any((a != b).any() for a, b in zip(first, good, strict=True))
    for a, b in zip(good, bad, strict=True):
        np.testing.assert_array_equal(b, a + 1 if a.dtype == np.int32 else a)
    earlier = jax.tree.leaves(with_counts(opt_state, -1))
    for a, b in zip(jax.tree.leaves(seen[1][1]), earlier, strict=True):
        np.testing.assert_array_equal(b, a)
