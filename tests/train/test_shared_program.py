"""Runs that differ only in seed and learning rate share the program of the step, and train as with one of their own."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models.frozen import Frozen
from rynnvla_jax.train import step as step_lib
from rynnvla_jax.train.optimizer import schedule
from rynnvla_jax.train.stages import OBJECTIVES
from tests.train.test_train import run_config

OBJECTIVE = OBJECTIVES["action_vae"]
NUMBERS = {"optimizer.peak_lr": 1e-3, "optimizer.min_lr": 1e-5, "optimizer.warmup_steps": 1.5, "total_steps": 40}
POINTS = [{}, {"seed": 1}, {"seed": 2**31 + 7, "optimizer.schedule": "vla", **NUMBERS}]


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])


def program(config, mesh):
    """The step as training compiles it."""
    abstract, graphdef, optimizer = step_lib.abstract_state(config, OBJECTIVE, mesh)
    return step_lib.make_step(config, OBJECTIVE, graphdef, optimizer, abstract)


def with_constants(config, mesh):
    """The step with seed and schedule as constants of its program."""
    update, rate = program(config, mesh), schedule(config.optimizer, config.total_steps)

    def step(params, opt_state, number, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        return update(params, opt_state, step_lib.Now(key, rate(number)), frozen, batch)

    return jax.jit(step)


def trained(config, mesh, update, now):
    """Parameters and metrics after three steps on batches that are a function of the step."""
    shape = (8, config.action_vae_model.chunk, config.action_vae_model.action_dim)
    with jax.set_mesh(mesh):
        abstract, _, optimizer = step_lib.abstract_state(config, OBJECTIVE, mesh)
        state = step_lib.fresh_state(config, OBJECTIVE, abstract, optimizer, {}, Frozen())
        params, opt_state, logged = state.params, state.opt_state, []
        for number in range(3):
            actions = np.random.default_rng(number).normal(size=shape).astype(np.float32)
            batch = {"actions": actions, "actions_pad": np.zeros(shape[:2], bool)}
            batch = {k: jax.device_put(v, mesh_lib.batch_sharding(mesh)) for k, v in batch.items()}
            params, opt_state, metrics = update(params, opt_state, now(np.int32(number)), Frozen(), batch)
            logged.append(jax.device_get(metrics))
    return jax.tree.map(np.asarray, (params, opt_state)), logged


@pytest.fixture
def cache(tmp_path):
    """The names of the programs that were compiled, each once: a cache of their own."""
    before = jax.config.values["jax_compilation_cache_dir"], jax.config.jax_persistent_cache_min_compile_time_secs

    def use(directory, seconds):
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()

    use(str(tmp_path), 0.0)
    yield lambda name: len(list(tmp_path.glob(f"jit_{name}-*-cache")))
    use(*before)


def test_points_share_one_program_and_their_numbers_are_their_own(assets, mesh, cache):
    results = []
    for point in POINTS:
        config = run_config("action_vae", assets, **point)
        results.append(trained(config, mesh, program(config, mesh), step_lib.make_now(config, mesh)))
    assert cache("update") == 1 and cache("draw") == 1
    (first, second, third) = ([float(m["learning_rate"]) for m in logged] for _, logged in results)
    assert first == second != third
    assert len({float(logged[0]["loss"]) for _, logged in results}) == 3
    other, expected = trained(config, mesh, with_constants(config, mesh), lambda number: number)
    assert cache("step") == 1
    state, logged = results[-1]
    jax.tree.map(np.testing.assert_array_equal, state, other)
    jax.tree.map(np.testing.assert_array_equal, logged, expected)
