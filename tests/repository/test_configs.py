"""Every config file of the repository: each documented argument builds, and each point of its sweep can run."""

import math
import re
from pathlib import Path

import jax
import pytest

from rynnvla_jax import config_file
from rynnvla_jax.config import DERIVED, ConfigError, TrainConfig, from_dict, to_dict
from rynnvla_jax.configs.sizes import base
from rynnvla_jax.sweep import check, plan, search
from tests.command import ROOT

FILES = [
    file for file in sorted((ROOT / "configs").rglob("*.py")) if "\ndef get_config(" in file.read_text(encoding="utf-8")
]


def arguments(file: Path) -> list[str]:
    """What the first docstring lists after `Arg:`, up to a full stop or a bracket."""
    text = file.read_text(encoding="utf-8").split('"""')[1]
    found = re.search(r"\bArg: ([^.(]+)", text)
    assert found, f"{file} does not document its argument: add 'Arg: ..., ....' to its docstring"
    return [word for word in re.findall(r"\w+", found[1]) if word not in ("or", "and")]


CASES = [(file, arg) for file in FILES for arg in arguments(file)]
SWEPT = [
    (file, arg) for file, arg in CASES if re.search("\ndef get_(hyper|search)\\(", file.read_text(encoding="utf-8"))
]


def names(case: object) -> str:
    return str(case.relative_to(ROOT)) if isinstance(case, Path) else str(case)


def test_there_are_configs():
    assert {f.stem for f in FILES} >= {"action_vae", "vqgan", "video", "trajectory", "robot"}
    assert len(CASES) > 15


@pytest.mark.parametrize(("file", "arg"), CASES, ids=names)
def test_every_documented_argument_builds(monkeypatch, file, arg):
    monkeypatch.chdir(ROOT)
    assert from_dict(TrainConfig, plan.define(f"{file.relative_to(ROOT)}:{arg}").base).total_steps > 0


@pytest.mark.parametrize(
    ("key", "wrong", "least"),
    [
        *((f"config.{name}", 0, 1) for name in ("total_steps", "batch_size", "log_every", "loss_chunk")),
        *((key, 0, 1) for key in ("optimizer.accumulation", "sequence.length", "sequence.clips", "data.chunk")),
        *((f"vla.transformer.{name}", 0, 1) for name in ("width", "num_layers", "num_heads", "num_kv_heads")),
        *((f"action_vae_model.{name}", 0, 1) for name in ("num_heads", "encoder_layers", "chunk")),
        ("vqgan_model.channels", 0, 1),
        ("config.seed", -1, 0),
        *((f"optimizer.{name}", -1.0, 0) for name in ("clip_norm", "peak_lr", "weight_decay")),
        ("optimizer.peak_lr", math.nan, 0),
        ("data.num_workers", -1, 0),
        ("checkpoint.keep_every", -3, 0),
        *(("config.watchdog_seconds", value, 0) for value in (-1.0, math.nan)),
        *((f"mesh.{axis}", 0, 1) for axis in ("data", "fsdp", "sequence", "tensor")),
        ("mesh.replica", -2, 1),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_key(key, wrong, least):
    with pytest.raises(ConfigError, match=f"^{key} is {wrong}; it must be at least {least}"):
        with_key(key, wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 1.5, math.nan])
@pytest.mark.parametrize("model", ["vla.transformer", "action_vae_model", "vqgan_model"])
def test_dropout_is_a_share(model, wrong):
    with pytest.raises(ConfigError, match=f"^{model}.dropout is {wrong}; it must be from 0 to below 1"):
        with_key(f"{model}.dropout", wrong)


def with_key(key, value):
    config = base("robot", "tiny")
    config.update_from_flattened_dict({key.removeprefix("config."): value})
    return from_dict(TrainConfig, config.to_dict())


def test_zero_and_minus_one_mean_what_they_are_documented_to_mean():
    for key in ("optimizer.clip_norm", "config.watchdog_seconds", "optimizer.peak_lr"):
        with_key(key, 0.0)
    for key in ("mesh.replica", "data.num_workers", "data.num_threads", "checkpoint.keep_every", "vla.state_dim"):
        with_key(key, 0)
    with_key("mesh.tensor", -1)


@pytest.mark.parametrize("file", FILES, ids=names)
def test_an_argument_that_does_not_exist_is_refused(monkeypatch, file):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="nonsense"):
        plan.define(f"{file.relative_to(ROOT)}:nonsense")


def points_of(file, arg):
    definition = plan.define(f"{file.relative_to(ROOT)}:{arg}")
    listed = plan.points(definition) if definition.has("get_hyper") else search.samples(definition)
    points, faults = plan.resolve(definition, listed)
    assert not faults
    return points


@pytest.mark.parametrize(("file", "arg"), SWEPT, ids=names)
def test_every_point_of_every_sweep_makes_a_config(monkeypatch, file, arg):
    monkeypatch.chdir(ROOT)
    assert points_of(file, arg)


def smallest():
    """Each sweep with its first argument; with the others in the long tests."""
    first = {file: arg for file, arg in reversed(SWEPT)}
    return [pytest.param(*case, marks=[] if first[case[0]] == case[1] else pytest.mark.slow) for case in SWEPT]


