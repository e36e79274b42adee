"""Policies whose action is not their state: trained, exported, verified, loaded, asked locally and over a socket."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from data_pipelines.loader import Loader
from data_pipelines.sources import open_sources
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, DataConfig, VLAConfig
from rynnvla_jax.convert.importer import import_checkpoint
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.control import Controller
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.deploy.policy import Policy, PolicyError
from rynnvla_jax.deploy.remote import RemotePolicy
from rynnvla_jax.deploy.server import metadata_of
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.models.params import split
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.stages import OBJECTIVES
from tests import tiny
from tests.deploy.serving import running
from tests.recordings import encoded, grey_ramp, write_libero, write_rlds

LENGTHS = (16, 18)
CASES = {  # (state, action, relative columns)
    "deltas": (8, 7, ()),
    "subset": (14, 7, (0, 1, 2, 3, 4, 5)),
    "no state": (0, 7, ()),
}


def source(case, root):
    """(source, overrides) of a data set of this case."""
    if case == "no state":
        write_rlds(root, LENGTHS)
        return f"rlds:{root}", {"data.rlds.state": ""}
    write_libero(root, LENGTHS, (CASES[case][0], 7), size=(64, 64))
    keys = {"front": "image", "wrist": "wrist_image", "lerobot.state": "state", "lerobot.action": "actions"}
    more = {"columns.unit": "degrees", **({"columns.actions": "differences"} if case == "deltas" else {})}
    if case == "subset":  # the pairs are not in the places of the action's columns
        info = root / "meta" / "info.json"
        values = json.loads(info.read_text(encoding="utf-8"))
        values["features"]["state"]["names"].reverse()
        info.write_text(json.dumps(values), encoding="utf-8")
    return f"lerobot:{root}", {f"data.{key}": value for key, value in {**keys, **more}.items()}


def untrained_vae(folder, data, over):
    """A model directory of an ActionVAE with the statistics of `data`."""
    config = tiny.typed(tiny.config("action_vae", data, **over, **{"action_vae_model.action_dim": 7}))
    model = OBJECTIVES["action_vae"].build(config, nnx.Rngs(0))
    model_dir.save_model(folder, "action_vae", config.action_vae_model, split(model)[1])
    Loader(config, progress=False).statistics.to_json(folder / "assets" / "statistics.json")
    return str(folder)


@pytest.fixture(scope="module", params=["deltas", pytest.param("subset", marks=pytest.mark.slow), "no state"])
def trained(request, assets, tmp_path_factory):
    """(case, work dir, export, config) of a stage 3 run of two steps, verified by its export."""
    root = tmp_path_factory.mktemp("other_actions")
    data, over = source(request.param, root / "data")
    start = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "init_from.new": ()}
    start["action_vae"] = untrained_vae(root / "vae", data, over)
    start |= {"vla.state_dim": CASES[request.param][0], "total_steps": 2}
    if request.param == "no state":
        start |= {"evaluation.every_steps": 2, "evaluation.examples": 4}
        start["evaluation.sources"] = (source(request.param, root / "other")[0],)
    config = tiny.typed(tiny.config("robot", data, **over, **start))
    logged = train(config, root / "run")
    assert np.isfinite(logged["loss"])
    assert cli.main(["convert", "export", str(root / "run"), str(root / "export")]) == 0
    return request.param, root / "run", root / "export", config


def observations(config, count=2):
    (episodes,) = open_sources(config, progress=False)
    for i in range(count):
        episode, step = episodes[i], 3 + 7 * i
        frames = [episode.frames(view, [step])[0] for view in ("front", "wrist")]
        state = episode.state[step] if config.vla.state_dim else None
        yield Observation(*frames, state, episode.text(step), episode.columns)


def test_both_policies_agree_and_actions_mean_what_their_columns_say(trained):
    case, workdir, export, config = trained
    state, action, relative = CASES[case]
    ours, theirs = JaxPolicy(workdir), Policy.load(export)
    columns = theirs.statistics.columns
    assert (len(columns.state), len(columns.action), columns.relative) == CASES[case]
    for observation in observations(config):
        a, b = ours.act(*observation), theirs.act(*observation)
        assert a.shape == b.shape == (5, action)
        np.testing.assert_allclose(a, b, atol=1e-4)
    if state:
        latents = theirs.latent(theirs.observe([observation]))
        moved = np.arange(1, state + 1, dtype=np.float32)
        raw = np.asarray(observation.state)
        apart = theirs.decode(latents, (raw + moved)[None]) - theirs.decode(latents, raw[None])
        expected = [state - i if i in relative else 0 for i in range(action)]  # the names of states are reversed
        np.testing.assert_allclose(apart[0], np.tile(expected, (5, 1)), atol=1e-3)


def test_it_is_served_checked_and_drives_a_loop(trained, capsys):
    case, _, export, config = trained
    assert cli.main(["deploy", "check", str(export), "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(report["state"]), len(report["action_min"])] == list(CASES[case][:2])
    (observation,) = observations(config, 1)
    policy = Policy.load(export)
    local = policy.act(*observation)
    with running(policy, warm_up=policy.example(), metadata=metadata_of(policy)) as served:
        remote = RemotePolicy(served.url)
        assert ("observation/state" in remote.metadata["keys"]) == (case != "no state")
        assert len(Columns.from_json(remote.metadata["columns"], "").action) == 7
        np.testing.assert_allclose(remote.act(*observation), local, atol=1e-5)
        with Controller(remote, replan_every=2) as controller:
            targets = [controller.target(lambda: observation) for _ in range(4)]
        np.testing.assert_allclose(targets, [*local[:2], *local[:2]], atol=1e-5)
        wrong = np.zeros(3) if case == "no state" else None
        with pytest.raises(
            PolicyError, match="this policy reads none" if case == "no state" else "lacks observation/state"
        ):
            remote.act(*observation._replace(state=wrong))
        remote.close()


def test_a_wrong_state_is_refused_by_both(trained):
    _, workdir, export, config = trained
    (observation,) = observations(config, 1)
    for policy in (JaxPolicy(workdir), Policy.load(export)):
        for wrong in (np.zeros(3), [[1.0]], "abc"):
            with pytest.raises(PolicyError, match="state"):
                policy.act(*observation._replace(state=wrong))


def test_it_comes_back_from_its_export_and_without_a_state_imagines_frames(trained, tmp_path):
    case, workdir, export, _ = trained
    report = import_checkpoint(export, tmp_path / "back")
    back = model_dir.read_model_config(tmp_path / "back", "vla")
    assert not report.new and back.acts and back.state_dim == CASES[case][0]
    if case == "no state":
        (tmp_path / "a.png").write_bytes(encoded(grey_ramp(1, 64)[0]))
        pictures = [f"--image={tmp_path / 'a.png'}", f"--wrist={tmp_path / 'a.png'}", "--text=push"]
        command = ["imagine", str(workdir), *pictures, f"--out={tmp_path / 'out.png'}"]
        assert cli.main([*command, "--state=1,2"]) == 1
        assert cli.main(command) == 0


@pytest.mark.slow
def test_raw_actions_need_not_be_as_wide_as_the_state(assets, tmp_path):
    data, over = source("deltas", tmp_path / "data")
    start = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "init_from.new": (), "total_steps": 1}
    over |= {**start, "vla.state_dim": 8, "vla.actions": "raw"}
    with pytest.raises(ConfigError, match=r"predicts 8; set vla.action_dim to 7"):
        train(tiny.typed(tiny.config("robot", data, **over)), tmp_path / "run")
    config = tiny.typed(tiny.config("robot", data, **over, **{"vla.action_dim": 7}))
    train(config, tmp_path / "run")
    assert cli.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    (observation,) = observations(config, 1)
    a, b = JaxPolicy(tmp_path / "run").act(*observation), Policy.load(tmp_path / "export").act(*observation)
    assert a.shape == (5, 7)
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_an_export_would_refuse_training_refuses_first(assets, tmp_path):
    data, over = source("deltas", tmp_path / "data")
    start = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "init_from.new": (), **over}
    vae = untrained_vae(tmp_path / "vae", data, over)
    with pytest.raises(ConfigError, match="states of 8 values but vla.state_dim is 6; set it to 8"):
        train(tiny.typed(tiny.config("robot", data, **start, action_vae=vae)), tmp_path / "run")
    with pytest.raises(ConfigError, match="vla.state_dim 0; set vla.action_dim"):
        tiny.typed(tiny.config("robot", data, **start, **{"vla.state_dim": 0, "vla.actions": "raw"}))
    start["vla.state_dim"] = 8
    narrow = dataclasses.replace(model_dir.read_model_config(vae, "action_vae"), action_dim=6)
    model_dir.write_model_config(tmp_path / "vae", "action_vae", narrow)
    with pytest.raises(ConfigError, match="describes actions of 7 values, but the action VAE beside it decodes 6"):
        train(tiny.typed(tiny.config("robot", data, **start, action_vae=vae)), tmp_path / "other")


def test_a_video_model_is_still_none_that_acts(tmp_path):
    assert (
        not VLAConfig(state_dim=0).acts
        and VLAConfig(state_dim=6).acts
        and not tiny.typed(tiny.config("video", tiny.EGODEX)).vla.stateless
    )
    config = dataclasses.replace(
        export_format.ExportConfig(
            vla=VLAConfig(state_dim=0, stateless=True),
            sequence=tiny.typed(tiny.config("robot", tiny.SO100)).sequence,
            image=DataConfig().image,
            chunk=5,
            action_dim=7,
            normalization="mean_std",
            cameras=export_format.Cameras("front"),
        )
    )
    assert export_format.config_from_json(export_format.config_to_json(config)).vla.acts
    old = export_format.config_to_json(config)
    del old["stateless"]
    assert not export_format.config_from_json(old).vla.acts
