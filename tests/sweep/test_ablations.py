"""Every point of configs/ablations trains: two steps of a smaller `tiny` each, on the demo data."""

import dataclasses

import pytest
from flax import nnx

from data_pipelines import demo
from data_pipelines.loader import Loader
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.models.params import split
from rynnvla_jax.sweep import plan
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.stages import OBJECTIVES
from tests import ROOT, tiny

FILES = sorted((ROOT / "configs" / "ablations").glob("[a-z]*.py"))
SMALL = (
    "--config.vla.transformer.width=32",
    "--config.vla.transformer.num_layers=1",
    "--config.vla.transformer.num_heads=2",
    "--config.vla.transformer.num_kv_heads=2",
    "--config.vla.transformer.feed_forward=64",
    "--config.action_vae_model.width=16",
    "--config.action_vae_model.num_heads=2",
    "--config.batch_size=8",
    "--config.total_steps=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data and models that the ablations expect under data/ and runs/, the latter untrained."""
    root = tmp_path_factory.mktemp("ablations")
    assets = tiny.assets(root)
    (root / "data").mkdir()
    (root / "data" / "egodex").symlink_to(demo.path("egodex"))
    (root / "data" / "robot").symlink_to(demo.path("so100"))
    runs = root / "runs"
    for name, stage in (("base", "trajectory"), ("stage1", "video"), ("stage2", "trajectory")):
        own = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "action_vae": assets["vae_hand"]}
        c = tiny.config(stage, tiny.EGODEX, **own, total_steps=1)
        c.vla.transformer.update(num_layers=1, num_heads=2)
        train(tiny.typed(c), runs / name)
    for name, chunk in (("vae_robot", 20), *((f"chunk_vae/{i:03d}_{n}_steps", n) for i, n in enumerate((10, 20, 40)))):
        c = tiny.config("action_vae", tiny.SO100)
        c.data.chunk = chunk
        config = tiny.typed(c)
        model = OBJECTIVES["action_vae"].build(config, nnx.Rngs(0))
        model_dir.save_model(runs / name, "action_vae", config.action_vae_model, split(model)[1])
        Loader(config, progress=False).statistics.to_json(runs / name / "assets" / "statistics.json")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_trains(file, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    source = () if file.stem == "mixture" else (f"--config.data.source={tiny.SO100}",)
    definition = plan.define(f"{file}:tiny", (*SMALL, *source))
    points, faults = plan.resolve(definition, plan.points(definition))
    assert not faults
    for point in (p for p in points if p.config.seed == 0):
        metrics = train(dataclasses.replace(point.config, log_every=1), tmp_path / point.name)
        assert metrics["loss"] > 0, point.name
