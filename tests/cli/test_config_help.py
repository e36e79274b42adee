"""`rynnvla train --help`: every key with its description and value, grouped, narrowed, of a config file."""

import pytest

from rynnvla_jax.cli import config_help
from rynnvla_jax.cli.main import main as cli
from rynnvla_jax.config import DERIVED, TrainConfig, to_dict


@pytest.fixture
def shown(capsys):
    """shown(*words): the lines of `rynnvla train WORDS`, which must be a help text."""

    def run(*words):
        assert cli(["train", *words]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def leaves(values, prefix=""):
    for key, value in values.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def test_every_key_is_there_once_with_its_description(shown):
    lines = shown("--help")
    keys = [
        line.strip().removeprefix("--config.").partition("=")[0] for line in lines if line.startswith("  --config.")
    ]
    wanted = set(leaves(to_dict(TrainConfig(stage="robot")))) - set(DERIVED)
    assert len(keys) == len(set(keys)) and set(keys) == wanted
    for key in config_help.keys(TrainConfig(stage="robot")):
        assert key.description and key.description.split()[0] in lines[lines.index(line_of(key, lines)) + 1]
    assert "optimizer: AdamW, or another optimizer, and its learning rate." in lines
    assert lines[0].startswith("usage: rynnvla train")


def line_of(key, lines):
    return next(line for line in lines if line.startswith(f"  --config.{key.name}="))


def test_a_word_narrows_to_what_is_about_it(shown):
    lines = shown("--help", "optimizer")
    keys = [line for line in lines if line.startswith("  --config.")]
    assert "  --config.optimizer.peak_lr=2e-05" in keys and "  --config.batch_size=8" in keys
    assert not [key for key in keys if "vqgan_model" in key] and len(keys) < 30
    assert shown("optimizer", "--help") == lines
    assert [x for x in shown("--help", "warm-up", "rate") if x.startswith("  --")][0].startswith("  --config.optimizer")


def test_a_config_file_shows_its_own_values(shown):
    lines = shown("--config", "configs/robot.py:tiny", "--help", "--config.seed=5")
    assert "  --config.vla.transformer.width=192" in lines and "  --config.stage=robot" in lines
    assert "  --config.seed=5" in lines
    assert "  --config.vla.transformer.width=4096" in shown("--config=configs/robot.py:7b", "--help", "width")


def test_nothing_about_a_word_is_said_with_the_nearest(capsys):
    assert cli(["train", "--help", "chekpoint"]) == 2
    assert capsys.readouterr().err.startswith("rynnvla train: no key matches 'chekpoint'. Did you mean checkpoint?")
    assert cli(["train", "--help", "--config=configs/robot.py:tinny"]) == 1
    error = capsys.readouterr().err
    assert "tinny" in error and error.count("\n") == 1 and "configs:" not in error  # the file's own words
