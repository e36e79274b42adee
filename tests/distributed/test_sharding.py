"""Any mesh gives one device's losses and gradients, and parameters really are sharded."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.config import (
    ActionVAEConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SequenceConfig,
    TrainConfig,
    TransformerConfig,
    VLAConfig,
    from_dict,
)
from rynnvla_jax.configs import robot
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import abstract_state, gradients

CONFIG = TrainConfig(
    stage="robot",
    batch_size=16,
    compute_dtype="float32",
    remat="full",
    loss_chunk=8,
    sequence=SequenceConfig(length=40, num_frames=2),
    vla=VLAConfig(
        transformer=TransformerConfig(
            vocab_size=116, width=64, num_layers=2, num_heads=8, num_kv_heads=2, feed_forward=128, dropout=0.1
        )
    ),
    data=DataConfig(chunk=5),
    action_vae_model=ActionVAEConfig(width=16, feed_forward=32, num_heads=2, encoder_layers=1, decoder_layers=1),
)


def robot_batch(rows=16, length=40, frames=2, vocab=116):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    mask = rng.random((rows, length)) < 0.7
    mask[: rows // 2, 20:] = False  # unequal numbers of trained tokens over the batch
    return {
        "tokens": tokens,
        "loss_mask": mask,
        "state": rng.normal(size=(rows, frames, 6)).astype(np.float32),
        "actions": rng.normal(size=(rows, frames, 5, 6)).astype(np.float32),
        "actions_pad": np.zeros((rows, frames, 5), bool),
        "state_positions": np.tile(np.array([[9, 29]], np.int32), (rows, 1)),
        "action_positions": np.tile(np.array([[10, 30]], np.int32), (rows, 1)),
    }


def packed_batch():
    """Two clips in each row."""
    starts = np.arange(40) % 20
    more = {"positions": np.tile(starts, (16, 1)), "segments": np.tile(np.arange(40) // 20, (16, 1))}
    return robot_batch() | {key: value.astype(np.int32) for key, value in more.items()}


def run(config: TrainConfig, mesh: jax.sharding.Mesh, rows: dict | None = None):
    stage = OBJECTIVES[config.stage]
    model = stage.build(config, nnx.Rngs(0))
    graphdef, params = params_lib.split(model)
    vae = params_lib.split(ActionVAE(config.action_vae_model, rngs=nnx.Rngs(1)))[1]
    with jax.set_mesh(mesh):
        shardings = mesh_lib.param_shardings(params_lib.axes(model), params, mesh)
        params = jax.device_put(params, shardings)
        frozen = jax.device_put(Frozen(action_vae=vae), mesh_lib.replicated(mesh))
        batch = {k: jax.device_put(v, mesh_lib.batch_sharding(mesh)) for k, v in (rows or robot_batch()).items()}
        step = jax.jit(lambda p, f, b: gradients(config, stage, graphdef, p, f, b, jax.random.key(3)))
        grads, metrics = step(params, frozen, batch)
    return params, jax.tree.map(np.asarray, grads), jax.tree.map(float, metrics)


@pytest.fixture(scope="module")
def single():
    return run(CONFIG, mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("mesh", "torus"),
    [
        (MeshConfig(data=8, fsdp=1), None),
        (MeshConfig(fsdp=8), None),
        (MeshConfig(fsdp=8), (2, 2, 2)),
        (MeshConfig(fsdp=4, tensor=2), (4, 2)),
        (MeshConfig(fsdp=4, sequence=2), (2, 2, 2)),
        (MeshConfig(fsdp=1, tensor=8), None),
        (MeshConfig(data=2, fsdp=2, tensor=2), None),
        (MeshConfig(replica=2, fsdp=2, sequence=2), None),
    ],
)
def test_any_mesh_equals_one_device(single, mesh, torus):
    params, grads, metrics = run(CONFIG, mesh_lib.make_mesh(mesh, torus=torus))
    for name, value in single[2].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(single[1]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4, err_msg=mesh_lib.path_string(path))
    shards = (mesh.fsdp if mesh.fsdp > 0 else 8) * mesh.sequence * mesh.tensor
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    if shards == 1:
        assert mesh_lib.bytes_per_device(params) == total
    else:
        up = params["transformer"]["blocks"]["w_up"]
        assert up.addressable_shards[0].data.nbytes == up.nbytes // shards
        assert mesh_lib.bytes_per_device(params) < total / shards * 2  # norms and the two KV heads stay whole


@pytest.mark.parametrize(("count", "torus"), [(2, None), (4, (2, 2))])
def test_accumulation_equals_one_large_batch(single, count, torus):
    config = dataclasses.replace(
        CONFIG,
        optimizer=OptimizerConfig(accumulation=4),
        vla=dataclasses.replace(CONFIG.vla, transformer=dataclasses.replace(CONFIG.vla.transformer, dropout=0.0)),
    )
    whole = dataclasses.replace(config, optimizer=OptimizerConfig(accumulation=1))
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:count], torus)
    _, a, metrics_a = run(config, mesh)
    _, b, metrics_b = run(whole, mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
    assert metrics_a == pytest.approx(metrics_b, rel=1e-5)


def test_packed_clips_on_a_torus_equal_one_device():
    _, whole, metrics = run(CONFIG, mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1]), packed_batch())
    _, cut, found = run(CONFIG, mesh_lib.make_mesh(MeshConfig(sequence=2), torus=(2, 2, 2)), packed_batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4), whole, cut)
    assert found == pytest.approx(metrics, rel=1e-5)


def test_indivisible_axis_is_a_named_error():
    model = OBJECTIVES["robot"].build(CONFIG, nnx.Rngs(0))
    _, params = params_lib.split(model)
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=1, tensor=3), jax.devices()[:3])
    with pytest.raises(ConfigError, match=r"transformer\.\S+ .*not a multiple of mesh axis tensor=3"):
        mesh_lib.param_shardings(params_lib.axes(model), params, mesh)


def test_mesh_must_use_every_device():
    with pytest.raises(ConfigError, match="8 devices"):
        mesh_lib.make_mesh(MeshConfig(data=3, fsdp=1))


@pytest.mark.parametrize("size", ["7b", "34b"])
def test_shardings_of_the_large_models(size):
    """Golden files: a line a parameter. A change of the rules shows as a diff, here and in review."""
    config = from_dict(TrainConfig, robot.get_config(size).to_dict())
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 4, 1, 1, 4), mesh_lib.MESH_AXES)
    abstract, _, _ = abstract_state(config, OBJECTIVES["robot"], mesh)
    golden = Path(__file__).parent / "shardings" / f"{size}.txt"
    assert "\n".join(mesh_lib.describe(abstract.params)) + "\n" == golden.read_text(encoding="utf-8")


def test_a_large_parameter_may_not_be_whole_on_every_device():
    axes, shapes = {"w": (None, "kv_heads")}, {"w": jax.ShapeDtypeStruct((2**20, 3), np.float32)}
    with pytest.raises(ConfigError, match="w .* replicated on all devices"):
        mesh_lib.param_shardings(axes, shapes, mesh_lib.make_mesh(MeshConfig(fsdp=1, tensor=8)))
    mesh_lib.param_shardings(axes, shapes, mesh_lib.make_mesh(MeshConfig(data=8, fsdp=1)))  # nothing is cut there


def test_an_array_that_lies_elsewhere_is_found():
    mesh = mesh_lib.make_mesh(MeshConfig())
    wanted = jax.ShapeDtypeStruct((8, 2), np.float32, sharding=mesh_lib.batch_sharding(mesh))
    right = jax.device_put(np.zeros((8, 2), np.float32), mesh_lib.batch_sharding(mesh))
    mesh_lib.check_placed({"w": right}, {"w": wanted})
    with pytest.raises(ConfigError, match="w has sharding .*, expected"):
        mesh_lib.check_placed({"w": jax.device_put(right, mesh_lib.replicated(mesh))}, {"w": wanted})


def test_slices_are_the_replicas():
    """The slow network carries nothing but the sum of gradients: neighbours in all other axes are of one slice."""

    class Device:
        def __init__(self, number):
            self.id = self.process_index = number
            self.slice_index, self.platform, self.device_kind = number // 4, "cpu", "cpu"

    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=2, tensor=2), [Device(i) for i in range(8)])
    assert mesh.shape["replica"] == 2
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match="slices"):
        mesh_lib.make_mesh(MeshConfig(replica=1, fsdp=4, tensor=2), [Device(i) for i in range(8)])


def test_sums_in_bfloat16_lose_the_precision_that_the_config_states(single):
    config = dataclasses.replace(CONFIG, gradient_sums="bfloat16")
    _, elsewhere, _ = run(config, mesh_lib.make_mesh(MeshConfig()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4), single[1], elsewhere)
    _, grads, _ = run(config, mesh_lib.make_mesh(MeshConfig(), torus=(2, 2, 2)))
    exact = single[1]["transformer"]["blocks"]
    for name, found in grads["transformer"]["blocks"].items():
        error = np.linalg.norm(found - exact[name]) / np.linalg.norm(exact[name])
        assert (error > 1e-4) == (name in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")), name
        assert error < 0.004, name


def test_fsdp_takes_what_the_other_axes_leave_of_a_torus():
    class Device:
        platform, device_kind, slice_index = "cpu", "cpu", 0

        def __init__(self, number, shape):
            self.id = number
            self.process_index, self.core_on_chip = 0, 0
            self.coords = tuple(int(i) for i in np.unravel_index(number, shape))

    def fsdp(shape, **axes):
        mesh = mesh_lib.make_mesh(MeshConfig(**axes), [Device(i, shape) for i in range(np.prod(shape))])
        assert mesh_lib.sizes(mesh)["fsdp"] == np.prod([mesh.shape[a] for a in mesh_lib.FSDP])
        return [mesh.shape[a] for a in mesh_lib.FSDP]

    assert fsdp((8, 8, 1)) == [8, 8, 1]
    assert fsdp((4, 4, 1)) == [16, 1, 1]  # few enough for the compiler's own rings
    assert fsdp((4, 4, 8)) == [4, 4, 8]
    assert fsdp((8, 8, 1), tensor=4) == [8, 2, 1]
    assert fsdp((4, 4, 4), data=4, tensor=2) == [4, 2, 1]
    assert fsdp((4, 4, 1), data=16, fsdp=1) == [1, 1, 1]