@pytest.mark.parametrize(("file", "arg"), smallest(), ids=names)
def test_every_point_of_every_sweep_can_run(monkeypatch, file, arg):
    """But for data and models, which are not here."""
    monkeypatch.chdir(ROOT)
    points = points_of(file, arg)
    workdirs = [ROOT / "nowhere" / p.name for p in points]
    verdicts = check.check([p.config for p in points], workdirs, jax.devices()[:1], files=False)
    assert {p.name: v.faults for p, v in zip(points, verdicts, strict=True) if v.faults} == {}


OLD = {
    ("robot", "sequence.use_state", True, False),
    ("video", "sequence.use_state", False, True),
    ("action_vae", "action_vae_model.chunk", 7, 20),
    ("robot", "vla.action_outputs", 64, 33),
}


@pytest.mark.parametrize(("stage", "key", "right", "wrong"), sorted(OLD))
def test_an_old_config_may_name_what_is_derived_now(stage, key, right, wrong):
    """It is accepted where it agrees, refused with both values where not, and written no more."""
    assert key in DERIVED
    config = base(stage, "tiny")
    config.data.chunk = 7
    plain = from_dict(TrainConfig, config.to_dict())
    group, name = key.split(".")
    config[group][name] = right
    assert from_dict(TrainConfig, config.to_dict()) == plain
    assert getattr(getattr(plain, group), name) == right and name not in to_dict(plain)[group]
    config[group][name] = wrong
    with pytest.raises(ConfigError, match=f"config.{key} is {wrong} but .*, which makes it {right}; leave the key out"):
        from_dict(TrainConfig, config.to_dict())


def test_raw_actions_decide_the_outputs_of_the_head():
    config = base("robot", "tiny")
    config.vla.actions, config.data.chunk = "raw", 7
    assert from_dict(TrainConfig, config.to_dict()).vla.action_outputs == 42
    config.vla.action_outputs = 42
    assert from_dict(TrainConfig, config.to_dict()).vla.action_outputs == 42
    config.vla.action_outputs = 64
    with pytest.raises(ConfigError, match="action_outputs is 64 but raw actions are 7 steps of 6 numbers, .* it 42"):
        from_dict(TrainConfig, config.to_dict())


def test_the_latent_of_an_action_vae_to_come_may_be_named_by_outputs():
    config = base("robot", "tiny")
    config.vla.action_outputs = 16
    typed = from_dict(TrainConfig, config.to_dict())
    assert typed.vla.action_outputs == 16 and typed.action_vae_model.latent == 8
    assert from_dict(TrainConfig, to_dict(typed)) == typed


def test_a_command_line_may_name_what_is_derived_now():
    def built(chunk):
        words = ["--config.data.chunk=7", f"--config.action_vae_model.chunk={chunk}"]
        return config_file.load("configs/action_vae.py:tiny", words).build()

    assert built(7).action_vae_model.chunk == 7
    with pytest.raises(ConfigError, match="action_vae_model.chunk is 9 but config.data.chunk is 7.*=9"):
        built(9)
    with pytest.raises(ConfigError, match="action_vae_model.chunk must be int, got str 'many'"):
        built("many")
    switched = config_file.load("configs/video.py:tiny", ["--noconfig.sequence.use_state"]).build()
    assert not switched.sequence.use_state
    with pytest.raises(ConfigError, match="sequence.use_state is True but config.stage is 'video'"):
        config_file.load("configs/video.py:tiny", ["--config.sequence.use_state"]).build()


def test_an_old_sweep_may_name_what_is_derived_now(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from configs import action_vae\n"
        "def get_config():\n    return action_vae.get_config('tiny')\n"
        "def get_hyper(h):\n    return h.product([h.zipit([h.sweep(k, (5, n)) for k, n in "
        "(('data.chunk', 10), ('action_vae_model.chunk', 12))])])\n",
        encoding="utf-8",
    )
    definition = plan.define(str(file))
    points, faults = plan.resolve(definition, plan.points(definition))
    assert [p.config.action_vae_model.chunk for p in points] == [5]
    assert points[0].name == "000_data.chunk=5,action_vae_model.chunk=5"
    assert len(faults) == 1 and "action_vae_model.chunk is 12 but config.data.chunk is 10" in faults[0][1]


def test_a_replaced_key_is_left_out_and_said(capsys):
    loaded = config_file.load("configs/action_vae.py:tiny", ["--config.checkpoint.retries=5"])
    assert loaded.build() == config_file.load("configs/action_vae.py:tiny").build()
    assert (
        "checkpoint.retries has no effect any more: set config.checkpoint.patience_minutes" in capsys.readouterr().err
    )
    config = base("robot", "tiny")
    plain = from_dict(TrainConfig, config.to_dict())
    config.checkpoint.retries = 5
    assert from_dict(TrainConfig, config.to_dict()) == plain


def test_a_vqgan_of_too_many_blocks_is_refused_before_it_is_built():
    with pytest.raises(ConfigError, match=r"2147483648 blocks in each of \d levels; a model has at most 1000 blocks"):
        with_key("vqgan_model.num_res_blocks", 2**31)
