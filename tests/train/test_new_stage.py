"""A stage that the code base does not have, defined here, goes through the whole loop."""

import jax.numpy as jnp
import pytest

from rynnvla_jax import stage
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import ConfigError
from rynnvla_jax.train import metrics, stages
from rynnvla_jax.train.loop import train
from tests import tiny


def first_step_loss(model, frozen, batch, counts, key, config):
    """How well the first step of a chunk alone is rebuilt, without any noise."""
    mean = model.encode(batch["actions"], batch["actions_pad"])[:, : config.action_vae_model.latent]
    error = jnp.abs(model.decode(mean)[0][:, 0] - batch["actions"][:, 0])
    return error.sum() / (counts["rows"] * error.shape[1]), {"first_step": error.mean()}


def test_one_entry_and_one_loss_make_a_stage(monkeypatch, tmp_path):
    config = tiny.config("action_vae", tiny.SO100, total_steps=2)
    config.stage = "first_step"
    with pytest.raises(ConfigError, match="config.stage is 'first_step'; choose one of vqgan, .*, robot"):
        tiny.typed(config)
    described = stage.Stage("First steps", "Learns to rebuild a chunk's first step.", model="action_vae", actions=True)
    objective = stages.Objective(
        stages.build_action_vae, first_step_loss, stages.count_rows, untrained=stages.UNTRAINED
    )
    monkeypatch.setitem(stage.STAGES, "first_step", described)
    monkeypatch.setitem(stages.OBJECTIVES, "first_step", objective)
    train(tiny.typed(config), tmp_path / "run")
    assert [line["step"] for line in metrics.read(tmp_path / "run") if line["first_step"] > 0] == [1, 2]
    assert model_dir.read_train_config(tmp_path / "run").stage == "first_step"
    assert model_dir.read_model_config(tmp_path / "run", "action_vae").chunk == config.data.chunk
