"""Runs whose data and models are names on the Hugging Face Hub, against a Hub on 127.0.0.1."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipelines import demo
from data_pipelines.episode import DataError
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import ConfigError
from rynnvla_jax.convert import starting_point
from rynnvla_jax.storage import hub
from rynnvla_jax.storage.hub import HubError
from rynnvla_jax.train.loop import train
from tests import hub as hubs
from tests import tiny


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    starting_point.model_dir.cache_clear()
    with hubs.running(monkeypatch, tmp_path / "home") as found:
        yield found
    starting_point.model_dir.cache_clear()


def restarted():
    """As another process would begin."""
    hub._commit.cache_clear()
    starting_point.model_dir.cache_clear()


def test_a_continued_run_reads_the_commit_that_it_began_with(served, tmp_path):
    so100 = demo.path("so100")
    first = served.add("owner/so100", so100, "dataset")
    config = tiny.typed(tiny.config("action_vae", "lerobot:hf://owner/so100", total_steps=3))
    here = replace(config, data=replace(config.data, source=tiny.SO100), total_steps=6)
    expected = train(here, tmp_path / "local")
    train(config, tmp_path / "run")
    served.add("owner/so100", {"README.md": b"another commit"}, "dataset")
    restarted()
    assert train(replace(config, total_steps=6), tmp_path / "run") == expected
    entries = json.loads((tmp_path / "run/assets/run.json").read_text(encoding="utf-8"))["attempts"]
    assert [entry["hub"] for entry in entries] == [{"hf://datasets/owner/so100": first}] * 2
    assert entries[0]["sources"][0]["source"] == f"lerobot:hf://owner/so100@{first}"
    assert model_dir.read_train_config(tmp_path / "run").data.source == f"lerobot:hf://owner/so100@{first}"
    assert "hub" not in json.loads((tmp_path / "local/assets/run.json").read_text(encoding="utf-8"))["attempts"][0]
    restarted()
    with pytest.raises(DataError, match="is not a LeRobot data set"):
        train(config, tmp_path / "fresh")  # the newest commit


def test_models_from_the_hub(served, assets, curriculum, tmp_path):
    served.add("owner/parts", Path(assets["vqgan"]).parent)
    commit = served.add("owner/hands", curriculum / "trajectory")
    names = {"tokenizer": "tokenizer.json", "vqgan": "vqgan", "action_vae": "vae_robot"}
    common = {"total_steps": 2, "optimizer.peak_lr": 0.0, "optimizer.min_lr": 0.0}
    starts = {"near": str(curriculum / "trajectory"), "far": "hf://owner/hands"}
    parts = {"near": assets, "far": {name: f"hf://owner/parts/{name}" for name in names.values()}}
    configs = {}
    for which, start in starts.items():
        given = {key: parts[which][name] for key, name in names.items()}
        new = ("state_projection.*",)
        configs[which] = tiny.typed(
            tiny.config("robot", tiny.SO100, **{"init_from.path": start, "init_from.new": new, **given, **common})
        )
    assert train(configs["far"], tmp_path / "far") == train(configs["near"], tmp_path / "near")
    local = starting_point.model_dir(f"hf://owner/hands@{commit}")
    assert not (local / "checkpoints" / "2" / "train_state").exists()  # of the optimizer, which is not needed
    restarted()
    served.close()
    assert train(configs["far"], tmp_path / "far") == {}  # nothing to do, and nobody to ask


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer": "hf://owner/none"}, "the Hub has no such model"),
        ({"tokenizer": "hf://owner/other"}, "config.tokenizer: hf://owner/other.* is a folder; give the file in it"),
        ({"init_from.path": "hf://owner/other"}, "config.init_from.path: .*neither a model directory .* nor PyTorch"),
        ({"init_from.path": "hf://owner"}, "has no NAME"),
    ],
)
def test_wrong_names(served, assets, tmp_path, keys, said):
    served.add("owner/other", {"README.md": b"nothing"})
    config = tiny.config(
        "video", tiny.EGODEX, **{"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], **keys}
    )
    with pytest.raises((ConfigError, HubError), match=said):
        train(tiny.typed(config), tmp_path / "run")
