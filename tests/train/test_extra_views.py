"""A third camera goes through training, corpora, codes ahead, export, both policies, messages and their refusals."""

import numpy as np
import pytest

from data_pipelines.loader import Loader
from data_pipelines.sources import open_source
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import ConfigError
from rynnvla_jax.deploy.observation import MessageError, Observation, from_message, to_message
from rynnvla_jax.deploy.policy import Policy, PolicyError
from rynnvla_jax.deploy.server import metadata_of
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.sim.drive import driver
from rynnvla_jax.train.loop import train
from rynnvla_jax.vocabulary import TextTokenizer
from tests import tiny
from tests.recordings import write_lerobot

CAMERAS = tuple(f"observation.images.{name}" for name in ("front", "wrist", "left"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cameras") / "set"
    return f"lerobot:{write_lerobot(folder, lengths=(24, 25), videos=CAMERAS, size=(64, 64), scale=0.1)}"


def configured(data, assets, **more):
    raw = {"vla.actions": "raw", "tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "total_steps": 2}
    return tiny.typed(tiny.config("robot", data, **{**raw, "data.extra_views": ("left",), **more}))


@pytest.fixture(scope="module")
def trained(data, assets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("views") / "run"
    logged = train(configured(data, assets), workdir)
    assert cli.main(["convert", "export", str(workdir), str(workdir.parent / "export")]) == 0
    return workdir, workdir.parent / "export", logged


def observed(data, config, step=3):
    episode = open_source(data, config.data, config.sequence.views)[0]
    # Pictures with a texture: flat grey ones lie between codes, which rounding then decides.
    front, wrist, left = np.random.default_rng(step).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    return Observation(front, wrist, episode.state[step], episode.text(step), episode.columns, {"left": left})


def test_both_policies_agree_and_see_the_camera(trained, data):
    workdir, export, _ = trained
    config = model_dir.read_train_config(workdir)
    assert config.sequence.views == ("front", "wrist", "left")
    seen, ours, theirs = observed(data, config), JaxPolicy(workdir), Policy.load(export)
    targets = ours.act(*seen)
    np.testing.assert_allclose(targets, theirs.act(*seen), atol=1e-4)
    other = seen._replace(extra_views={"left": 255 - seen.extra_views["left"]})
    assert np.abs(ours.act(*other) - targets).max() > 0
    for act in (ours.act, theirs.act):
        with pytest.raises(PolicyError, match="left image is missing.*front, wrist, left"):
            act(*seen[:5])
        with pytest.raises(PolicyError, match="top image is given.*leave it out of extra_views"):
            act(*seen[:5], {**seen.extra_views, "top": seen.front})
    assert theirs.act(*theirs.example()).shape == targets.shape
    metadata = metadata_of(theirs)
    assert metadata["keys"][:3] == ["observation/image", "observation/wrist_image", "observation/views/left"]
    assert metadata["cameras"] == {"front": CAMERAS[0], "wrist": CAMERAS[1], "left": CAMERAS[2]}


def test_codes_made_ahead_train_the_same_and_a_corpus_has_them(trained, data, assets, tmp_path):
    _, _, logged = trained
    ahead = train(configured(data, assets, **{"data.frame_codes": "ahead"}), tmp_path / "ahead")
    assert ahead["loss"] == logged["loss"]
    given = ["--vqgan", assets["vqgan"], "--out", str(tmp_path / "corpus"), "--config.data.image.shortest_edge=64"]
    command = ["data", "tokenize", "--source", data, *given, "--config.data.extra_views=('left',)"]
    assert cli.main([*command, "--views", "front,top"]) == 2
    assert cli.main(command) == 0
    corpus = f"records:{tmp_path / 'corpus'}"
    config = configured(corpus, assets, **{"data.frame_codes": "ahead"})
    stored = Loader(config, tokenizer=TextTokenizer(config.tokenizer), progress=False)
    (own,) = (source[0].codes["left"] for source in stored.sources)
    made = next((tmp_path / "ahead" / "codes" / "0").rglob("left.npy"))
    np.testing.assert_array_equal(own, np.load(made)[: len(own)])
    with pytest.raises(ConfigError, match="but not left; set sequence.use_wrist_frame and data.extra_views"):
        only = ["--views", "front,wrist", "--out", str(tmp_path / "two")]
        assert cli.main([*command, *only]) == 0
        open_source(f"records:{tmp_path / 'two'}", configured(data, assets).data, ("front", "left"))


def test_a_message_carries_it(trained, data):
    seen = observed(data, model_dir.read_train_config(trained[0]))
    back = from_message(to_message(seen))
    assert set(back.frames) == {"front", "wrist", "left"}
    np.testing.assert_array_equal(back.frames["left"], seen.extra_views["left"])
    with pytest.raises(MessageError, match="observation/views/left is float64.*expected uint8"):
        from_message({**to_message(seen), "observation/views/left": np.zeros((4, 4, 3))})


def test_where_the_camera_is_not_there_it_is_said_before_anything_starts(trained, data, assets):
    with pytest.raises(PolicyError, match="also needs observation/views/left|also needs left"):
        driver(str(trained[1]), replan=1, ensemble=False)
    with pytest.raises(
        ConfigError, match="data.extra_views names 'top', which .* does not have; leave it out: its cameras are"
    ):
        open_source(
            data, tiny.typed(tiny.config("robot", data, **{"data.extra_views": ("top",)})).data, ("front", "top")
        )
    with pytest.raises(ConfigError, match="front and a wrist camera at most.*names left; leave it out"):
        open_source(tiny.EGODEX, configured(data, assets).data, ("front", "left"))
    for wrong in (("front",), ("left", "left"), ("",), ("a/b",), tuple("abcde")):
        with pytest.raises(ConfigError, match=r"data\.extra_views"):
            configured(data, assets, **{"data.extra_views": wrong})


def test_inspect_names_the_camera_that_is_not_used(data, capsys):
    assert cli.main(["data", "inspect", data]) == 0
    assert "not used: left; to use such cameras, set --config.data.extra_views=\"('left',)\"" in capsys.readouterr().out
    assert cli.main(["data", "inspect", data, "--config.data.extra_views=('left',)"]) == 0
    out = capsys.readouterr().out
    assert "to use such cameras" not in out and "views front, wrist, left" in out and "data.extra_views=" in out
