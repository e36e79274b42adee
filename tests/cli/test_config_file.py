"""Config files: found, run once, and their errors shown where they are."""

import importlib.util
import sys

import pytest

from rynnvla_jax import config_file
from rynnvla_jax.cli.main import main as cli
from rynnvla_jax.config import ConfigError

BASE = "from rynnvla_jax.configs.robot import get_config\n"


def fault(path) -> str:
    with pytest.raises(ConfigError) as caught:
        config_file.load(str(path))
    return str(caught.value)


def test_packaged_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.load("configs/robot.py:tiny").build().stage == "robot"
    assert config_file.load("configs/ablations/chunk.py:tiny").values["stage"] == "robot"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "robot.py").write_text(
        "from rynnvla_jax.configs.video import get_config as base\ndef get_config(arg): return base(arg)",
        encoding="utf-8",
    )
    assert config_file.load("configs/robot.py:tiny").build().stage == "video", "the user's own comes first"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("configs/robt.py", "configs/robot.py"),
        ("robot.py", "configs/robot.py"),
        ("configs/ablations/chunks.py", "configs/ablations/chunk.py"),
        ("my_robt.py:tiny", "my_robot.py"),
    ],
)
def test_a_misspelt_file_is_named_with_a_near_one(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_robot.py").write_text(BASE, encoding="utf-8")
    said = fault(name)
    assert said == f"--config {name.partition(':')[0]}: there is no such file. Did you mean {near}?"


@pytest.mark.parametrize("how", ["from small import get_config", "from .small import get_config", "import small.deep"])
def test_neighbours_can_be_imported(tmp_path, monkeypatch, how):
    """Neighbours of the same name in other folders, too."""
    monkeypatch.chdir(tmp_path)
    for folder, stage in (("a", "robot"), ("b", "video")):
        (tmp_path / folder).mkdir()
        deep = how.endswith("deep")
        (tmp_path / folder / "mine.py").write_text(
            how + deep * "\nget_config = small.deep.get_config", encoding="utf-8"
        )
        small = tmp_path / folder / ("small/deep.py" if deep else "small.py")
        small.parent.mkdir(exist_ok=True)
        small.write_text(f"from rynnvla_jax.configs.{stage} import get_config\n", encoding="utf-8")
    if how.endswith("deep"):
        (tmp_path / "b" / "small" / "deep.py").rename(tmp_path / "b" / "small" / "other.py")
        (tmp_path / "b" / "mine.py").write_text("from small.other import get_config", encoding="utf-8")
    for folder, stage in (("a", "robot"), ("b", "video"), ("a", "robot")):
        assert config_file.load(f"{folder}/mine.py:tiny").build().stage == stage
    assert str(tmp_path / "a") not in sys.path and not [m for m in sys.modules if m.startswith("rynnvla_config_file")]


def test_the_old_name_of_the_packaged_configs_is_taken_and_the_new_one_said(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "configs" else find_spec(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.py").write_text("from configs import robot\nget_config = robot.get_config\n", encoding="utf-8")
    assert config_file.load("old.py:tiny").build().stage == "robot"
    assert capsys.readouterr().err == "old.py: configs.robot is now rynnvla_jax.configs.robot\n"
    assert "configs" not in sys.modules


@pytest.mark.parametrize(
    ("text", "told", "line"),
    [
        ("\nimport nump\n", "2: ModuleNotFoundError: No module named 'nump'", "import nump"),
        ("def get_config(:\n", "1: SyntaxError: invalid syntax", "def get_config(:"),
        (BASE + "x = 1 / 0\n", "2: ZeroDivisionError: division by zero", "x = 1 / 0"),
        (
            "from rynnvla_jax.configs import robot\ndef get_config(arg='tiny'):\n    c = robot.get_config(arg)\n"
            "    c.optimzer.peak_lr = 1\n    return c\n",
            "4: AttributeError: 'optimzer'",
            "c.optimzer.peak_lr = 1",
        ),
        ("import small\n", "small.py:1: KeyError: 'gone'", "{}['gone']"),
    ],
)
def test_an_error_in_a_config_file_is_shown_with_its_line(tmp_path, monkeypatch, capsys, text, told, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text("{}['gone']\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    said = fault("mine.py").splitlines()
    assert said[0].startswith(told if told.startswith("small") else f"mine.py:{told}")
    assert said[-1] == f"    {line}" and "earlier failure" not in "".join(said)
    assert cli(["train", "--config=mine.py", "--workdir=x"]) == 1
    assert capsys.readouterr().err == "rynnvla train: " + "\n".join(said) + "\n"


@pytest.mark.parametrize(
    ("text", "arg", "message"),
    [
        ("", "", "defines no get_config(arg)"),
        ("def get_config(): pass", ":tiny", "takes no argument; leave out :tiny"),
        ("def get_config(arg): pass", "", "needs an argument; write :ARG"),
        ("def get_config(): return 3", "", "returned int; return an ml_collections.ConfigDict"),
    ],
)
def test_what_get_config_must_be(tmp_path, text, arg, message):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    assert message in fault(f"{tmp_path / 'mine.py'}{arg}")


def test_a_config_file_runs_once(tmp_path):
    count = tmp_path / "count"
    (tmp_path / "mine.py").write_text(
        f"from rynnvla_jax.configs import robot\nopen({str(count)!r}, 'a').write('x')\n"
        "def get_config(arg='tiny'):\n    config = robot.get_config(arg)\n"
        "    config.remat = 'ful'\n    return config\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=r"config.remat was set in .*mine.py:5"):
        config_file.load(str(tmp_path / "mine.py")).build()
    assert count.read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    ("words", "rest", "overrides"),
    [
        (["--config", "c", "--config.seed=1"], ["--config", "c"], ["--config.seed=1"]),
        (["--config.seed", "1", "--out=o"], ["--out=o"], ["--config.seed=1"]),
        (["--config.mlp", "--out", "o"], ["--out", "o"], ["--config.mlp"]),
        (["--noconfig.mlp"], [], ["--noconfig.mlp"]),
    ],
)
def test_overrides_are_told_from_the_rest(words, rest, overrides):
    assert config_file.split(words) == (rest, overrides)


def test_overrides_are_read_as_ml_collections_reads_them():
    given = ["--config.seed=3", "--config.optimizer.peak_lr=1", "--config.vla.transformer.swin_norm=true"]
    given += [
        "--config.profile_steps=(1,2)",
        "--config.init_from.new=('a','b.*')",
        "--noconfig.sequence.use_wrist_frame",
    ]
    config = config_file.load("configs/robot.py:tiny", given).build()
    assert (config.seed, config.optimizer.peak_lr, config.profile_steps) == (3, 1.0, (1, 2))
    assert config.vla.transformer.swin_norm and config.init_from.new == ("a", "b.*")
    assert not config.sequence.use_wrist_frame
