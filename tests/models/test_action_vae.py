"""The ActionVAE against the public code's golden outputs, and what it must survive."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from rynnvla_jax.config import ActionVAEConfig, ConfigError
from rynnvla_jax.convert import action_vae as convert
from rynnvla_jax.convert.table import to_foreign, to_params
from rynnvla_jax.deploy import torch_action_vae
from rynnvla_jax.models.action_vae import UNTRAINED, ActionVAE
from rynnvla_jax.models.layers import fast_dropout
from tests import GOLDEN

TINY = ActionVAEConfig(
    chunk=5, action_dim=3, width=16, feed_forward=24, num_heads=2, encoder_layers=2, decoder_layers=2, latent=4
)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(config, seed=0):
    """Graph definition and random parameters, without the many small compilations of a real initialisation."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ActionVAE(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        value = rng.normal(size=shape.shape) * 0.2 + path[-1].key.endswith("scale")
        return jnp.asarray(value, jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def batch(config, size=4, seed=0):
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(size, config.chunk, config.action_dim)).astype(np.float32)
    is_pad = np.arange(config.chunk) >= rng.integers(1, config.chunk + 1, size=(size, 1))
    return actions, is_pad, rng.normal(size=(size, config.latent)).astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    case = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]["actionvae_post"]
    config = convert.config_from_foreign(case["config"], latent=case["latent_dim"], kl_weight=case["kl_weight"])
    weights = load_file(GOLDEN / "actionvae_post.weights.safetensors")
    graphdef, template = build(config)
    params = to_params(convert.table(config), weights, template, ignored=tuple(convert.constants(config)))
    io = load_file(GOLDEN / "actionvae_post.io.safetensors")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, noise):
        return nnx.merge(graphdef, params).loss(io["actions"], io["is_pad"], noise)

    return case, config, weights, graphdef, params, io, loss


def test_weights_round_trip(golden):
    case, config, weights, _, params, _, _ = golden
    again = to_foreign(convert.table(config), params) | convert.constants(config)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    foreign = convert.config_to_foreign(config)
    assert foreign == {k: case["config"][k] for k in foreign}


def test_encode_matches_golden(golden):
    *_, graphdef, params, io, _ = golden
    model = nnx.merge(graphdef, params)
    encode = jax.jit(model.encode)
    np.testing.assert_allclose(encode(io["actions"], io["is_pad"]), io["latent_info"], atol=2e-5)
    np.testing.assert_allclose(encode(io["actions"], np.zeros((4, 8), bool)), io["no_pad_latent_info"], atol=2e-5)


def test_decode_matches_golden(golden):
    *_, graphdef, params, io, _ = golden
    decode = jax.jit(nnx.merge(graphdef, params).decode)
    for latent_info, noise, prefix in (
        (io["latent_info"], io["eps"][0], "decode"),
        (io["latent_info"], io["eps"][0], "fwd"),
        (io["ext_latent_info"], io["eps"][1], "ext"),
        (io["ext_latent_info"], 0.0, "ext_mean"),
    ):
        mean, log_variance = np.split(latent_info, 2, axis=-1)
        actions, is_pad = decode(mean + np.exp(log_variance / 2) * noise)
        np.testing.assert_allclose(actions, io[f"{prefix}_a_hat"], atol=2e-5, err_msg=prefix)
        np.testing.assert_allclose(is_pad, io[f"{prefix}_is_pad_hat"], atol=2e-5, err_msg=prefix)


def test_losses_and_gradients_match_golden(golden):
    case, config, _, _, params, io, loss = golden
    (total, parts), gradients = loss(params, io["eps"][0])
    np.testing.assert_allclose(total, io["loss_total"], rtol=1e-5)
    np.testing.assert_allclose(parts["l1"], io["loss_l1"], rtol=1e-5)
    np.testing.assert_allclose(parts["kl"], io["loss_kl"], rtol=1e-5)
    foreign = to_foreign(convert.table(config), gradients)
    for name, norm in case["grad_norms"].items():
        assert abs(np.linalg.norm(foreign[name]) - (norm or 0.0)) <= 1e-5 + 1e-4 * (norm or 0.0), name
    for name in (k for k in io if k.startswith("grad.")):
        np.testing.assert_allclose(
            foreign[name[5:]], io[name], atol=1e-5 + 1e-4 * np.linalg.norm(io[name]), err_msg=name
        )
    assert {k.split(".")[0] for k in case["unused_parameters"]} == set(UNTRAINED)


