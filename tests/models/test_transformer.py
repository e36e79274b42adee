"""The decoder beyond the recorded goldens: long sequences, caches, remat, dropout, padding rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.config import ConfigError, TransformerConfig, VLAConfig
from rynnvla_jax.models.layers import project
from rynnvla_jax.models.params import split
from rynnvla_jax.models.transformer import Transformer, attend
from rynnvla_jax.models.vla import VLA

SMALL = TransformerConfig(
    vocab_size=90,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    feed_forward=64,
    dropout=0.0,
    image_tokens=(4, 40),
    init_std=0.1,
)


def plain_attention(q, k, v):
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bshe,bthe->bhst", q, k) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhst,bthe->bshe", jax.nn.softmax(scores, -1), v)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700, 2100])
def test_attention_in_blocks_equals_plain(length):
    keys = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(keys[0], (1, length, 4, 8))
    k, v = (jax.random.normal(key, (1, length, 2, 8)) for key in keys[1:])
    np.testing.assert_allclose(attend(q, k, v, 0), plain_attention(q, k, v), atol=2e-6)


def test_cache_gives_the_same_hidden_states():
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    x = jax.random.normal(jax.random.key(0), (2, 20, 32))
    whole, _ = model(x)
    step = jax.jit(lambda p, x, cache: nnx.merge(graphdef, p)(x, cache=cache))
    _, cache = step(params, x[:, :9], model.empty_cache(2, 20))
    parts = []
    for i in range(9, 20):
        h, cache = step(params, x[:, i : i + 1], cache)
        parts.append(h)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole[:, 9:], atol=1e-5)
    assert int(cache.length) == 20


@pytest.mark.parametrize("remat", ["full", "projections", "attention", "offload"])
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(SMALL, dropout=0.3)
    x = jax.random.normal(jax.random.key(0), (2, 12, 32))

    def gradient(remat):
        graphdef, params = split(Transformer(config, rngs=nnx.Rngs(0), remat=remat))
        return jax.grad(lambda p: nnx.merge(graphdef, p)(x, key=jax.random.key(5))[0].sum())(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient("none"), gradient(remat))


def test_dropout_is_on_both_branches_of_every_layer_and_keeps_the_mean():
    model = Transformer(dataclasses.replace(SMALL, dropout=0.5), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 32))
    a, b = model(x, key=jax.random.key(1))[0], model(x, key=jax.random.key(2))[0]
    assert not np.allclose(a, b)
    assert np.array_equal(a, model(x, key=jax.random.key(1))[0])
    from rynnvla_jax.models.layers import dropout

    many = dropout(jnp.ones(20000), 0.05, jax.random.key(0))
    assert abs(float(many.mean()) - 1) < 0.01 and 0.03 < float((many == 0).mean()) < 0.07


def test_padding_rows_are_zero_and_never_predicted():
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    assert model.embed.shape == (128, 32) and np.all(np.asarray(model.embed[90:]) == 0)
    logits = model.logits(jax.random.normal(jax.random.key(0), (5, 32)))
    assert np.all(np.asarray(logits[:, 90:]) == np.finfo(np.float32).min)
    masked = Transformer(dataclasses.replace(SMALL, mask_image_logits=True), rngs=nnx.Rngs(0))
    assert np.all(np.asarray(masked.logits(jnp.ones((1, 32)))[:, 4:40]) == np.finfo(np.float32).min)


def test_bf16_compute_over_float32_weights_is_close():
    x = jax.random.normal(jax.random.key(0), (1, 16, 32))
    full = Transformer(SMALL, rngs=nnx.Rngs(0))(x)[0]
    half = Transformer(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(x.astype(jnp.bfloat16))[0]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.15)


def test_weight_gradients_are_summed_in_float32_under_bf16():
    """A sum of many small and one large term: bf16 loses the small ones, float32 keeps them."""
    x = jnp.ones((1, 257, 1), jnp.bfloat16)
    g = jnp.full((1, 257, 1), 2**-9, jnp.bfloat16).at[0, 0].set(1.0)
    grad = jax.grad(lambda w: (project(x, w) * g).astype(jnp.float32).sum())(jnp.ones((1, 1), jnp.bfloat16))
    assert float(grad[0, 0]) == 1.5
    model = Transformer(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graphdef, params = split(model)
    tokens = jnp.ones((1, 8, 32), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graphdef, p)(tokens)[0].sum()))(params))
    assert "f32[32,64] = dot_general" in jaxpr  # of w_gate, straight out of the product


@pytest.mark.parametrize("wrong", [{"num_heads": 5}, {"num_kv_heads": 3}, {"q_norm_rows": 3}, {"width": 20}])
def test_impossible_sizes_are_config_errors(wrong):
    with pytest.raises(ConfigError, match="transformer"):
        dataclasses.replace(SMALL, **wrong)


def test_one_pass_action_equals_the_head_on_every_position():
    model = VLA(VLAConfig(transformer=SMALL, action_head="MLP"), rngs=nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 90)
    state, positions = jax.random.normal(jax.random.key(1), (2, 1, 6)), jnp.array([[19], [29]])
    latent = model.action_latent(tokens, jnp.array([20, 30]), state, positions)
    every = model.predict_action(model.transformer(model.embed(tokens, state, positions))[0])
    np.testing.assert_allclose(latent, every[jnp.arange(2), jnp.array([19, 29])], atol=1e-6)


def test_action_inference_touches_no_vocabulary_and_one_position():
    config = dataclasses.replace(SMALL, vocab_size=1000)
    graphdef, params = split(VLA(VLAConfig(transformer=config), rngs=nnx.Rngs(1)))
    arguments = (jnp.zeros((1, 30), jnp.int32), jnp.array([30]), jnp.zeros((1, 1, 6)), jnp.array([[29]]))
    jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).action_latent(*arguments))(params).jaxpr
    shapes = [v.aval.shape for equation in jaxpr.eqns for v in equation.outvars]
    # 64 outputs are computed for one position, and nothing but the embedding table is as wide as the vocabulary.
    assert (1, 64) in shapes and not any(64 in s and 30 in s for s in shapes)
    assert not any(config.padded_vocab in s and s != (config.padded_vocab, 32) for s in shapes)
