"""The VQGAN against the public code's golden outputs, and its training behaviour."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from rynnvla_jax.config import ConfigError, VQGANConfig
from rynnvla_jax.convert import vqgan as convert
from rynnvla_jax.convert.table import to_foreign, to_params
from rynnvla_jax.models.vqgan import VQGAN, nearest_code, to_uint8
from tests import GOLDEN


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(config, decoder=True):
    """Graph definition and random parameters, without the many small compilations of a real initialisation."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0), decoder=decoder)))
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1 + (len(s.shape) == 1), jnp.float32), shapes
    )


@pytest.fixture(scope="module", params=["vqgan_noattn", "vqgan_attn", "vqgan_f16"])
def golden(request):
    case = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"][request.param]
    config = convert.config_from_foreign(case)
    weights = {k: v for f in case["files"] if ".weights" in f for k, v in load_file(GOLDEN / f).items()}
    decoder = not case["encoder_only"]
    graphdef, template = build(config, decoder)
    params = to_params(convert.table(config, decoder), weights, template)
    io = load_file(GOLDEN / f"{request.param}.io.safetensors")
    return case, config, weights, nnx.merge(graphdef, params), params, io


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


def test_golden(golden):
    case, config, weights, model, params, io = golden
    images = nhwc(io["image"])
    np.testing.assert_allclose(io["image_u8"] / 127.5 - 1, images, atol=1e-6)
    z = jax.jit(model.encode)(images)
    np.testing.assert_allclose(z, nhwc(io["z"]), atol=1e-4)
    codes, quantised, loss = model.quantize(z)
    assert codes.dtype == jnp.int32 and codes.shape == z.shape[:-1]
    np.testing.assert_array_equal(codes.reshape(-1), io["indices"])
    np.testing.assert_array_equal(jax.jit(model.codes)(images).reshape(-1), io["indices"])
    np.testing.assert_allclose(quantised, nhwc(io["quant"]), atol=1e-4)
    np.testing.assert_allclose(loss, io["emb_loss"], rtol=1e-5)
    if case["encoder_only"]:
        return
    decoded = jax.jit(model.decode_codes)(codes)
    np.testing.assert_allclose(decoded, nhwc(io["decoded"]), atol=1e-4)
    ours, theirs = np.asarray(to_uint8(decoded[0])), io["decoded_u8_0"]
    # Truncation turns an error of 1e-6 into a whole step, where a value lies next to one.
    assert (ours != theirs).mean() < 1e-3 and abs(ours.astype(int) - theirs).max() <= 1
    np.testing.assert_array_equal(to_uint8(nhwc(io["decoded"])[0]), theirs)


def test_weights_round_trip(golden):
    case, config, weights, _, params, _ = golden
    again = to_foreign(convert.table(config, not case["encoder_only"]), params)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    foreign = convert.config_to_foreign(config)
    assert foreign == {k: case[k] for k in foreign}


TINY = VQGANConfig(
    channels=32, multipliers=(1, 1), num_res_blocks=1, z_channels=8, num_codes=32, code_width=4, resolution=16
)


def test_nearest_code_goes_over_the_whole_book():
    """More codes than a block, not a multiple of it; ties go to the lower index."""
    rng = np.random.default_rng(0)
    book = rng.normal(size=(2500, 3)).astype(np.float32)
    book[2400] = book[7]
    z = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    z[0, 0, 0], z[0, 0, 1] = book[7], book[2499]
    distance = ((z[..., None, :].astype(np.float64) - book) ** 2).sum(-1)
    codes = jax.jit(nearest_code)(z, book)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert codes[0, 0, 0] == 7 and codes[0, 0, 1] == 2499
    with jax.enable_x64(True):
        assert jax.jit(nearest_code)(jnp.asarray(z, jnp.float64), book).dtype == jnp.int32


