"""The loop from the command line and from Python: resume, hand-off between stages, clear errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.episode import DataError
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.config import ConfigError, to_dict
from rynnvla_jax.storage import lease
from rynnvla_jax.train import assets as assets_lib
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.stages import Frozen
from rynnvla_jax.train.step import like_codebook
from tests import tiny
from tests.command import ROOT, Command


def run_config(stage, assets, **overrides):
    if stage == "robot":
        own = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "action_vae": assets["vae_robot"]}
        return tiny.typed(tiny.config(stage, tiny.SO100, **{**own, **overrides}))
    own = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"]}
    if stage == "trajectory":
        own["action_vae"] = assets["vae_hand"]
    return tiny.typed(tiny.config(stage, tiny.EGODEX, **{**own, **overrides}))


def test_codes_like_the_codebook_start_alike_where_their_pixels_are_alike():
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(4, 8))
    book = np.repeat(centres, 8, axis=0) + 0.1 * rng.normal(size=(32, 8))  # four kinds of patches, eight codes each
    ids = rng.permutation(np.arange(4, 36)).astype(np.int32)
    before = rng.normal(size=(64, 16)).astype(np.float32)
    frozen = Frozen(vqgan={"codebook": jnp.asarray(book, jnp.float32)}, code_to_token=jnp.asarray(ids))
    params = {"transformer": {"embed": jnp.asarray(before), "head": jnp.zeros(3)}}
    after = np.asarray(like_codebook(params, frozen, 0)["transformer"]["embed"])
    others = np.setdiff1d(np.arange(64), ids)
    np.testing.assert_array_equal(after[others], before[others])
    rows = after[ids]
    distance = np.linalg.norm(rows[:, None] - rows, axis=-1)
    kind = np.arange(32) // 8
    assert distance[kind[:, None] == kind].max() < distance[kind[:, None] != kind].min() / 4
    np.testing.assert_array_equal(np.asarray(like_codebook(params, frozen, 0)["transformer"]["embed"]), after)


def test_a_run_from_scratch_may_start_from_the_codebook(assets, tmp_path):
    last = train(run_config("video", assets, codes_like_codebook=True, total_steps=2), tmp_path / "run")
    assert np.isfinite(last["loss"])
    with pytest.raises(ConfigError, match="leave it out with init_from.path"):
        run_config("trajectory", assets, codes_like_codebook=True, **{"init_from.path": str(tmp_path / "run")})


def params_of(workdir, step=-1):
    return jax.tree.map(np.asarray, model_dir.load_params(workdir, step=step)[0])


@pytest.mark.slow  # test_alive has two such kills, storage/test_kills.py one before every change of a file
def test_killed_runs_end_bit_identical(tmp_path):
    """Kills at random steps and in the middle of a save; the same command continues to the very same bits."""
    whole, killed = (
        Command(tmp_path / name, tmp_path / "cache", total_steps=24, checkpoint__every_steps=4)
        for name in ("whole", "killed")
    )
    whole.finish()
    rng = random.Random(0)
    first, second = rng.randint(2, 6), rng.randint(9, 12)
    for when in (lambda: killed.lines() >= first, lambda: killed.lines() >= second, killed.saving):
        assert killed.run(when) == [-signal.SIGKILL]
    assert killed.saving(), "the last kill came after the save was committed"
    killed.finish()
    assert (killed.workdir / "metrics.jsonl").read_bytes() == (whole.workdir / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, params_of(killed.workdir), params_of(whole.workdir))
    assert not killed.saving()


def test_metrics_drop_lines_after_the_checkpoint_and_half_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo', encoding="utf-8"
    )
    metrics.MetricsWriter(tmp_path, 1)
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_damaged_line_of_the_metrics_costs_that_line_only(tmp_path, capsys):
    sound = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.0}\n', b'{"step": 3, "loss": 0.5}\n']
    damaged = [b"5\n", b"\xff\xfe\n", b'{"step": null}\n', b'{"st\n']
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(sound[0] + b"".join(damaged) + sound[1] + sound[2])
    metrics.MetricsWriter(tmp_path, 2)
    assert file.read_bytes() == sound[0] + sound[1]
    assert f"{file}: 4 damaged lines left out" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[]", b'{"started": "now"}', b"\xff", b"[" * 10**5])
def test_a_damaged_heartbeat_stops_nothing(tmp_path, capsys, content):
    (tmp_path / "heartbeat.json").write_bytes(content)
    metrics.Heartbeat(tmp_path).begin(3)
    assert json.loads((tmp_path / "heartbeat.json").read_bytes())["step"] == 3
    assert "renamed to heartbeat.json.damaged" in capsys.readouterr().err


def test_stages_hand_over_weights_and_assets(curriculum):
    """video -> trajectory -> robot; what is new is listed, the rest is inherited unchanged."""
    before, after = params_of(curriculum / "video"), params_of(curriculum / "trajectory")
    jax.tree.map(np.testing.assert_array_equal, before["transformer"], after["transformer"])
    assert set(after) - set(before) == {"state_projection", "action_head"}
    logged = metrics.read(curriculum / "robot")[-1]
    assert {"cross_entropy", "action_l1", "z_loss", "token_accuracy", "grad_norm", "learning_rate"} < set(logged)
    written = json.loads((curriculum / "robot/assets/config.json").read_text(encoding="utf-8"))
    assert written["vla"]["transformer"]["vocab_size"] > 0  # resolved
    for name in ("tokenizer.json", "statistics.json", "vqgan/assets/model.json", "action_vae/assets/statistics.json"):
        assert (curriculum / "robot/assets" / name).exists(), name


def test_codes_made_ahead_train_as_codes_made_in_the_step(assets, curriculum, tmp_path):
    config = run_config("video", assets, total_steps=2, **{"data.frame_codes": "ahead"})
    assert model_dir.read_train_config(curriculum / "video").data.frame_codes == "step"
    step = {"step": 2, **train(config, tmp_path / "ahead")}
    assert step == pytest.approx(metrics.read(curriculum / "video")[-1], rel=1e-4)


def test_another_architecture_is_refused_by_name(assets, curriculum, tmp_path):
    shutil.copytree(curriculum / "video", tmp_path / "video")
    config = run_config(
        "trajectory", assets, **{"init_from.path": str(tmp_path / "video"), "vla.transformer.feed_forward": 96}
    )
    with pytest.raises(
        CheckpointError, match=r"w_up has shape \(2, 32, 64\) in the checkpoint, but \(2, 32, 96\) in the model"
    ):
        train(config, tmp_path / "other")
    config = run_config("trajectory", assets, **{"init_from.path": str(tmp_path / "video"), "init_from.new": ()})
    with pytest.raises(CheckpointError, match="action_head.layer_0.kernel is missing"):
        train(config, tmp_path / "other")
    config = run_config("video", assets, **{"vla.transformer.num_layers": 1, "total_steps": 3})
    before = contents(tmp_path / "video")
    with pytest.raises(ConfigError, match="would change what they mean: config.vla.transformer.num_layers: 2 -> 1 "):
        train(config, tmp_path / "video")  # resuming
    assert contents(tmp_path / "video") == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("steps", [1, 2])
def test_what_weights_mean_cannot_be_changed_under_them(curriculum, tmp_path, steps):
    """Of a finished run (2 steps) and of one that would continue; nothing of it is written."""
    shutil.copytree(curriculum / "robot", tmp_path / "robot")
    start = {
        "init_from.path": str(curriculum / "trajectory"),
        "action_vae": str(curriculum.parent / "assets/vae_robot"),
    }
    wanted = {"data.front": "observation.images.wrist", "data.wrist": "observation.images.front"}
    wanted |= {"sequence.language_first": False, "total_steps": 2 * steps}
    before = contents(tmp_path / "robot")
    with pytest.raises(ConfigError) as refused:
        train(tiny.typed(tiny.config("robot", tiny.SO100, **start, **wanted)), tmp_path / "robot")
    for line in (
        "data.front: 'observation.images.front' -> 'observation.images.wrist'",
        "data.wrist: 'observation.images.wrist' -> 'observation.images.front'",
        "sequence.language_first: True -> False",
    ):
        assert f"config.{line}" in str(refused.value)
    assert contents(tmp_path / "robot") == before


def test_what_weights_mean_is_read_from_the_checkpoint(curriculum, tmp_path):
    shutil.copytree(curriculum / "robot", tmp_path / "robot")
    file = tmp_path / "robot/assets/config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["data"]["normalization"], content["log_every"] = "min_max", 7
    file.write_text(json.dumps(content), encoding="utf-8")
    config = model_dir.read_train_config(tmp_path / "robot")
    assert (config.data.normalization, config.log_every) == ("mean_std", 7)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"batch_size": 12}, ConfigError, "not a multiple of the 8 batch shards"),
        ({"tokenizer": "nowhere.json"}, ConfigError, "config.tokenizer nowhere.json does not exist"),
        ({"tokenizer": str(ROOT)}, ConfigError, f"config.tokenizer {ROOT} is a directory; give the tokenizer.json"),
        ({"tokenizer": str(ROOT / "tests/golden/manifest.json")}, ConfigError, "is not a BPE tokenizer.json"),
        ({"tokenizer": str(ROOT / "tests/golden/actionvae_post.io.safetensors")}, ConfigError, "is not JSON"),
        ({"vqgan": ""}, ConfigError, "stage robot needs config.vqgan"),
        ({"vla.state_dim": 7}, ConfigError, "set it to 6"),
        ({"data.chunk": 7}, ConfigError, "data.chunk is 7 but the action VAE encodes 5"),
        ({"vla.action_outputs": 32}, ConfigError, "action_outputs is 32"),
        ({"vla.transformer.vocab_size": 99}, ConfigError, "vocab_size is 99"),
        ({"sequence.length": 60}, ConfigError, "increase it, or use fewer or smaller frames"),
        ({"data.source": "lerobot:nowhere"}, DataError, "nowhere does not exist"),
        ({"data.columns.state": ("nothing",)}, ConfigError, "no column .nothing."),
        ({"data.front": "observation.images.top"}, ConfigError, "set --config.data.front to one of observation"),
        ({"init_from.path": "nowhere"}, ConfigError, "config.init_from.path: nowhere does not exist"),
        ({"mesh.data": 3}, ConfigError, "8 devices"),
    ],
)
def test_bad_input_is_one_clear_line_before_training(assets, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        train(run_config("robot", assets, **overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"init_from.step": 7}, CheckpointError, "has no step 7"),
        ({"init_from.new": ("nonsense.*",)}, CheckpointError, "pattern 'nonsense.*' matches no parameter"),
        ({}, CheckpointError, "transformer.blocks.wq is missing"),
        ({"init_from.path": "", "mesh.tensor": 8}, ConfigError, "is not a multiple of mesh axis tensor=8"),
        ({"init_from.path": "", "sequence.length": 60}, ConfigError, "increase it, or use fewer or smaller frames"),
        ({"init_from.path": "", "batch_size": 4096}, DataError, "fewer than one batch of 4096"),
    ],
)
def test_faults_are_told_before_frames_are_encoded(assets, tmp_path, overrides, error, message):
    start = {"data.frame_codes": "ahead", "init_from.path": assets["vqgan"]}  # a model, but none of this kind
    with pytest.raises(error, match=message):
        train(run_config("robot", assets, **start | overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "codes").exists()


def test_a_work_dir_that_cannot_be_one_is_named(tmp_path):
    config = tiny.typed(tiny.config("action_vae", tiny.SO100))
    (tmp_path / "file").write_text("", encoding="utf-8")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"--workdir {workdir} cannot be created.*use another directory"):
            train(config, workdir)


@pytest.mark.parametrize(
    ("file", "saved", "remedy"),
    [
        ("assets/config.json", "checkpoints/5/params", "restore it from a copy"),
        ("assets/config.json", "assets", "restore it from a copy"),
    ],
)
def test_a_damaged_file_of_a_work_dir_is_named(tmp_path, file, saved, remedy):
    (tmp_path / saved).mkdir(parents=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"sta', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{file} is damaged .*; {remedy}"):
        train(tiny.typed(tiny.config("action_vae", tiny.SO100)), tmp_path)


def test_data_that_changed_is_refused_before_it_is_encoded(assets, tmp_path):
    left_out = tmp_path / "exclude.json"
    config = run_config("robot", assets, total_steps=1, **{"data.frame_codes": "ahead", "data.exclude": str(left_out)})
    others = [f"episode_{i:06d}" for i in range(1, 6)]  # few frames to encode
    left_out.write_text(json.dumps({"episodes": {tiny.SO100: others}}), encoding="utf-8")
    train(config, tmp_path / "run")
    encoded = sorted((tmp_path / "run/codes").rglob("*"))
    left_out.write_text(json.dumps({"episodes": {tiny.SO100: others[1:]}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="episodes 1 -> 2"):
        train(config, tmp_path / "run")
    assert sorted((tmp_path / "run/codes").rglob("*")) == encoded


def test_a_started_work_dir_needs_nothing_else_and_stays_what_it_is(assets, tmp_path):
    shutil.copytree(assets["vqgan"], tmp_path / "vqgan")
    train(run_config("video", assets, vqgan=str(tmp_path / "vqgan"), total_steps=3), tmp_path / "video")
    shutil.rmtree(tmp_path / "vqgan")
    train(run_config("video", assets, vqgan=str(tmp_path / "vqgan"), total_steps=4), tmp_path / "video")
    assert [line["step"] for line in metrics.read(tmp_path / "video")] == [1, 2, 3, 4]
    assert list((tmp_path / "video/checkpoints").iterdir())
    with pytest.raises(ConfigError, match="was started with config.vqgan"):
        train(run_config("video", assets, total_steps=5), tmp_path / "video")


def test_a_directory_that_is_no_work_dir_is_left_alone(assets, tmp_path):
    (tmp_path / "mine/assets").mkdir(parents=True)
    (tmp_path / "mine/assets/notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a work dir: it contains assets/notes.txt; use another directory"):
        train(run_config("robot", assets), tmp_path / "mine")
    assert (tmp_path / "mine/assets/notes.txt").read_text(encoding="utf-8") == "keep"
    shutil.copytree(assets["vqgan"], tmp_path / "model")
    with pytest.raises(ConfigError, match="was not trained there"):
        train(run_config("robot", assets), tmp_path / "model")


def test_a_work_dir_that_another_run_holds_is_refused_and_nothing_there_changes(
    curriculum, assets, tmp_path, monkeypatch
):
    workdir = shutil.copytree(curriculum / "video", tmp_path / "run")
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    with lease.hold(workdir, "testing in"):
        before = {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file() and p.name != "lease.json"}
        with pytest.raises(lease.LeaseError, match=f"another process is training in {workdir}: process {os.getpid()}"):
            train(run_config("video", assets, total_steps=99), workdir)
        assert all(p.read_bytes() == before[p] for p in sorted(workdir.rglob("*")) if p in before)
        # What is finished holds nothing, and writes nothing.
        train(run_config("video", assets, total_steps=2), workdir)
    assert not (workdir / "lease.json").exists()


def test_logs_may_lie_in_a_new_work_dir(tmp_path):
    (tmp_path / "run.log").write_text("rynnvla train ...", encoding="utf-8")
    (tmp_path / "logs").mkdir()
    (tmp_path / "heartbeat.json.damaged").write_text("", encoding="utf-8")  # of a start that was killed early
    (tmp_path / "programs" / "xla").mkdir(parents=True)
    with pytest.raises(ConfigError, match="it contains programs"):
        assets_lib.check_workdir(tmp_path)
    assets_lib.check_workdir(tmp_path, str(tmp_path / "programs" / "xla"))
    shutil.rmtree(tmp_path / "programs")
    assets_lib.check_workdir(tmp_path)
    (tmp_path / "assets/vqgan").mkdir(parents=True)
    (tmp_path / "assets/vqgan/mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a work dir: it contains assets/vqgan/mine.txt"):
        assets_lib.check_workdir(tmp_path)


@pytest.mark.parametrize("name", ["lr[1e-5]", "a*b", "why?/run"])
def test_names_under_which_orbax_cannot_save_are_refused(assets, tmp_path, name):
    with pytest.raises(ConfigError, match="checkpoints cannot be saved under a path with"):
        train(run_config("robot", assets), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_name_that_a_locale_without_utf_8_spells_otherwise_is_refused_with_a_remedy():
    program = "from rynnvla_jax.checkpoint import model_dir; model_dir.check_path(__import__('sys').argv[1])"
    latin = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment, status in ((latin, 1), ({**latin, "LC_ALL": "C.UTF-8"}, 0)):
        done = subprocess.run(
            [sys.executable, "-c", program, "lauf_1\N{LATIN SMALL LETTER U WITH DIAERESIS}"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == status and ("set LC_ALL=C.UTF-8" in done.stderr) == bool(status), done.stderr


def test_a_corrected_command_replaces_what_a_failed_one_left(assets, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size is 99"):
        train(run_config("video", assets, **{"vla.transformer.vocab_size": 99}), tmp_path / "run")
    stale = tmp_path / "run/assets/vqgan/checkpoints/77"
    stale.mkdir()
    train(run_config("video", assets, total_steps=1), tmp_path / "run")
    assert not stale.exists()


def test_an_action_vae_of_another_normalisation_is_refused(assets, tmp_path):
    shutil.copytree(assets["vae_robot"], tmp_path / "vae")
    learned = tiny.typed(tiny.config("action_vae", tiny.SO100))
    (tmp_path / "vae/assets/config.json").write_text(json.dumps(to_dict(learned)), encoding="utf-8")
    with pytest.raises(ConfigError, match="normalization is 'min_max' but the action VAE was trained with 'mean_std'"):
        train(
            run_config("robot", assets, action_vae=str(tmp_path / "vae"), **{"data.normalization": "min_max"}),
            tmp_path / "run",
        )


def test_other_percentiles_than_those_of_the_statistics_are_refused(assets, tmp_path):
    wanted = {"data.normalization": "min_max", "data.percentile_range": (5.0, 95.0)}
    with pytest.raises(ConfigError, match=r"percentile_range is \(5.0, 95.0\) but the statistics.* \(1.0, 99.0\)"):
        train(run_config("robot", assets, **wanted), tmp_path / "run")


def test_missing_statistics_are_named(assets, tmp_path):
    shutil.copytree(assets["vae_robot"], tmp_path / "vae")
    (tmp_path / "vae/assets/statistics.json").unlink()
    with pytest.raises(ConfigError, match="statistics.json is missing"):
        train(run_config("robot", assets, action_vae=str(tmp_path / "vae")), tmp_path / "run")


def test_reference_frame_sizes_that_are_no_multiple_of_32_are_refused(assets, tmp_path):
    from rynnvla_jax.config import ImageConfig
    from rynnvla_jax.images import frame_size
    from rynnvla_jax.sequence import frame_length

    with pytest.raises(ValueError, match="multiples of 32"):
        frame_length(*frame_size(48, 70, ImageConfig(shortest_edge=64, fit="reference_train")))


def test_command_line_says_did_you_mean_and_helps():
    def call(*arguments):
        command = [sys.executable, "-m", "rynnvla_jax.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, text = call("--help")
    assert code == 0 and "convert" in text and "train" in text
    code, text = call("trian")
    assert code == 2 and "Did you mean train?" in text
    code, text = call("train", "--config=configs/robot.py:tiny", "--workdir=x", "--config.optimizer.peak_learn=1")
    assert code != 0 and "peak_lr" in text and "Traceback" not in text
    code, text = call("train", "--config=configs/robot.py:tiny")
    assert code != 0 and "--workdir is required" in text
    code, text = call("train", "--config=configs/nowhere.py", "--workdir=x")
    assert code != 0 and "configs/nowhere.py" in text and "Traceback" not in text


STARTS = """
import sys
from pathlib import Path
import data_pipelines.loader, rynnvla_jax.train.loop
from rynnvla_jax.train.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), 0)
writer.write(1, {"loss": 1.0}, {})
writer.close()
slow = {"torch", "tensorflow", "tensorflow_datasets"} & set(sys.modules)
assert not slow, slow
import torch
"""


def test_a_start_imports_nothing_slow_that_it_does_not_use(tmp_path):
    done = subprocess.run([sys.executable, "-c", STARTS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(assets, tmp_path):
    with pytest.raises(FloatingPointError, match="peak_lr"):
        train(
            run_config("video", assets, **{"optimizer.peak_lr": 1e30, "optimizer.warmup_steps": 0.0}), tmp_path / "run"
        )
