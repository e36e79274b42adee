"""What an operator looks at: losses by kind of token, shares of a batch that are work, norms by group, rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from data_pipelines.loader import Loader
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.config import OptimizerConfig, TrainConfig, TransformerConfig
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.models.losses import chunked_cross_entropy
from rynnvla_jax.models.vla import token_counts
from rynnvla_jax.train import flops, metrics
from rynnvla_jax.train.bad_batches import LeftOutBatches
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.monitor import follows
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import gradients, group_norms
from rynnvla_jax.vocabulary import KINDS, Vocabulary
from tests import tiny
from tests.distributed.test_sharding import CONFIG, robot_batch


def test_losses_of_single_tokens_add_up_to_the_sum():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 5, 8)).astype(np.float32), rng.normal(size=(8, 12)).astype(np.float32)
    targets, weights = rng.integers(0, 12, (2, 5)), (rng.random((2, 5)) < 0.5).astype(np.float32)
    sums = chunked_cross_entropy(hidden, head, targets, weights, np.ones(12, bool), 4)
    wanted = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(hidden @ head), targets)
    np.testing.assert_allclose(sums.losses, wanted, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(weights * sums.losses), sums.cross_entropy, rtol=1e-5)


def test_cross_entropy_by_kind_of_token_adds_up_and_survives_micro_batches():
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(accumulation=2))
    objective, batch = OBJECTIVES["robot"], robot_batch()
    graphdef, params = params_lib.split(objective.build(config, nnx.Rngs(0)))
    kinds = np.arange(116, dtype=np.int32) % 2  # no delimiters
    vae = params_lib.split(ActionVAE(config.action_vae_model, rngs=nnx.Rngs(1)))[1]
    run = jax.jit(lambda p, f, b: gradients(config, objective, graphdef, p, f, b, jax.random.key(3))[1])
    found = {k: float(v) for k, v in run(params, Frozen(action_vae=vae, kinds=jnp.asarray(kinds)), batch).items()}
    trained = batch["loss_mask"].copy()
    trained[:, 0] = False
    counts = {name: int((trained & (kinds[batch["tokens"]] == i)).sum()) for i, name in enumerate(KINDS)}
    parts = [found[f"cross_entropy/{name}"] * counts[name] for name in ("text", "image")]
    assert sum(parts) / trained.sum() == pytest.approx(found["cross_entropy"], rel=1e-5)
    assert np.isnan(found["cross_entropy/delimiter"]) and counts["delimiter"] == 0
    assert found["trained_share"] == pytest.approx(trained.sum() / trained.size)
    assert found["tokens"] == pytest.approx(trained.size * (1 - found["padding_share"]))
    assert "parts" not in found


def test_every_token_has_a_kind():
    vocabulary = Vocabulary(
        40, bos=0, begin_image=30, end_image=31, new_line=32, grid_tokens=(33, -1, 34), code_to_token=np.arange(4, 20)
    )
    found = [KINDS[kind] for kind in vocabulary.kinds()]
    assert found[:4] == ["text"] * 4 and found[4:20] == ["image"] * 16 and found[20:30] == ["text"] * 10
    assert found[30:35] == ["delimiter"] * 5 and found[35:40] == ["text"] * 5 and found[40:] == ["delimiter"] * 4


def test_padding_and_attention_across_clips_are_no_work():
    tokens = np.array([[0, 7, 0, 5, 0, 0], [0, 3, 2, 1, 4, 9]])  # a text begins with 0; padding follows the last token
    mask = np.array([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]], bool)
    found = token_counts({"tokens": tokens, "loss_mask": mask})
    assert (found["tokens"], found["attention_pairs"]) == (4 + 6, 1 + 2 + 3 + 4 + 21)
    assert [tuple(map(float, x)) for x in found["parts"].values()] == [(4, 12), (2, 12)]
    packed = {"segments": np.array([[1, 1, 2, 2, 2, 0]]), "positions": np.array([[0, 1, 0, 1, 2, 0]])}
    found = token_counts({"tokens": tokens[:1], "loss_mask": mask[:1], **packed})
    assert (found["tokens"], found["attention_pairs"]) == (5, 1 + 2 + 1 + 2 + 3)


def test_utilization_counts_tokens_and_pairs():
    c = TransformerConfig()
    whole = flops.training_flops(c, 4096, 4096 * 4096 / 2)
    weights = (flops.training_flops(c, 1, 0)) / 6
    assert whole == pytest.approx(6 * 4096 * (weights + c.num_layers * 4096 * c.width))
    config = TrainConfig(stage="video", peak_flops=1e12)
    clock = metrics.Clock(config)
    clock.since -= 10.0
    clock.finished(100.0, trained=True, pairs=500.0)
    read = clock.read()
    assert read["tokens_per_second"] == pytest.approx(10, rel=0.1)
    wanted = flops.training_flops(config.vla.transformer, 100, 500) / 10 / 1e12 / jax.device_count()
    assert read["model_flop_utilization"] == pytest.approx(wanted, rel=0.1)
    assert "tokens_per_second" not in clock.read()


def test_peaks_of_recent_devices_are_known():
    kinds = ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x", "NVIDIA B200", "NVIDIA GB200", "cpu")
    assert [flops.peak_flops(kind) / 1e12 for kind in kinds] == [197, 459, 918, 1153.5, 2250, 2500, 0]


def test_memory_is_told_where_devices_tell_it(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": n * 2**30}) for n in (2, 3)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [*devices, Device(None)])
    assert metrics.peak_memory() == {"peak_memory_gib": 3.0}
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(None)])
    assert metrics.peak_memory() == {}


def test_norms_by_group_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    blocks = {"w_up": draw(20, 4, 8), "norm": draw(20, 4)}
    grads = {"transformer": {"blocks": blocks, "embed": draw(6, 4)}, "action_head": {"kernel": draw(4, 2)}}
    found = group_norms(grads)
    names = [name.removeprefix("grad_norm/") for name in found]
    assert [n for n in names if n.startswith("layers")][:2] == ["layers_0_2", "layers_3_5"] and len(names) == 8 + 2
    assert {"embed", "action_head"} < set(names)
    np.testing.assert_allclose(sum(x**2 for x in found.values()) ** 0.5, optax.global_norm(grads), rtol=1e-6)
    first = {"a": blocks["w_up"][:3], "b": blocks["norm"][:3]}
    np.testing.assert_allclose(found["grad_norm/layers_0_2"], optax.global_norm(first), rtol=1e-6)


def test_a_run_that_is_extended_says_what_follows():
    saved = TrainConfig(
        stage="video", total_steps=100, optimizer=OptimizerConfig(peak_lr=1e-3, min_lr=1e-5, warmup_steps=0.0)
    )
    assert follows(saved, dataclasses.replace(saved, log_every=7), 100, 100) == []
    (line,) = follows(saved, dataclasses.replace(saved, total_steps=200), 100, 103)
    assert line == "what follows step 100: learning rate 1.02e-05 -> 0.000505"
    (line,) = follows(saved, dataclasses.replace(saved, batch_size=4), 64, 512)
    assert line == (
        "what follows step 64: batches of 8 -> 4 examples, data position 512 -> 512: none is skipped or repeated"
    )


def test_another_batch_size_neither_skips_nor_repeats(tmp_path, capsys):
    """A run of two updates of 16 goes on with batches of 8, then of 16: the examples are those of one stream."""
    keys = {"checkpoint.every_steps": 1, "checkpoint.keep": 9}
    for size, steps in ((16, 2), (8, 3), (16, 4)):
        config = tiny.typed(tiny.config("action_vae", tiny.SO100, batch_size=size, total_steps=steps, **keys))
        train(config, tmp_path / "run")
    assert "batches of 8 -> 16 examples, data position 40 -> 40: none is skipped or repeated" in capsys.readouterr().err
    data = [reader.read_json(reader.step_folder(tmp_path / "run", step), "data") for step in (2, 3, 4)]
    assert data[0] == {"step": 2, "skipped": [], "not_applied": 0}  # as before
    assert [d.get("batches") for d in data[1:]] == [[[0, 0, 16], [2, 32, 8]], [[0, 0, 16], [2, 32, 8], [3, 40, 16]]]
    loader = Loader(config, progress=False)
    plain, spanned = loader.batches(2), loader.batches(3, (), [(0, 0, 16), (2, 32, 8), (3, 40, 16)])
    first, second, later = next(plain)["actions"], next(plain)["actions"], next(spanned)["actions"]
    np.testing.assert_array_equal(later, np.concatenate([first[8:], second[:8]]))
    plain.close()
    spanned.close()
    left_out = LeftOutBatches(tmp_path / "run", 5, 8)
    left_out.resume(data[0])
    assert left_out.spans == [(0, 0, 16), (2, 32, 8)]  # a checkpoint of an older version says no more than that
