"""Losses by source of a mixture: they add up to the loss, no source is lost between lines, and nothing forgets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.loader import Loader
from data_pipelines.sources import short_names
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.config import DataConfig, OptimizerConfig
from rynnvla_jax.distributed import preemption
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.report import page
from rynnvla_jax.train import by_source, metrics
from rynnvla_jax.train.by_source import BySource
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import gradients
from tests import tiny
from tests.distributed.test_sharding import CONFIG, robot_batch

MIXTURE = ((tiny.SO100, 15.0), (f"{tiny.SO100}/.", 1.0))
ONE, OTHER = "source/1_so100", "source/2_so100"


def mixed(**keys):
    """Batches of 8 from sources of 15 to 1: every other batch has none of the second."""
    own = {"data.mixture": MIXTURE, "log_every": 4, "total_steps": 9, "checkpoint.every_steps": 3}
    config = tiny.config("action_vae", "", **{**own, **keys})
    return tiny.typed(config)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_of_sources_add_up_to_the_loss(accumulation):
    data = dataclasses.replace(CONFIG.data, source="", mixture=(("a:x", 1.0), ("b:y", 1.0), ("c:z", 1.0)))
    config = dataclasses.replace(CONFIG, data=data, optimizer=OptimizerConfig(accumulation=accumulation))
    objective, batch = OBJECTIVES["robot"], robot_batch()
    source = (np.arange(len(batch["tokens"])) % 2 * 2).astype(np.int32)  # none of the second
    graphdef, params = params_lib.split(objective.build(config, nnx.Rngs(0)))
    frozen = Frozen(action_vae=params_lib.split(ActionVAE(config.action_vae_model, rngs=nnx.Rngs(1)))[1])
    run = jax.jit(lambda p, b: gradients(config, objective, graphdef, p, frozen, b, jax.random.key(3)))
    (grads, plain), (same, told) = run(params, batch), run(params, {**batch, "source": jnp.asarray(source)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, same)
    found = {name: np.asarray(x) for name, x in told.pop("by_source").items()}
    assert {k: float(x) for k, x in told.items()} == pytest.approx({k: float(x) for k, x in plain.items()}, nan_ok=True)
    half = len(source) / 2
    np.testing.assert_array_equal(found["rows"], [half, 0, half])
    for name in ("cross_entropy", "action_l1"):
        sums, counts = found[f"{name}/sum"], found[f"{name}/count"]
        assert sums.sum() / counts.sum() == pytest.approx(float(plain[name]), rel=1e-5)
        assert sums[1] == counts[1] == 0 and sums[0] != pytest.approx(sums[2], rel=1e-6)
    trained = batch["loss_mask"][source == 2][:, 1:].sum()
    assert found["cross_entropy/count"][2] == trained


def test_sums_go_on_where_a_checkpoint_left_them():
    """Lines of a run that is continued after any step, with an update that is not applied on the way."""
    rng = np.random.default_rng(0)
    steps = [{"rows": [2, i % 2], "l1/sum": rng.random(2) * [1, i % 2], "l1/count": [1, i % 2]} for i in range(12)]
    make = lambda **more: BySource(("a", "b"), [(10, 1), (5, 4)], 4, 3, **more)  # noqa: E731

    def follow(tracker, first):
        lines = {}
        for i in range(first, 12):
            tracker.finished(i, steps[i], trained=i != 5)
            lines[i + 1] = tracker.read(i + 1)
            saved[i + 1] = tracker.data(i)["by_source"] if i > first else None
        return lines

    saved = {}
    whole = follow(make(), 0)
    kept = dict(saved)
    assert whole[4]["source/b/l1"] == (steps[1]["l1/sum"][1] + steps[3]["l1/sum"][1]) / 2
    assert whole[8]["source/b/l1"] == steps[7]["l1/sum"][1]  # the update of step 5 was not applied
    assert "source/b/l1" not in whole[5] and whole[8]["source/a/examples"] == 14
    assert (whole[12]["source/b/examples"], whole[12]["source/b/epochs"]) == (4 * 5, 4 * 5 / 5)
    for first in range(1, 10):
        assert follow(make(step=first, totals=kept[first + 1]), first) == {k: x for k, x in whole.items() if k > first}
    assert BySource((), [(10, 1)], 4, 3).data(0) == {}


def test_a_mixture_is_told_by_source_and_a_resumed_run_tells_the_same(tmp_path, monkeypatch):
    config = mixed()
    train(config, tmp_path / "whole")
    lines = metrics.read(tmp_path / "whole")
    assert [line["step"] for line in lines] == [4, 8, 9]
    first, _, last = lines
    assert (first[f"{ONE}/examples"], first[f"{OTHER}/examples"], last[f"{ONE}/examples"]) == (30, 2, 68)
    _, (count, _) = Loader(config, progress=False).epochs
    assert last[f"{OTHER}/epochs"] == last[f"{OTHER}/examples"] / count
    assert f"{OTHER}/l1" in first and f"{ONE}/l1" in last
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(preemption.Notice, "came", lambda self: next(calls) == 6)
        with pytest.raises(preemption.Preempted):
            train(config, tmp_path / "parts")
    assert reader.read_json(reader.step_folder(tmp_path / "parts", 6), "data")["by_source"]["1_so100"]["seen"] == 45
    train(config, tmp_path / "parts")
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    section = page.section(1, page.read_run(tmp_path / "whole"))
    assert dict(section["facts"])["Seen so far"].startswith("1_so100: 68 examples, ")
    assert any(name == "L1 of normalised actions, of 2_so100" for name, *_ in section["metrics"])


def test_rows_say_their_source_for_any_processes_and_workers():
    """Of gathered rows, and of single examples."""
    mixture = ((tiny.SO100, 3.0), (f"{tiny.SO100}/.", 1.0))
    for stage, workers in (("action_vae", 0), ("vqgan", 2)):
        config = tiny.typed(tiny.config(stage, "", **{"data.mixture": mixture, "data.num_workers": workers}))
        batches = Loader(config, progress=False).batches(3)
        whole = next(batches)["source"]
        batches.close()
        assert whole.dtype == np.int32 and np.bincount(whole).tolist() == [6, 2]
        parts = []
        for rows in (np.arange(4), np.arange(4, 8)):
            batches = Loader(config, rows=rows, progress=False).batches(3)
            parts.append(next(batches)["source"])
            batches.close()
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_one_source_is_not_told_apart(tmp_path):
    logged = train(tiny.typed(tiny.config("action_vae", tiny.SO100, total_steps=1)), tmp_path)
    assert not any(name.startswith("source/") for name in logged)
    assert by_source.KEY not in reader.read_json(reader.step_folder(tmp_path, 1), "data")


def test_names_of_sources_tell_them_apart():
    name = lambda *sources: short_names(DataConfig(mixture=tuple((s, 1.0) for s in sources)))  # noqa: E731
    assert name("lerobot:/data/pick", "egodex:/data/hands/") == ("pick", "hands")
    assert name("rlds:/a/bridge/1.0.0", "rlds:gs://b/fractal/1.0.0") == ("bridge_1.0.0", "fractal_1.0.0")
    assert name("lerobot:/a/x", "records:/a/x") == ("1_x", "2_x")