def test_six_training_steps_match_golden(golden):
    case, *_, params, io, loss = golden
    optimizer = optax.adamw(1e-3, weight_decay=1e-4)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for row, noise in zip(case["train6"]["rows"], io["eps"][2:], strict=True):
        (total, parts), gradients = loss(params, noise)
        params, state = update(params, state, gradients)
        np.testing.assert_allclose([total, parts["l1"], parts["kl"]], row, rtol=1e-3)


def test_pre_norm_matches_torch():
    """An independent pre-norm module on nn.MultiheadAttention: DETR's `forward_pre`, as the public code kept it.

    Its cross-attention reads the memory alone; only post-norm layers put the targets beside it.
    """
    config = dataclasses.replace(TINY, pre_norm=True)
    graphdef, params = build(config, seed=3)
    weights = {k: torch.tensor(v).float() for k, v in to_foreign(convert.table(config), params).items()}
    F = torch.nn.functional

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(q, k, v, name, mask=None):
        module = torch.nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        module.load_state_dict({k[len(name) + 1 :]: v for k, v in weights.items() if k.startswith(name + ".")})
        return module(q, k, v, key_padding_mask=mask, need_weights=False)[0]

    def mlp(x, name):
        return linear(F.relu(linear(x, f"{name}.linear1")), f"{name}.linear2")

    def encoder(x, pos, name, mask=None):
        for i in range(config.encoder_layers):
            layer = f"{name}.layers.{i}"
            y = norm(x, f"{layer}.norm1")
            x = x + attend(y + pos, y + pos, y, f"{layer}.self_attn", mask)
            x = x + mlp(norm(x, f"{layer}.norm2"), layer)
        return norm(x, f"{name}.norm")

    actions, is_pad, noise = batch(config)
    with torch.no_grad():
        x = torch.cat(
            [weights["cls_embed.weight"].expand(4, 1, -1), linear(torch.tensor(actions), "encoder_action_proj")], 1
        )
        mask = torch.cat([torch.zeros(4, 1, dtype=bool), torch.tensor(is_pad)], 1)
        x = encoder(x, torch.tensor(convert.constants(config)["pos_table"]), "encoder", mask)
        latent_info = linear(x[:, 0], "latent_proj")

        x = linear(torch.tensor(noise), "latent_out_proj")[:, None]
        pos, query = weights["pos.weight"], weights["query_embed.weight"]
        memory = encoder(x, pos, "transformer.encoder")
        x = x.expand(-1, config.chunk, -1)
        for i in range(config.decoder_layers):
            layer = f"transformer.decoder.layers.{i}"
            y = norm(x, f"{layer}.norm1")
            x = x + attend(y + query, y + query, y, f"{layer}.self_attn")
            y = norm(x, f"{layer}.norm2")
            x = x + attend(y + query, memory + pos, memory, f"{layer}.multihead_attn")
            x = x + mlp(norm(x, f"{layer}.norm3"), layer)
        decoded = linear(norm(x, "transformer.decoder.norm"), "action_head")

    ours = jax.jit(lambda m: (m.encode(actions, is_pad), m.decode(noise)[0]))(nnx.merge(graphdef, params))
    np.testing.assert_allclose(ours[0], latent_info, atol=2e-5)
    np.testing.assert_allclose(ours[1], decoded, atol=2e-5)
    exported = torch_action_vae.ActionVAE(config, state_dim=6).eval()
    exported.load_state_dict(weights | {k: torch.tensor(v) for k, v in convert.constants(config).items()})
    with torch.no_grad():
        np.testing.assert_allclose(exported.encode(torch.tensor(actions), torch.tensor(is_pad)), latent_info, atol=2e-5)
        np.testing.assert_allclose(exported.decode(torch.tensor(noise))[0], decoded, atol=2e-5)


@pytest.fixture(scope="module")
def tiny():
    """Parameters of TINY and its compiled ((loss, parts), gradients) of (params, actions, is_pad, noise, key)."""
    graphdef, params = build(TINY)
    return params, jax.jit(jax.value_and_grad(lambda p, *args: nnx.merge(graphdef, p).loss(*args), has_aux=True))