def test_quantize_passes_gradients_straight_through():
    graphdef, params = build(TINY)
    model = nnx.merge(graphdef, params)
    z, weights = np.random.default_rng(1).normal(size=(2, 1, 3, 2, 4)).astype(np.float32)
    gradient = jax.grad(lambda z: (model.quantize(z)[1] * weights).sum())(z)
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)
    # Encoder's pull 1, codebook's pull 0.25.
    codes, quantised, _ = model.quantize(z)
    gradient = jax.grad(lambda z: model.quantize(z)[2])(z)
    np.testing.assert_allclose(gradient, 2 * (z - quantised) / z.size, atol=1e-6)
    book = jax.grad(lambda p: nnx.merge(graphdef, p).quantize(z)[2])(params)["codebook"]
    expected = np.zeros_like(book)
    np.add.at(expected, codes, 0.25 * 2 * np.asarray(quantised - z) / z.size)
    np.testing.assert_allclose(book, expected, atol=1e-6)


@pytest.fixture(scope="module")
def flat():
    """A freshly initialised VQGAN of one level."""
    config = dataclasses.replace(TINY, multipliers=(1,))
    return jax.jit(lambda: VQGAN(config, rngs=nnx.Rngs(0)))()


def test_initialisation(flat):
    """float32, axes declared for every dimension, several codes in use from the start."""
    for path, leaf in nnx.to_flat_state(nnx.state(flat, nnx.Param)):
        assert len(leaf.axes) == leaf[...].ndim and leaf[...].dtype == jnp.float32, path
    images = np.random.default_rng(0).uniform(-1, 1, size=(2, 8, 8, 3)).astype(np.float32)
    assert len(np.unique(jax.jit(flat.codes)(images))) > 4


def test_training_reconstructs_and_revives_codes(flat):
    """From a codebook in which one code wins everything, a few steps bring many codes into use."""
    graphdef, state = nnx.split(flat)
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(state)
    params["codebook"] = jnp.asarray(rng.normal(size=(32, 4)) * 0.01 + 1.0, jnp.float32).at[0].set(0.0)
    images = np.kron(rng.uniform(-1, 1, size=(4, 4, 4, 3)), np.ones((1, 2, 2, 1))).astype(np.float32)
    optimizer = optax.adam(2e-2)

    @jax.jit
    def step(params, state):
        loss = lambda p: nnx.merge(graphdef, p).loss(images)  # noqa: E731
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state, history = jax.jit(optimizer.init)(params), []
    for _ in range(60):
        params, state, metrics = step(params, state)
        history.append(metrics)
    assert history[0]["perplexity"] < 1.1 and history[-1]["perplexity"] > 4
    assert history[-1]["reconstruction"] < 0.7 * history[0]["reconstruction"]


def test_checkpoint_with_training_parts_is_accepted_by_name():
    graphdef, params = build(TINY)
    weights = to_foreign(convert.table(TINY), params)
    extra = {"loss.discriminator.main.0.weight": np.zeros(1), "loss.perceptual_loss.lin0.model.1.weight": np.zeros(1)}
    again = to_params(convert.table(TINY), weights | extra, params, convert.IGNORED)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ValueError, match="encoder.unknown: unexpected"):
        to_params(convert.table(TINY), weights | {"encoder.unknown": np.zeros(1)}, params, convert.IGNORED)


def test_wrong_inputs_are_named():
    graphdef, params = build(TINY)
    with pytest.raises(ValueError, match="multiples of 2"):
        nnx.merge(graphdef, params).codes(np.zeros((1, 15, 16, 3), np.float32))
    foreign = convert.config_to_foreign(TINY)
    assert convert.config_from_foreign(foreign) == TINY
    foreign["ddconfig"]["double_z"] = True
    with pytest.raises(ConfigError, match="double_z is True"):
        convert.config_from_foreign(foreign)
    with pytest.raises(ConfigError, match="lacks n_embed"):
        convert.config_from_foreign({"ddconfig": {}, "embed_dim": 4})
