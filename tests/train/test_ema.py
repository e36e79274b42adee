"""The average of the weights (`optimizer.ema`) of a whole run: resumed, and used by whatever reads weights."""

import shutil

import jax
import numpy as np
import pytest

from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.cli.evaluate import open_workdir
from rynnvla_jax.config import ConfigError, InitFromConfig
from rynnvla_jax.convert import exporter, stream, verify
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.inference import imagine
from rynnvla_jax.report import examples, page
from rynnvla_jax.train import evaluation, metrics
from rynnvla_jax.train.evaluation import EMA
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.saved_evaluation import evaluate_saved
from tests import conftest
from tests.train.test_train import run_config

KEYS = {"total_steps": 4, "checkpoint.every_steps": 2, "optimizer.ema": 0.9, "optimizer.warmup_steps": 0.0}
KEYS |= {"evaluation.share": 0.4, "evaluation.every_steps": 2, "evaluation.examples": 8}


@pytest.fixture(scope="module")
def averaged(assets):
    """The work dir of a run of four updates that keeps an average."""
    directory = conftest.once("averaged", lambda path: train(run_config("robot", assets, **KEYS), path / "run"))
    return directory / "run"


def arrays_of(workdir, step):
    return {path: array.read() for path, array in reader.open_step(reader.step_folder(workdir, step)).items()}


def flat(params):
    return {path_string(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def ema_of(workdir):
    return flat(model_dir.load_params(workdir, weights="ema")[0])


def test_a_run_that_is_resumed_keeps_the_same_average_bit_for_bit(averaged, assets, tmp_path):
    """As after a kill: only the checkpoint in the middle is left."""
    shutil.copytree(averaged, tmp_path / "run")
    shutil.rmtree(reader.step_folder(tmp_path / "run", 4))
    train(run_config("robot", assets, **KEYS), tmp_path / "run")
    whole, resumed = arrays_of(averaged, 4), arrays_of(tmp_path / "run", 4)
    assert whole.keys() == resumed.keys() and any(reader.AVERAGE in path for path in whole)
    for path, values in whole.items():
        np.testing.assert_array_equal(resumed[path], values, err_msg=path)


def test_held_out_data_are_evaluated_with_the_average_too(averaged):
    """As `evaluate_saved` does with each, which reads weights from the checkpoint."""
    lines = metrics.read(averaged, "eval.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    last = {k: x for k, x in lines[-1].items() if k != "step"}
    own, average = ({k: x for k, x in last.items() if k.startswith(EMA) == is_ema} for is_ema in (False, True))
    assert {f"{EMA}{name}" for name in own} == set(average) and "ema/action_error/gripper" in average
    for weights, values in (("raw", own), ("ema", average)):
        found = {k.removeprefix(EMA): x for k, x in values.items()}
        assert evaluate_saved(averaged, weights=weights)[1] == pytest.approx(found, rel=1e-4), weights
    assert own["action_l1"] != pytest.approx(average["ema/action_l1"], rel=1e-6)
    assert "; their average action_l1" in evaluation.line(last)
    names = [name for name, *_ in page.held_out_rows(lines)]
    assert "cross-entropy, held out" in names and "cross-entropy, held out, average of the weights" in names


def test_the_average_is_between_the_weights_it_was_made_of(averaged):
    raw, average = flat(model_dir.load_params(averaged)[0]), ema_of(averaged)
    assert raw.keys() == average.keys() and {x.dtype for x in average.values()} == {np.dtype(np.float32)}
    up = "transformer.blocks.w_up"
    earlier = np.asarray(model_dir.load_params(averaged, step=2)[0]["transformer"]["blocks"]["w_up"])
    distance = np.abs(average[up] - earlier).mean() / np.abs(raw[up] - earlier).mean()
    assert 0.05 < distance < 0.95


def test_an_export_of_the_average_is_verified_against_it(averaged, tmp_path):
    (tmp_path / "export").mkdir()
    report = exporter.write_export(averaged, tmp_path / "export", weights="ema")
    assert "the weights are the average over the updates (optimizer.ema)" in report.notes
    assert not verify.failures(verify.verify(averaged, tmp_path / "export", weights="ema"))
    found = stream.open_params(averaged, 4, "ema")
    np.testing.assert_array_equal(found["transformer.embed"].read(), ema_of(averaged)["transformer.embed"])


def test_policies_pictures_and_pages_take_the_average_on_request(averaged):
    wanted = ema_of(averaged)
    for params in (
        open_workdir(str(averaged), weights="ema").params,
        imagine.load(imagine.find(averaged, "ema")).params,
    ):
        assert {k: v.tobytes() for k, v in flat(params).items()} == {k: v.tobytes() for k, v in wanted.items()}
    config = model_dir.read_train_config(averaged)
    evidence = examples.evaluate(averaged, config, examples.open_loader(averaged, config), "ema")
    assert (evidence.weights_of_step, evidence.weights) == (4, "ema")


def test_a_run_starts_from_the_average_of_another(averaged, assets, tmp_path, capsys):
    keys = {"init_from.path": str(averaged), "init_from.weights": "ema", "init_from.new": (), "total_steps": 1}
    still = {"optimizer.peak_lr": 0.0, "optimizer.min_lr": 0.0}
    train(run_config("robot", assets, **keys, **still), tmp_path / "next")
    assert f"average of the weights from {averaged}" in capsys.readouterr().err
    started, wanted = flat(model_dir.load_params(tmp_path / "next")[0]), ema_of(averaged)
    for path, values in wanted.items():
        np.testing.assert_array_equal(started[path], values, err_msg=path)


def test_what_keeps_no_average_says_so(averaged, assets, curriculum, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no average of the weights: it was not trained with config.optimizer.ema"
    ):
        model_dir.load_params(curriculum / "robot", weights="ema")
    with pytest.raises(ConfigError, match=r"init_from.weights is 'average'; choose one of raw, ema"):
        InitFromConfig(weights="average")
    shutil.copytree(averaged, tmp_path / "run")
    longer = run_config("robot", assets, **{**KEYS, "total_steps": 6, "optimizer.ema": 0.0})
    with pytest.raises(
        ConfigError, match=r"optimizer.ema was 0.9 and is 0.0; set it back, or start from these weights"
    ):
        train(longer, tmp_path / "run")
