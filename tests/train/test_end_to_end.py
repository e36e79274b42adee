"""Train a stage, export it, run the export without JAX: the PyTorch policy and the JAX policy agree."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipelines.sources import open_sources
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.cli.evaluate import open_workdir, recording_of
from rynnvla_jax.config import ConfigError, InitFromConfig
from rynnvla_jax.deploy import server
from rynnvla_jax.deploy.policy import Policy, PolicyError
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.recording import Recording
from rynnvla_jax.sim.drive import driver
from rynnvla_jax.train.loop import train
from tests import ROOT, tiny

WITHOUT_JAX = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "data_pipelines"):
            raise ImportError(f"{name} is not on a robot")
sys.meta_path.insert(0, Refuse())
import json, numpy as np
from rynnvla_jax.deploy.policy import Policy
inputs = np.load(sys.argv[2])
policy = Policy.load(sys.argv[1])
targets = policy.act(inputs["front"], inputs["wrist"], inputs["state"], "put the pen into the holder")
print(json.dumps(targets.tolist()))
"""


@pytest.fixture(scope="module")
def trained(curriculum, tmp_path_factory):
    """(work dir, export folder, config) of a stage 3 run of a few steps."""
    workdir, export = curriculum / "robot", tmp_path_factory.mktemp("end_to_end") / "export"
    assert cli.main(["convert", "export", str(workdir), str(export)]) == 0
    return workdir, export, model_dir.read_train_config(workdir)


def observations(config, count=6):
    (episodes,) = open_sources(config, progress=False)
    for i in range(count):
        episode, step = episodes[i % len(episodes)], 10 + 7 * i
        frames = [episode.frames(view, [step])[0] for view in ("front", "wrist")]
        yield *frames, episode.state[step], episode.text(step)


def test_torch_policy_agrees_with_the_jax_policy(trained):
    workdir, export, config = trained
    ours, theirs = JaxPolicy(workdir), Policy.load(export)
    for front, wrist, state, text in observations(config):
        a, b = ours.act(front, wrist, state, text), theirs.act(front, wrist, state, text)
        assert a.shape == b.shape == (5, 6) and np.abs(a).max() > 1  # degrees, not normalised numbers
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_raw_actions_need_no_action_vae(trained, tmp_path):
    workdir, _, config = trained
    assets = workdir / "assets"
    with pytest.raises(
        ConfigError, match="action_outputs is 64 but raw actions are 5 steps of 6 numbers, which makes it 30; leave"
    ):
        old = tiny.config("robot", tiny.SO100, **{"vla.actions": "raw"})
        old.vla.action_outputs = 64
        tiny.typed(old)
    raw = dataclasses.replace(
        config,
        vla=dataclasses.replace(config.vla, actions="raw"),
        tokenizer=str(assets / "tokenizer.json"),
        vqgan=str(assets / "vqgan"),
        action_vae="",
        init_from=InitFromConfig(),
    )
    train(raw, tmp_path / "raw")
    train(dataclasses.replace(raw, total_steps=raw.total_steps + 1), tmp_path / "raw")  # goes on, statistics and all
    assert cli.main(["convert", "export", str(tmp_path / "raw"), str(tmp_path / "export")]) == 0
    assert not (tmp_path / "export" / "action_vae").exists()
    ours, theirs = JaxPolicy(tmp_path / "raw"), Policy.load(tmp_path / "export")
    for front, wrist, state, text in observations(raw, 2):
        a, b = ours.act(front, wrist, state, text), theirs.act(front, wrist, state, text)
        assert a.shape == (5, 6) and np.abs(a).max() > 1
        np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(PolicyError, match="raw actions"):
        theirs.act(front, wrist, state, text, generator=torch.Generator())


def test_an_evaluation_drives_a_work_dir_as_it_drives_its_export(trained):
    workdir, export, config = trained
    front, wrist, state, text = next(observations(config))
    columns = Policy.load(export).statistics.columns
    scene = SimpleNamespace(
        state=state, instruction=text, columns=columns, render=lambda camera: front if camera == "front" else wrist
    )
    ours, theirs = (driver(str(folder), 2, False, open_workdir) for folder in (workdir, export))
    for drives in (ours, theirs):
        drives.begin(scene, 0, 1)
    for _ in range(3):
        np.testing.assert_allclose(ours.target(scene), theirs.target(scene), atol=1e-4)
    with pytest.raises(PolicyError, match="furlongs"):
        JaxPolicy(workdir).act(front, wrist, state, text, columns.with_joints("", "furlongs"))
    with pytest.raises(PolicyError, match="give a work dir of stage trajectory or robot"):
        driver(str(workdir / "assets" / "action_vae"), 2, False, open_workdir)


def test_export_answers_where_jax_cannot_be_imported(trained, tmp_path):
    _, export, config = trained
    front, wrist, state, _ = next(observations(config))
    np.savez(tmp_path / "in.npz", front=front, wrist=wrist, state=state)
    command = [sys.executable, "-c", WITHOUT_JAX, str(export), str(tmp_path / "in.npz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = Policy.load(export).act(front, wrist, state, "put the pen into the holder")
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)


def test_a_wrong_state_is_refused_not_answered(trained):
    _, export, config = trained
    front, wrist, state, text = next(observations(config))
    with pytest.raises(PolicyError, match="7"):
        Policy.load(export).act(front, wrist, np.zeros(7), text)
    radians = Policy.load(export).statistics.columns.with_joints("", "radians")
    with pytest.raises(PolicyError, match="in -100..100 and in radians"):
        Policy.load(export).act(front, wrist, state, text, radians)


def test_how_the_data_were_recorded_travels_to_the_robot(trained):
    workdir, export, config = trained
    front, wrist, state, text = next(observations(config))
    (source,) = open_sources(config, progress=False)
    expected = Recording(source.rates, tuple(sorted(source.frame_sizes)))
    assert expected.rates == (30.0,) and expected.frames
    theirs = Policy.load(export)
    assert theirs.recording == JaxPolicy(workdir).recording == recording_of(str(workdir)) == expected
    assert recording_of(str(export)) == expected and theirs.example().front.shape[:2] == expected.frames[0]
    assert server.metadata_of(theirs)["rates"] == [30.0]
    wide = np.concatenate([front, front], axis=1)
    for policy in (theirs, JaxPolicy(workdir)):
        with pytest.raises(PolicyError, match="front image has .*; use the camera's mode of that aspect ratio"):
            policy.act(wide, wrist, state, text)
