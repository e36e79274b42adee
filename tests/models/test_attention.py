"""All implementations of attention mean the same; packed clips do not see each other; the sequence may be cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.transforms import Pack
from rynnvla_jax.config import MeshConfig, TransformerConfig, VLAConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import attention
from rynnvla_jax.models.attention import self_attention
from rynnvla_jax.models.params import split
from rynnvla_jax.models.vla import VLA, loss_counts

B, S, H, K, E = 2, 200, 4, 2, 64


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, S, H, E))
    k, v = (jax.random.normal(key, (B, S, K, E)) for key in keys[1:3])
    segments = jnp.sort(jax.random.randint(keys[3], (B, S), 0, 3), axis=1)
    return q, k, v, segments


def plain(q, k, v, segments):
    """The definition."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    scores = jnp.einsum("bshe,bthe->bhst", q, k) * E**-0.5
    seen = jnp.tril(jnp.ones((S, S), bool))[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bhst,bthe->bshe", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)


def with_gradients(f, q, k, v, segments):
    weight = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)
    return out, *pull(weight)


def assert_close(ours, theirs, atol):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "splash_interpreted", "cudnn"])
def test_implementations_agree_with_the_definition(inputs, implementation, packed):
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    q, k, v, segments = inputs
    segments = segments if packed else None
    dtype, atol = (jnp.bfloat16, 5e-2) if implementation == "cudnn" else (jnp.float32, 2e-4)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    ours = jax.jit(lambda *x: with_gradients(lambda *y: self_attention(*y, implementation), *x))(q, k, v, segments)
    assert_close(ours, jax.jit(lambda *x: with_gradients(plain, *x))(q, k, v, segments), atol)


@pytest.mark.parametrize("implementation", ["xla", "splash_interpreted"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, sequence=4), MeshConfig(fsdp=2, sequence=1, tensor=4)])
def test_a_mesh_that_cuts_sequence_or_heads_changes_nothing(inputs, implementation, packed, mesh):
    q, k, v, segments = inputs
    segments = segments if packed else None
    expected = jax.jit(lambda *x: with_gradients(plain, *x))(q, k, v, segments)
    with jax.set_mesh(mesh_lib.make_mesh(mesh)):
        ours = jax.jit(lambda *x: with_gradients(lambda *y: self_attention(*y, implementation), *x))(q, k, v, segments)
    assert_close(ours, expected, 2e-4)


@pytest.mark.parametrize(("fused", "cut"), [(0, 1), (0, 2), (8, 1)])
def test_splash_of_several_tiles_agrees_with_one_or_two_backward_kernels(inputs, monkeypatch, fused, cut):
    monkeypatch.setattr(attention, "SPLASH_TILES", {128: 1})
    monkeypatch.setattr(attention, "FUSED_TILES", fused)
    q, k, v, segments = inputs
    ours = jax.jit(lambda *x: with_gradients(lambda *y: self_attention(*y, "splash_interpreted"), *x))
    expected = jax.jit(lambda *x: with_gradients(plain, *x))(q, k, v, segments)
    with jax.set_mesh(mesh_lib.make_mesh(MeshConfig(fsdp=1, sequence=cut), jax.devices()[:cut])):
        program = str(jax.make_jaxpr(ours)(q, k, v, segments))
        assert ("splash_mha_dq" in program) == (fused == 0)
        assert_close(ours(q, k, v, segments), expected, 2e-4)


@pytest.mark.parametrize(
    ("length", "cut", "edge", "padded"),
    [
        (4096, 1, 1024, 4096),
        (5120, 1, 1024, 5120),
        (7168, 1, 1024, 7168),
        (4608, 1, 768, 4608),
        (4608, 2, 768, 4608),
        (16384, 4, 1024, 16384),
        (320, 1, 384, 384),  # one tile instead of six
        (4224, 1, 896, 4480),  # 33 x 128: tiles that divide it would be small
        (40, 1, 128, 128),
    ],
)
def test_tiles_of_the_splash_kernel(length, cut, edge, padded):
    assert attention._tile_edge(length, cut) == edge
    assert length + -length % (edge * cut) == padded


def test_packed_clips_have_the_losses_of_each_alone():
    config = TransformerConfig(
        vocab_size=90, width=32, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward=48, dropout=0.0
    )
    graphdef, params = split(VLA(VLAConfig(transformer=config), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    clips = [clip(rng, 30), clip(rng, 41)]

    def sums(batch):
        batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}
        counts = jax.tree.map(jnp.ones_like, loss_counts(batch))
        metrics = nnx.merge(graphdef, params).loss(batch, counts)[1]
        rows = metrics.pop("rows")
        return metrics | {f"rows/{name}": x.sum() for name, pair in rows.items() for x in pair[:1]}

    packed = Pack(length=80, codes=1, clips=2)(clips)
    assert packed["tokens"].shape == (80,) and packed["state"].shape == (4, 6)
    one, two, both = (jax.jit(sums)(batch) for batch in (*clips, packed))
    for name in one:
        assert float(both[name]) == pytest.approx(float(one[name] + two[name]), rel=1e-4), name


def clip(rng, length):
    mask = rng.random(length) < 0.8
    mask[0] = False
    return {
        "tokens": rng.integers(0, 90, length).astype(np.int32),
        "loss_mask": mask,
        "state": rng.normal(size=(2, 6)).astype(np.float32),
        "state_positions": np.array([3, 20], np.int32),
        "action_positions": np.array([5, 22], np.int32),
        "action_targets": rng.normal(size=(2, 64)).astype(np.float32),
    }


def test_placeholders_of_packed_clips_count_all_front_frames_before_all_wrist_frames():
    clips = [{"tokens": -(1 + np.arange(4, dtype=np.int32)), "loss_mask": np.ones(4, bool)} for _ in range(3)]
    packed = Pack(length=12, codes=2, clips=3)(clips)  # two codes in front and two at the wrist, of each clip
    front = [[0, 1], [2, 3], [4, 5]]
    wrist = [[6, 7], [8, 9], [10, 11]]
    expected = np.concatenate([a + b for a, b in zip(front, wrist, strict=True)])
    np.testing.assert_array_equal(-packed["tokens"] - 1, expected)
    np.testing.assert_array_equal(packed["positions"], np.tile(np.arange(4), 3))
    np.testing.assert_array_equal(packed["segments"], np.repeat([1, 2, 3], 4))
    assert not packed["loss_mask"][[0, 4, 8]].any()
