"""The held-out loss: training does not feel it, it is one number however it is computed, and it means what it says.

Action errors are compared with those of the policy itself, which is other code.
"""

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines import held_out
from data_pipelines.episode import DataError, Episode
from data_pipelines.sources import open_source
from rynnvla_jax.actions import Statistics, decode_chunk, normalize_actions
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.cli.main import main
from rynnvla_jax.columns import ActionColumn, Column, Columns, distance
from rynnvla_jax.config import ConfigError, DataConfig, MeshConfig, to_dict
from rynnvla_jax.distributed import preemption
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.models.frozen import Frozen
from rynnvla_jax.models.vqgan import to_unit_range
from rynnvla_jax.stage import STAGES, start_counts
from rynnvla_jax.train import assets as assets_lib
from rynnvla_jax.train import evaluation, metrics, stages
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.saved_evaluation import evaluate_saved
from tests import tiny
from tests.train.test_train import run_config

# Of the six episodes of the demo, three are held out; every key has a value that is not its default.
SHARE = {"evaluation.share": 0.4, "evaluation.every_steps": 2, "evaluation.examples": 11}


def evaluations(workdir):
    return metrics.read(workdir, "eval.jsonl")


def assert_same_training(first, second):
    for name in ("metrics.jsonl", "assets/statistics.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    one, other = (model_dir.load_params(workdir)[0] for workdir in (first, second))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def evaluated(assets, tmp_path_factory):
    """A run of stage 3 with dropout and jitter."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    train(run_config("robot", assets, **SHARE, **{"data.image.jitter": 0.3}), workdir)
    return workdir


def test_training_does_not_feel_it(assets, evaluated, tmp_path, capsys):
    off = {**SHARE, "evaluation.every_steps": 0, "data.image.jitter": 0.3}
    train(run_config("robot", assets, **off), tmp_path / "off")
    assert_same_training(evaluated, tmp_path / "off")
    assert not (tmp_path / "off" / "eval.jsonl").exists()
    said = capsys.readouterr().err
    assert re.search(r"held out   lerobot:\S+: 3 of 6 episodes, of . of 3 instructions", said)
    assert "on held-out data" not in said
    assert [line["step"] for line in evaluations(evaluated)] == [2, 4, 6]
    with pytest.raises(ConfigError, match="was started with config.evaluation.share 0.4 and seed 0, not 0 and 0"):
        train(run_config("robot", assets, **{**off, "evaluation.share": 0.0}), tmp_path / "off")
    timing = metrics.read(evaluated, "timing.jsonl")
    assert timing[-1]["step"] == 6 and 0 < timing[-1]["evaluation_share"] < 1
    assert timing[-1]["evaluation_seconds"] > timing[2]["evaluation_seconds"] > 0
    assert timing[-1]["evaluation_share"] + timing[-1]["goodput"] <= 1


@pytest.fixture(scope="module")
def evaluated_vae(assets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated") / "vae"
    train(run_config("action_vae", assets, **SHARE), workdir)
    return workdir


def test_a_resumed_run_has_the_same_evaluations(assets, evaluated_vae, tmp_path, monkeypatch):
    """Stopped after step 4, which is saved before it could be evaluated; then killed in the evaluation of step 6."""
    config = run_config("action_vae", assets, **SHARE)
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(preemption.Notice, "came", lambda self: next(calls) == 4)
        with pytest.raises(preemption.Preempted):
            train(config, tmp_path / "run")
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2]
    with monkeypatch.context() as patch:
        call, calls = evaluation.Evaluator.__call__, iter(range(1, 100))

        def killed(self, params):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return call(self, params)

        patch.setattr(evaluation.Evaluator, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [2, 4]
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "eval.jsonl").read_bytes() == (evaluated_vae / "eval.jsonl").read_bytes()
    assert_same_training(tmp_path / "run", evaluated_vae)


def test_any_mesh_and_batch_give_the_same_number(evaluated):
    """Eleven examples: with batches of 8 and of 2 the last one is filled up differently."""
    step, values = evaluate_saved(evaluated, mesh=MeshConfig(data=2, fsdp=1, tensor=2, sequence=2), batch_size=2)
    logged = evaluations(evaluated)[-1]
    assert {"step": step, **values} == pytest.approx(logged, rel=2e-5) and len(logged) == 3 + 3 * (1 + 6 + 5) + 1


def test_action_errors_are_those_of_the_policy(evaluated):
    """Each example's chunk by the policy, from the recorded observation, against the recorded targets."""
    policy, config = JaxPolicy(evaluated), model_dir.read_train_config(evaluated)
    source = open_source(tiny.SO100, config.data, ("front", "wrist"), progress=False)
    (parts,) = held_out.split([source], config.evaluation)
    span, after = STAGES["robot"].window(config, published=True)
    windows = [(e, t) for e in parts.held_out for t in range(int(start_counts(len(e), span, after)))]
    picked = [windows[(2 * i + 1) * len(windows) // 22] for i in range(11)]
    errors = {name: [] for name in ("action_error", "hold_still_error", "repeat_motion_error")}
    for episode, t in picked:
        true = episode.action[t : t + 5]
        frames = (episode.frames(view, [t])[0] for view in ("front", "wrist"))
        chunk = policy.act(*frames, episode.state[t], episode.text(t))
        motion = episode.action[t - 1] - (episode.action[t - 2] if t > 1 else episode.state[t - 1])
        still = np.tile(episode.state[t], (5, 1))
        repeated = still + motion * np.arange(1, 6)[:, None]
        still[:, 5] = repeated[:, 5] = episode.action[t - 1, 5]  # the gripper is kept as recorded
        for name, guess in zip(errors, (chunk, still, repeated), strict=True):
            errors[name].append(np.abs(guess - true))
    logged = evaluations(evaluated)[-1]
    for name, found in errors.items():
        mean = np.mean(found, axis=0)
        assert logged[name] == pytest.approx(mean.mean(), rel=1e-4)
        assert logged[f"{name}/gripper"] == pytest.approx(mean[:, 5].mean(), rel=1e-4)
        ahead = [logged[f"{name}/ahead_{i}"] for i in range(1, 6)]
        np.testing.assert_allclose(ahead, mean.mean(1), rtol=1e-4)


def test_an_action_vae_is_evaluated_without_its_noise(evaluated_vae):
    config = model_dir.read_train_config(evaluated_vae)
    (source,) = [open_source(tiny.EGODEX, config.data, (), progress=False)]
    (parts,) = held_out.split([source], config.evaluation)
    statistics = Statistics.from_json(evaluated_vae / "assets" / "statistics.json")
    graphdef, _ = nnx.split(stages.build_action_vae(config, nnx.Rngs(0)))
    model = nnx.merge(graphdef, model_dir.load_params(evaluated_vae)[0])
    windows = [(e, t) for e in parts.held_out for t in range(int(start_counts(len(e), 0, 6)))]
    picked = [windows[(2 * i + 1) * len(windows) // 22] for i in range(11)]
    actions = np.stack([normalize_actions(e.chunk(t, 5), statistics) for e, t in picked])
    mean, log_variance = np.split(np.asarray(model.encode(actions, None)), 2, axis=-1)
    rebuilt = np.asarray(model.decode(mean)[0])
    last = evaluations(evaluated_vae)[-1]
    assert last["l1"] == pytest.approx(np.abs(rebuilt - actions).mean(), rel=1e-5)
    kl = -0.5 * (1 + log_variance - mean**2 - np.exp(log_variance)).sum(-1).mean()
    assert last["kl"] == pytest.approx(kl, rel=1e-5)
    apart = [
        np.abs(decode_chunk(r, e.state[t], statistics) - decode_chunk(a, e.state[t], statistics))
        for r, a, (e, t) in zip(rebuilt, actions, picked, strict=True)
    ]
    assert last["action_error"] == pytest.approx(np.mean(apart), rel=1e-4)


def test_an_image_tokenizer_is_evaluated_by_its_loss():
    """On a batch of real rows it is what training would log; rows that fill up count for nothing."""
    config = tiny.typed(tiny.config("vqgan", tiny.SO100))
    model = stages.build_vqgan(config, nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    _, trained = jax.jit(lambda: model.loss(to_unit_range(images[:2])))()
    batch = {"images": images, "real": np.array([True, True, False])}
    measured = jax.jit(lambda: stages.measure_vqgan(model, Frozen(), batch, config))()
    for name, (total, count) in measured.means.items():
        assert float(total / count) == pytest.approx(float(trained[name]), rel=1e-5), name
    share = np.asarray(measured.codes) / measured.codes.sum()
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert np.exp(entropy) == pytest.approx(float(trained["perplexity"]), rel=1e-5)


def test_packed_mixed_and_encoded_ahead(assets, tmp_path):
    """Two clips in a row, the last row has one; accumulation; a mixture; codes made ahead; another data set."""
    keys = {
        "data.source": "",
        "data.mixture": ((tiny.EGODEX, 1.0), (f"{tiny.EGODEX}/.", 3.0)),
        "data.frame_codes": "ahead",
        "sequence.clips": 2,
        "sequence.length": 256,
        "optimizer.accumulation": 2,
        "batch_size": 16,
        "total_steps": 2,
    }
    config = run_config("video", assets, **{**SHARE, **keys, "evaluation.examples": 10})
    train(config, tmp_path / "ahead")
    _, again = evaluate_saved(tmp_path / "ahead")  # encodes the frames itself
    (logged,) = evaluations(tmp_path / "ahead")
    assert {"step": 2, **again} == pytest.approx(logged, rel=1e-5)
    _, other = evaluate_saved(tmp_path / "ahead", sources=(tiny.EGODEX,))
    assert other["cross_entropy"] > 0
    with pytest.raises(ConfigError, match="no held-out data .*name data with --source"):
        evaluate_saved(unheld(tmp_path / "ahead", tmp_path / "copy"))


def unheld(workdir, copy):
    """A work dir whose run held nothing out."""
    shutil.copytree(workdir, copy)
    file = copy / "assets" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["evaluation"]
    file.write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_bad_data_to_evaluate_on_is_named_before_training(assets, tmp_path):
    for keys, error, message in (
        ({"sources": (tiny.SO100 + "/",)}, ConfigError, "evaluation.sources names lerobot:.* which the run trains on"),
        ({"sources": ("lerobot:/gone",)}, DataError, "data source 'lerobot:/gone': /gone does not exist"),
        ({"sources": (tiny.EGODEX,)}, (ConfigError, DataError), "egodex"),
        ({"share": 1e-7}, DataError, "holds out none of 6 episodes; set it to"),
    ):
        with pytest.raises(error, match=message):
            config = run_config("robot", assets, **{f"evaluation.{name}": value for name, value in keys.items()})
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_models_that_have_seen_held_out_episodes_are_told(assets, tmp_path):
    robot = run_config("robot", assets, **SHARE)
    for name, keys in (("vae", {}), ("fair", SHARE)):
        config = run_config("action_vae", assets, **{"data.source": tiny.SO100, **keys})
        (tmp_path / name / "assets").mkdir(parents=True)
        (tmp_path / name / "assets" / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    frozen = {"action_vae": tmp_path / "vae"}
    (said,) = assets_lib.seen_warnings(robot, frozen)
    assert "the action VAE and its statistics" in said and "share 0 and seed 0, this one has 0.4 and 0" in said
    assert assets_lib.seen_warnings(run_config("robot", assets), frozen) == []
    assert assets_lib.seen_warnings(replace(robot, data=replace(robot.data, source=tiny.EGODEX)), frozen) == []
    assert assets_lib.seen_warnings(robot, {"action_vae": tmp_path / "fair"}) == []
    less = replace(robot, evaluation=replace(robot.evaluation, share=0.3))
    assert assets_lib.seen_warnings(less, {"action_vae": tmp_path / "fair"}) == []


def test_distances_go_the_short_way_round():
    columns = (
        ActionColumn("yaw", "degrees", "euler", pair=0),
        ActionColumn("grip", "", "gripper"),
        *(ActionColumn(name, "", "quaternion", pair=1 + i) for i, name in enumerate("abcd")),
        *(ActionColumn(name, "radians", "rotation_vector", pair=5 + i) for i, name in enumerate("xyz")),
    )
    one = np.array([[179.0, 350.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 3.1]])
    other = np.array([[-178.0, 10.0, -0.5, -0.5, -0.5, -0.4, 0.0, 0.0, -3.1]])
    expected = np.array([[3.0, 340.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 2 * np.pi - 6.2]])
    np.testing.assert_allclose(distance(one, other, columns), expected, atol=1e-12)
    np.testing.assert_allclose(distance(other, one, columns), expected, atol=1e-12)


def test_baselines_hold_still_and_repeat_the_last_motion():
    columns = Columns(
        "r",
        (Column("a"),),
        (ActionColumn("a", pair=0), ActionColumn("g"), ActionColumn("d", delta=True)),
    )
    episode = Episode(
        name="e",
        texts=("t",),
        text_of=np.zeros(4, np.int32),
        fps=1.0,
        state=np.array([[0.0], [1.0], [3.0], [6.0]], np.float32),
        action=np.array([[1.5, 7.0, 0.1], [3.5, 8.0, 0.2], [6.5, 9.0, 0.3], [9.0, 9.0, 0.4]], np.float32),
        columns=columns,
    )
    expected = [[0.0, 7.0, 0.0], [1.5, 7.0, 0.1], [2.0, 8.0, 0.2], [3.0, 9.0, 0.3]]
    last = np.stack([episode.last_motion(t) for t in range(4)])
    np.testing.assert_allclose(last, expected, rtol=1e-6)
    still, repeated = evaluation.baselines(2, last, columns)
    np.testing.assert_allclose(still[3], [[0.0, 9.0, 0.0]] * 2)
    np.testing.assert_allclose(repeated[3], [[3.0, 9.0, 0.3]] * 2, rtol=1e-6)


def test_the_last_motion_is_seen_from_the_camera_of_now():
    (source,) = [open_source(tiny.EGODEX, DataConfig(), (), progress=False)]
    episode = source[0]
    for t in (1, 2, 40):
        moved = (episode.action[t - 1] - episode.origin[t - 1]).reshape(2, 3)
        np.testing.assert_allclose(
            episode.last_motion(t), (moved @ episode.world_to_camera[t].T).ravel(), rtol=1e-4, atol=1e-6
        )
    assert not episode.last_motion(0).any()


def test_the_command_evaluates_any_checkpoint(evaluated_vae, tmp_path, capsys):
    steps, out = reader.steps(evaluated_vae), tmp_path / "loss.json"
    assert main(["evaluate-loss", str(evaluated_vae), "--step", str(steps[0]), "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["step"] == steps[0] < steps[-1] and found["l1"] != evaluations(evaluated_vae)[-1]["l1"]
    said = capsys.readouterr().out
    assert re.search(r"error of +action +hold still +repeat motion\nall ", said)
    assert re.search(rf"\nright wrist x +{found['action_error/right_wrist_x']:.5g} ", said) and "\nahead 5 " in said
    for words, message in (
        (["--examples", "0"], "--examples 0 must be at least 1"),
        (["--step", "77"], "77"),
        (["--source", "lerobot:/gone"], "/gone does not exist"),
        (["--source", tiny.SO100], "what columns mean"),
    ):
        assert main(["evaluate-loss", str(evaluated_vae), *words]) == 1
        assert message in capsys.readouterr().err