def test_all_padded_chunk_is_finite(tiny):
    params, loss = tiny
    actions, _, noise = batch(TINY)
    (value, _), gradients = loss(params, actions, np.ones((4, TINY.chunk), bool), noise)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_padded_steps_do_not_matter(tiny):
    params, loss = tiny
    actions, is_pad, noise = batch(TINY)
    assert is_pad.any()
    (one, _), gradients = loss(params, actions, is_pad, noise)
    (two, _), again = loss(params, np.where(is_pad[..., None], 1e3, actions).astype(np.float32), is_pad, noise)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, again)


def test_untrained_parameters_have_no_gradient(tiny):
    params, loss = tiny
    _, gradients = loss(params, *batch(TINY))
    for name, group in gradients.items():
        assert (name in UNTRAINED) == all(not np.any(g) for g in jax.tree.leaves(group)), name


def test_masked_mean_counts_only_valid_elements(tiny):
    params, loss = tiny
    actions, is_pad, noise = batch(TINY)
    graphdef, _ = build(dataclasses.replace(TINY, masked_mean=True))
    masked = jax.jit(lambda m: m.loss(actions, is_pad, noise)[1])(nnx.merge(graphdef, params))
    plain = loss(params, actions, is_pad, noise)[0][1]
    np.testing.assert_allclose(masked["l1"], plain["l1"] / (1 - is_pad.mean()), rtol=1e-5)
    np.testing.assert_allclose(masked["kl"], plain["kl"], rtol=1e-6)
    nothing = jax.jit(lambda m: m.loss(actions, np.ones_like(is_pad), noise)[1])(nnx.merge(graphdef, params))
    assert nothing["l1"] == 0


def test_dropout_follows_its_key(tiny):
    params, _ = tiny
    graphdef, _ = build(TINY)
    loss = jax.jit(lambda key: nnx.merge(graphdef, params).loss(*batch(TINY), key)[0])
    one, again, two = (loss(jax.random.key(i)) for i in (1, 1, 2))
    assert one == again and one != two


def test_dropout_keeps_the_mean():
    x = jnp.full((64, 1001), 3.0)
    y = np.asarray(fast_dropout(x, 0.1, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 3 / 0.9], rtol=1e-4)
    assert abs(y.mean() - 3) < 0.02
    assert abs((y == 0).mean() - 0.1) < 0.005
    assert abs(np.corrcoef(y[:, :-1].ravel(), y[:, 1:].ravel())[0, 1]) < 0.01


def test_half_precision_compute_keeps_parameters_float32():
    actions, is_pad, noise = batch(TINY)
    _, params = build(TINY)
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: ActionVAE(TINY, rngs=nnx.Rngs(0), dtype=dtype)))  # noqa: B023
        outputs.append(jax.jit(lambda m: (m.encode(actions, is_pad), m.decode(noise)[0]))(nnx.merge(graphdef, params)))
    for full, half in zip(*outputs, strict=True):
        assert half.dtype == jnp.float32 and np.any(full != half)
        np.testing.assert_allclose(full, half, atol=0.1)


def test_initialisation():
    """float32, axes declared for every dimension, outputs of order one."""
    model = jax.jit(lambda: ActionVAE(TINY, rngs=nnx.Rngs(0)))()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert len(leaf.axes) == leaf[...].ndim and leaf[...].dtype == jnp.float32, path
    decoded = jax.jit(model.decode)(batch(TINY)[2])[0]
    assert 0.1 < np.abs(decoded).max() < 10


def test_wrong_inputs_are_named():
    graphdef, params = build(TINY)
    with pytest.raises(ValueError, match="data.chunk is 5 and its action_vae_model.action_dim 3"):
        nnx.merge(graphdef, params).encode(np.zeros((1, 6, 3), np.float32), None)
    with pytest.raises(ConfigError, match="unknown hidden_size"):
        convert.config_from_foreign({"hidden_size": 3})
    weights = to_foreign(convert.table(TINY), params)
    weights["extra.weight"] = weights.pop("pos.weight")
    weights["action_head.bias"] = np.zeros(9, np.float32)
    with pytest.raises(
        ValueError, match=r"pos.weight: missing; extra.weight: unexpected; action_head.bias: shape \(9,\)"
    ):
        to_params(convert.table(TINY), weights, params)
