"""What a stage is, and the one rule of where its examples start."""

import numpy as np
import pytest

from rynnvla_jax.config import DataConfig, SequenceConfig, TrainConfig, VLAConfig
from rynnvla_jax.stage import STAGES, start_counts
from rynnvla_jax.train.stages import OBJECTIVES


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("span", [0, 1, 5])
@pytest.mark.parametrize("after", [0, 4])
def test_examples_start_wherever_they_fit(span, after, stride):
    lengths = np.arange(1, 15)
    fitting = [sum(start + span + after <= n for start in range(0, n + 1, stride)) for n in lengths]
    assert start_counts(lengths, span, after, stride).tolist() == fitting


def test_windows_of_the_stages():
    sequence, data = SequenceConfig(num_frames=3, frame_interval=2), DataConfig(chunk=7)
    of = {
        name: [stage.window(TrainConfig(stage=name, sequence=sequence, data=data), p) for p in (True, False)]
        for name, stage in STAGES.items()
    }
    assert of["vqgan"] == [(1, 0), (1, 0)] and of["video"] == [(5, 0), (5, 0)]
    assert of["action_vae"] == [(0, 8), (0, 7)]
    assert of["trajectory"] == of["robot"] == [(5, 8), (5, 7)]


def test_every_stage_has_a_loss():
    assert list(OBJECTIVES) == list(STAGES)


def test_only_embedded_actions_need_an_action_vae():
    frozen = {name: stage.frozen(TrainConfig(stage=name)) for name, stage in STAGES.items()}
    assert frozen["vqgan"] == frozen["action_vae"] == () and frozen["video"] == ("vqgan",)
    assert frozen["trajectory"] == frozen["robot"] == ("vqgan", "action_vae")
    assert STAGES["robot"].frozen(TrainConfig(stage="robot", vla=VLAConfig(actions="raw"))) == ("vqgan",)
