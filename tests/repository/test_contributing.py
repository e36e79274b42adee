"""The examples of CONTRIBUTING.md, applied to a copy of the code and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rynnvla_jax.config import ConfigError, TrainConfig, from_dict
from rynnvla_jax.deploy.export_format import PolicyError
from tests import documented
from tests.documented import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def apply(title: str, folder: Path) -> None:
    """Writes into `folder` the files that a section shows, and adds the lines marked + after those before them."""
    found = 0
    for _, language, code in documented.blocks(section(title)):
        name, _, body = code.partition("\n")
        if language not in ("python", "diff"):
            continue
        path, found = folder / name.removeprefix("# "), found + 1
        if language == "python":
            assert not path.exists(), f"{name} exists already"
            path.write_text(code + "\n", encoding="utf-8")
            continue
        lines = body.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        added = "".join(f"{line[1:]}\n" for line in lines if line[0] == "+")
        text = path.read_text(encoding="utf-8")
        assert body == "\n".join([*(line for line in lines if line[0] == " "), *(x for x in lines if x[0] == "+")])
        assert text.count(before) == 1, f"{name}: the lines before the addition do not occur exactly once: {before}"
        path.write_text(text.replace(before, before + added), encoding="utf-8")
    assert found, f"{title} shows no code"


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of both packages, without recordings."""
    for package in ("rynnvla_jax", "data_pipelines"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "so100", "egodex")
        )
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, not the tests' eight
    environment |= {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_config_key_works_in_training_and_on_robots(copied):
    apply("Add a config key", copied)
    program = """
        import numpy as np
        import rynnvla_jax
        from rynnvla_jax.config import ConfigError, TrainConfig, from_dict
        from rynnvla_jax.images import preprocess

        frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        for grey in (False, True):
            config = from_dict(TrainConfig, {"stage": "video", "data": {"image": {"shortest_edge": 64, "grey": grey}}})
            assert (np.ptp(preprocess(frame, config.data.image), -1) == 0).all() == grey
        try:
            from_dict(TrainConfig, {"stage": "video", "data": {"image": {"gray": True}}})
        except ConfigError as error:
            print(rynnvla_jax.__file__, error)
    """
    printed = run(copied, "-c", re.sub(r"^ {8}", "", program, flags=re.MULTILINE))
    assert printed.startswith(str(copied)) and "Did you mean config.data.image.grey?" in printed
    shown = run(copied, "-m", "rynnvla_jax.cli", "train", "--help", "data.image")
    assert "--config.data.image.grey=False" in shown and "Remove the colours of all frames" in shown


def test_a_source_can_be_read_and_summarised(copied):
    apply("Add a source", copied)
    draw = np.random.default_rng(0)
    (copied / "recordings").mkdir()
    for name, steps in (("a", 40), ("b", 50)):
        np.savez(
            copied / "recordings" / f"{name}.npz",
            frames=draw.integers(0, 256, (steps, 64, 96, 3), np.uint8),
            state=draw.normal(size=(steps, 6)),
            action=draw.normal(size=(steps, 6)),
            instruction="lift the cup",
        )
    program = """
        import numpy as np
        from data_pipelines.episode import DataError
        from data_pipelines.sources import open_source
        from rynnvla_jax.config import ConfigError, DataConfig

        episodes = open_source("npz:recordings", DataConfig())
        assert episodes.lengths.tolist() == [40, 50] and episodes.views == ("front",)
        with np.load("recordings/b.npz") as file:
            assert (episodes[1].frames("front", [7, 3]) == file["frames"][[7, 3]]).all()
            assert np.allclose(episodes[1].action, file["action"])
        assert open_source("npz:recordings", DataConfig(), views=()).views == ()
        for wrong, views in ((ConfigError, ("front", "wrist")), (DataError, ("front",))):
            try:
                open_source("npz:recordings", DataConfig(), views=views)
            except wrong as error:
                print(error)
            np.savez("recordings/c.npz", frames=np.zeros((4, 64, 96, 3), np.uint8), instruction="", state=0)
    """
    printed = run(copied, "-c", re.sub(r"^ {8}", "", program, flags=re.MULTILINE)).splitlines()
    assert len(printed) == 2 and "no wrist camera" in printed[0] and "c.npz lacks action" in printed[1]
    (copied / "recordings" / "c.npz").unlink()
    assert "lift the cup" in run(copied, "-m", "rynnvla_jax.cli", "data", "stats", "npz:recordings")


def test_a_stage_has_a_batch_a_model_and_a_loss(copied):
    """`tests/train/test_new_stage.py` takes the same stage through the whole loop."""
    apply("Add a stage", copied)
    program = """
        import jax
        import numpy as np
        from flax import nnx

        from first_step import get_config
        from rynnvla_jax.config import TrainConfig, from_dict
        from rynnvla_jax.stage import STAGES
        from rynnvla_jax.train.stages import OBJECTIVES

        values = get_config()
        values.batch_size = 4
        values.action_vae_model.update(encoder_layers=1, decoder_layers=1, width=16, feed_forward=16)
        config = from_dict(TrainConfig, values.to_dict())
        draw = np.random.default_rng(0)
        spec = STAGES[config.stage].batch_spec(config)
        batch = {name: draw.normal(size=shape).astype(dtype) for name, (shape, dtype) in spec.items()}
        assert sorted(batch) == ["actions", "actions_pad"] and STAGES[config.stage].frozen(config) == ()
        objective = OBJECTIVES[config.stage]
        model = objective.build(config, nnx.Rngs(0))

        @jax.jit
        def loss(graph, params, batch):
            model = nnx.merge(graph, params)
            return objective.loss(model, None, batch, objective.counts(batch), jax.random.key(0), config)

        total, metrics = loss(*nnx.split(model), batch)
        later, _ = loss(*nnx.split(model), batch | {"actions": batch["actions"] + np.arange(1.0, 7.0)})
        assert np.isclose(total, metrics["first_step"], rtol=1e-5) and later > total > 0
    """
    run(copied, "-c", re.sub(r"^ {8}", "", program, flags=re.MULTILINE))


def shown(title: str, name: str) -> dict:
    """What the example `name` of a section defines."""
    (code,) = (code for _, _, code in documented.blocks(section(title)) if code.startswith(f"# {name}\n"))
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    return names


def test_the_config_of_a_robot_fits_its_joints_and_no_other_data():
    get_config = shown("Add a robot", "seven_joints.py")["get_config"]
    for arg, stage in (("action_vae", "action_vae"), ("7b", "robot")):
        config = from_dict(TrainConfig, get_config(arg).to_dict())
        assert config.stage == stage and config.vla.state_dim == config.action_vae_model.action_dim == 7
    with pytest.raises(ConfigError):
        from_dict(TrainConfig, get_config("7b").to_dict() | {"data": {"top": ""}})


class Robot:
    """Six joints and a gripper that reach every target at once."""

    def __init__(self):
        self.moves: list[np.ndarray] = []

    def frame(self, camera: str) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    def joints(self) -> np.ndarray:
        return self.moves[-1] if self.moves else np.zeros(7)

    def move_to(self, target: np.ndarray) -> None:
        self.moves.append(target)

    def wait_for_next_step(self) -> None:
        pass


class Rising:
    """Chunks of 20 targets, each one above the last; another robot is refused."""

    asked = 0

    def act(self, front, wrist, state, instruction, columns=None) -> np.ndarray:
        self.asked += 1
        if columns.robot != "lerobot:seven_joints" or self.asked > 3:
            raise PolicyError("refused")
        return (state + np.arange(1, 21)[:, None]).astype(np.float32)


def test_a_robot_follows_the_policy_and_stops_when_it_fails():
    drive = shown("Add a robot", "drive.py")["drive"]
    robot, policy = Robot(), Rising()
    drive(robot, policy, "lift the cup", 25)
    assert policy.asked == 3 and [move[0] for move in robot.moves] == list(range(1, 26))
    with pytest.raises(PolicyError):
        drive(robot, policy, "lift the cup", 25)
    assert len(robot.moves) == 25
