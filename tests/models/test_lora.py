"""Low-rank adapters: the base at the start, a merged matrix that is the adapted one, and no gradient of the base."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rynnvla_jax.checkpoint import base as base_lib
from rynnvla_jax.config import LORA_TARGETS, LoraConfig, MeshConfig, TrainConfig, from_dict
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.vla import build_adapted_vla, build_vla, loss_counts
from rynnvla_jax.train import finetune
from rynnvla_jax.train.stages import OBJECTIVES

SIZE = {"vocab_size": 64, "vocab_multiple": 1, "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
TRANSFORMER = {**SIZE, "feed_forward": 48, "dropout": 0.0, "image_tokens": [4, 8]}


def config(**changes) -> TrainConfig:
    values = {"stage": "video", "vla": {"transformer": TRANSFORMER, "state_dim": 0}, "compute_dtype": "float32"}
    return from_dict(TrainConfig, {**values, "loss_chunk": 64, **changes})


def lora(rank: int, **more) -> dict:
    return {"lora": {"rank": rank, "alpha": 2.0 * rank}, "base_dtype": "float32", **more}


def batch() -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 64, (8, 16)).astype(np.int32)
    return {"tokens": tokens, "loss_mask": np.ones(tokens.shape, bool)}


def noisy_batch() -> dict:
    """A chain of eight tokens, of which each follows from the last but for chance: no model gets the loss to zero."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, 16, (128, 16))
    for i in range(1, 16):
        tokens[:, i] = np.where(rng.random(128) < 0.8, 8 + tokens[:, i - 1] * 3 % 8, tokens[:, i])
    return {"tokens": tokens.astype(np.int32), "loss_mask": np.ones(tokens.shape, bool)}


def parts(c: TrainConfig):
    """(graph definition, what trains, base) of a model that is not trained yet."""
    graphdef, params = params_lib.split(build_adapted_vla(c, nnx.Rngs(0)))
    return (graphdef, *finetune.split(c.finetune, params))


def loss_of(c, graphdef, params, base=None, rows=None):
    model = nnx.merge(graphdef, params_lib.joined(params, base))
    rows = jax.tree.map(jnp.asarray, rows or batch())
    return model.loss(rows, loss_counts(rows), chunk=c.loss_chunk)[0]


def random_b(params):
    """Adapters whose B is not zero."""
    keys = iter(jax.random.split(jax.random.key(1), 64))
    blocks = params["transformer"]["blocks"]
    drawn = {
        name: {"a": one["a"], "b": 0.1 * jax.random.normal(next(keys), one["b"].shape)}
        for name, one in blocks["lora"].items()
    }
    return {**params, "transformer": {**params["transformer"], "blocks": {**blocks, "lora": drawn}}}


@pytest.mark.parametrize(("compute", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_a_new_adapter_changes_nothing(compute, dtype):
    c = config(compute_dtype=compute, finetune=lora(4, train=["transformer.final_norm"], base_dtype=dtype))
    graphdef, params, base = parts(c)
    one = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    base = jax.tree.map(
        lambda x, kept: x.astype(kept.dtype), base, finetune.abstract_params(c, OBJECTIVES["video"], one)[2]
    )
    assert base["transformer"]["head"].dtype == dtype and base["transformer"]["blocks"]["mlp_norm"].dtype == "float32"
    plain = nnx.split(build_vla(c, nnx.Rngs(0)))
    hidden = jax.jit(lambda g, p: nnx.merge(g, p).hidden(batch()), static_argnums=0)
    np.testing.assert_array_equal(
        hidden(graphdef, params_lib.joined(params, base)), hidden(plain[0], nnx.to_pure_dict(plain[1]))
    )


def test_a_merged_matrix_is_the_adapted_one():
    c = config(finetune=lora(4))
    graphdef, params, base = parts(c)
    params, merged = random_b(params), dict(base["transformer"]["blocks"])
    for name, (matrix, inputs) in base_lib.MATRICES.items():
        a, b = (np.asarray(params["transformer"]["blocks"]["lora"][name][part]) for part in "ab")
        full = base_lib.product(a, b, merged[matrix].shape, inputs, (), np.float32(2.0))
        # Any piece is that piece of the whole.
        piece = (slice(1, 2), *[slice(1, size - 1) for size in full.shape[1:]])
        chex.assert_trees_all_close(base_lib.product(a, b, full.shape, inputs, piece, np.float32(2.0)), full[piece])
        np.testing.assert_allclose(
            base_lib.product(a, b, full.shape, inputs, (1,), np.float32(2.0)), full[1], rtol=1e-5
        )
        merged[matrix] = merged[matrix] + full
    plain = nnx.split(build_vla(c, nnx.Rngs(0)))[0]
    whole = {**base, "transformer": {**base["transformer"], "blocks": merged}}
    adapted = float(jax.jit(lambda p: loss_of(c, graphdef, p, base))(params))
    assert adapted == pytest.approx(float(jax.jit(lambda p: loss_of(c, plain, p))(whole)), rel=1e-5)
    assert adapted != pytest.approx(float(jax.jit(lambda p: loss_of(c, graphdef, p, base))(parts(c)[1])), rel=1e-3)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_the_base_are_not_computed(remat):
    """Not even where a barrier or a kernel with its own backward pass could keep them."""

    def products(**keys):
        c = config(remat=remat, **keys)
        graphdef, params, base = parts(c)
        text = jax.jit(jax.grad(lambda p: loss_of(c, graphdef, p, base))).lower(params).compile().as_text()
        return sum(
            "f32[32,48]" in line.split("=")[1][:14] or "f32[48,32]" in line.split("=")[1][:14]
            for line in text.splitlines()
            if " dot(" in line
        )

    assert products() >= 3  # gate, up and down
    assert products(finetune=lora(4)) == 0
    assert products(finetune={"train": ["transformer.final_norm", "*_norm"], "base_dtype": "float32"}) == 0


def test_adapters_of_full_rank_reach_the_loss_of_full_fine_tuning():
    def trained(c):
        graphdef, params, base = parts(c)
        optimizer = optax.adam(3e-3)

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                loss, grads = jax.value_and_grad(lambda p: loss_of(c, graphdef, p, base, noisy_batch()))(params)
                updates, state = optimizer.update(grads, state)
                return (optax.apply_updates(params, updates), state), loss

            return jax.lax.scan(step, (params, optimizer.init(params)), None, length=60)[1]

        losses = run(params)
        return float(losses[0]), float(losses[-1])

    others = ["transformer.embed", "transformer.head", "*norm*"]
    (start, full), (first, adapted) = trained(config()), trained(config(finetune=lora(32, train=others)))
    assert first == pytest.approx(start, rel=1e-6) and full < 0.4 * start
    assert adapted < 1.02 * full


def test_the_choice_of_matrices():
    assert LoraConfig(rank=4).adapted == LORA_TARGETS and not LoraConfig().adapted
    assert LoraConfig(rank=4, targets=("q", "v")).adapted == ("q", "v")
    assert LoraConfig(rank=4, targets=("[qkvo]", "*p")).adapted == ("q", "k", "v", "o", "up")
    names = {path[3] for path, _ in params_lib.flat(parts(config(finetune=lora(2)))[1])}
    assert names == set(LORA_TARGETS) == set(base_lib.MATRICES)
