"""Errors of a config's values: the nearest known value, and the line, flag or default that set the wrong one."""

import pytest

from rynnvla_jax import config_file, config_origin
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import ConfigError, DataConfig, OptimizerConfig, TrainConfig, from_dict

FILE = """from rynnvla_jax.configs.sizes import base

def get_config(arg="tiny"):
    config = base("robot", arg)
    config.optimizer.schedule = "vlaa"
    config.data.image.update(fit="squre")
    config.remat = "nothing"
    config.remat = "ful"
    config.batch_size, config.optimizer.accumulation = 9, 2
    return config
"""
ROBOT = config_file.load("configs/robot.py:tiny")
GOOD = {
    "remat": "full",
    "batch_size": "8",
    "data.image.fit": "crop",
    "optimizer.schedule": "vla",
    "optimizer.accumulation": "2",
}


@pytest.fixture
def fault(tmp_path, monkeypatch):
    """The message for the config file above with some values put right: fault("remat", seed=...) keeps one wrong."""
    (tmp_path / "bad.py").write_text(FILE, encoding="utf-8")

    def message(*wrong, **overrides):
        values = {**{k: v for k, v in GOOD.items() if k not in wrong}, **overrides}
        loaded = config_file.load(f"{tmp_path / 'bad.py'}:tiny", [f"--config.{k}={v}" for k, v in values.items()])
        with pytest.raises(ConfigError) as caught:
            loaded.build()
        return str(caught.value)

    return message


def test_a_wrong_choice_names_the_nearest_and_the_line_that_made_it(fault, tmp_path):
    told = fault("optimizer.schedule")
    assert "'vlaa'; choose one of vla, action_vae, cosine, linear, constant, wsd, rsqrt. Did you mean vla?" in told
    assert f"(config.optimizer.schedule was set in {tmp_path / 'bad.py'}:5)" in told
    assert "Did you mean square?" in fault("data.image.fit") and "bad.py:6)" in fault("data.image.fit")
    assert "bad.py:8)" in fault("remat")  # the last of two lines


def test_a_flag_is_named_where_it_set_the_value(fault):
    told = fault(remat="fulll")
    assert "Did you mean full?" in told and told.endswith("(config.remat was set by --config.remat=fulll)")


def test_training_names_the_flag_once(tmp_path, capsys):
    words = ["train", "--config", "configs/robot.py:tiny", "--workdir", str(tmp_path), "--config.batch_size=-1"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.count("was set by") == 1


def test_every_key_of_a_conflict_is_told(fault):
    told = fault("optimizer.accumulation", batch_size="15")
    assert "config.batch_size was set by --config.batch_size=15" in told
    assert "config.optimizer.accumulation was set in" in told and "bad.py:9" in told


def test_a_default_is_called_one(fault):
    told = fault(**{"data.frame_codes": "ahead", "data.image.jitter": "0.1"})
    assert "config.data.image.jitter was set by --config.data.image.jitter=0.1" in told
    with pytest.raises(ConfigError, match=r"\(config.data.chunk has its default of rynnvla_jax/config.py\)"):  # noqa: SIM117
        with config_origin.explained(ROBOT.origins):
            raise ConfigError("config.data.chunk is 20 but the action VAE encodes 5 steps")


def test_a_value_of_the_sizes_is_found_there():
    with pytest.raises(ConfigError, match=r"config.vla.transformer.width was set in rynnvla_jax/configs/sizes.py:\d+"):  # noqa: SIM117
        with config_origin.explained(ROBOT.origins):
            raise ConfigError("vla.transformer.width 192 is odd; take another")


def test_a_point_of_a_sweep_comes_last():
    origins = config_file.load("configs/robot.py:tiny", ["--config.seed=1"]).origins
    with (
        pytest.raises(ConfigError, match=r"config.seed was set to -1 by the point"),
        config_origin.explained(origins.with_point({"seed": -1})),
    ):
        raise ConfigError("config.seed is negative")


def test_messages_without_keys_and_other_errors_pass_unchanged():
    for error in (ConfigError("config files live in configs/robot.py; set data.source"), KeyError("data.source")):
        with pytest.raises(type(error)) as caught, config_origin.explained(ROBOT.origins):
            raise error
        assert caught.value.args == type(error)(*error.args).args and "was set" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.peak_rl=1", r"unknown key config.optimizer.peak_rl. Did you mean config.optimizer.peak_lr\?"),
        ("bach_size=1", r"unknown key config.bach_size. Did you mean config.batch_size\?"),
        ("seed.x=1", r"unknown key config.seed.x; config.seed is one value"),
        ("batch_size=x", r"--config.batch_size=x: invalid literal for int"),
    ],
)
def test_a_flag_for_no_key_is_told_in_full(override, message):
    with pytest.raises(ConfigError, match=message):
        config_file.load("configs/robot.py:tiny", [f"--config.{override}"])


@pytest.mark.parametrize(
    "cls, values, near",
    [
        (OptimizerConfig, {"schedule": "action-vae"}, "action_vae"),
        (DataConfig, {"normalization": "minmax"}, "min_max"),
        (DataConfig, {"frame_codes": "steps"}, "step"),
        (TrainConfig, {"stage": "robto"}, "robot"),
        (TrainConfig, {"stage": "robot", "attention": "splahs"}, "splash"),
        (TrainConfig, {"stage": "robot", "vla": {"action_head": "MPL"}}, "MLP"),
    ],
)
def test_enumerated_values_have_a_nearest(cls, values, near):
    with pytest.raises(ConfigError, match=rf"Did you mean {near}\?"):
        from_dict(cls, values)
