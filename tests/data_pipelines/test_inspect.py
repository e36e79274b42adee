"""`rynnvla data inspect`: small sets in the layouts of robots that people have, and what it says of each."""

import json
import re
import shlex

import numpy as np
import pytest

from data_pipelines import checks
from data_pipelines.columns import flatten
from data_pipelines.loader import Loader
from data_pipelines.sources import open_sources
from rynnvla_jax import config_file
from rynnvla_jax.cli import main as cli
from tests.recordings import write_calvin, write_egodex, write_lerobot, write_libero, write_libero_hdf5, write_openx

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
SO = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
PIPER = [*(f"joint_{i}" for i in range(1, 7)), "gripper"]
G1 = [f"k{side}{name}" for side in ("Left", "Right") for name in ("ShoulderPitch", "ShoulderRoll", "Elbow", "WristYaw")]
GR1 = {"left_arm": [f"joint_{i}" for i in range(7)], "left_hand": ["index_0", "thumb_0"], "waist": ["waist_yaw"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lerobot(root, names, robot, cameras=(FRONT, WRIST), version="v2.1"):
    """A set whose state and action have these names."""
    widths = [len(list(flatten(names)))] * 2
    write_lerobot(root, (45, 46), version, widths=widths, videos=cameras, robot_type=robot, scale=0.01)
    return named(root, ("observation.state", "action"), (names, names))


def named(root, keys, names):
    file = root / "meta" / "info.json"
    info = json.loads(file.read_text(encoding="utf-8"))
    for key, name in zip(keys, names, strict=True):
        info["features"][key]["names"] = name
    file.write_text(json.dumps(info), encoding="utf-8")
    return root


def inspect(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["data", "inspect", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# Layout: (how it is written, columns kept as recorded, unit of the first action, keys of stage robot, questions)
LAYOUTS = {
    "SO100, LeRobot 0.1": (
        lambda r: lerobot(r, {"motors": [f"main_{n}" for n in SO]}, "so100"), [5], "degrees", set(), [],
    ),
    "SO101": (
        lambda r: lerobot(r, [f"{n}.pos" for n in SO], "so101_follower", version="v3.0"),
        [5], "-100..100", set(), [],
    ),
    "SO101, LeRobot 0.4.4": (
        lambda r: lerobot(r, [f"{n}.pos" for n in SO], "so_follower", version="v3.0"),
        [5], "unknown", set(), ["the unit of"],
    ),
    "ALOHA": (
        lambda r: lerobot(r, [[f"{s}_{n}" for s in ("left", "right") for n in ARM]], "aloha",
                          ("observation.images.cam_high", "observation.images.cam_left_wrist")),
        [6, 13], "radians",
        {"data.front=observation.images.cam_high", "data.wrist=observation.images.cam_left_wrist",
         "vla.state_dim=14"},
        [],
    ),
    "LIBERO, openpi": (
        lambda r: named(write_libero(r, (45, 46)), ("state", "actions"), (["state"], ["actions"])),
        list(range(7)), "unknown",
        {"data.lerobot.state=state", "data.lerobot.action=actions", "data.front=image", "data.wrist=wrist_image",
         "vla.state_dim=8"},
        ["the unit of", "no action column is a gripper", "no action column has a state column"],
    ),
    "LIBERO, HDF5": (
        lambda r: (write_libero_hdf5(r / "a.hdf5", (45, 46)), r)[1], list(range(7)), "1 is 0.05 m",
        {"vla.state_dim=8"}, [],
    ),
    "Unitree G1": (
        lambda r: lerobot(r, G1, "Unitree_G1", ("observation.images.cam_left_high",)), [], "radians",
        {"data.front=observation.images.cam_left_high", "vla.state_dim=8", "sequence.use_wrist_frame=False"},
        ["no action column is a gripper"],
    ),
    "GR1": (
        lambda r: lerobot(r, GR1, "gr1", ("observation.images.ego_view",)), [], "radians",
        {"data.front=observation.images.ego_view", "vla.state_dim=10", "sequence.use_wrist_frame=False"},
        ["no action column is a gripper"],
    ),
    "Piper": (
        lambda r: lerobot(r, PIPER, "piper", ("observation.images.top", "observation.images.hand")), [6], "radians",
        {"data.front=observation.images.top", "data.wrist=observation.images.hand", "vla.state_dim=7"}, [],
    ),
    "Bridge": (
        lambda r: write_openx(r, "bridge", {"image": (32, 40), "state": 7}, {
            "open_gripper": 0, "rotation_delta": 3, "terminate_episode": 0, "world_vector": 3}, count=45),
        None, "unknown", {"vla.state_dim=7", "sequence.use_wrist_frame=False"},
        ["the unit of", "no action column is a gripper", "no action column has a state column"],
    ),
    "DROID": (
        lambda r: write_openx(r, "droid", {
            "cartesian_position": 6, "exterior_image_1_left": (20, 32), "gripper_position": 1, "joint_position": 7,
            "wrist_image_left": (20, 32)}, 7, "steps", count=45),
        None, "unknown", {"vla.state_dim=8", "sequence.length=7936"},
        ["the unit of", "no action column is a gripper", "no action column has a state column"],
    ),
    "CALVIN": (
        write_calvin, [6], "metres", {"vla.state_dim=7"}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_robots_data_set_is_understood_and_its_commands_are_complete(layout, tmp_path, capsys):
    write, kept, unit, keys, asked = LAYOUTS[layout]
    (tmp_path / "set").parent.mkdir(exist_ok=True)
    root = write(tmp_path / "set")
    found = inspect(capsys, root)
    action = found["columns"]["action"]
    assert action[0]["unit"] == unit
    if kept is not None:
        assert [i for i, column in enumerate(action) if column["pair"] is None] == kept
    assert len(found["questions"]) == len(asked)
    assert all(said.startswith(start) for said, start in zip(found["questions"], asked, strict=True)), found[
        "questions"
    ]
    own = {word.removeprefix("--config.") for word in found["stages"]["robot"]} - {f"data.source={found['source']}"}
    assert own == keys | ({f"action_vae_model.action_dim={len(action)}"} & own)
    # The keys are all that the stages need: a batch of the ActionVAE, and the sizes of the policy.
    config = config_file.load(
        "configs/action_vae.py:tiny", [*found["stages"]["action_vae"], "--config.batch_size=4"]
    ).build()
    if layout != "CALVIN":  # whose few steps make no example
        batch = next(Loader(config).batches())
        assert batch["actions"].shape[-1] == len(action) and np.isfinite(batch["actions"]).all()
    config = config_file.load("configs/robot.py:7b", found["stages"]["robot"]).build()
    sources = open_sources(config, progress=False)
    checks.check_sources(sources, config)
    assert checks.common_size(sources, config)


def test_what_people_read(tmp_path, capsys):
    root = lerobot(tmp_path / "my set", SO, "so_follower")
    assert cli.main(["data", "inspect", str(root), "--config.data.columns.unit=degrees"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"lerobot:{root}: LeRobot v2.1, robot so_follower, 30 steps per second\n")
    assert "2 episodes of 45 to 46 steps, 91 in all" in out and "  ? " not in out.partition("stage ")[0]
    assert re.search(r"^  shoulder_pan +degrees +joint +target, relative to state shoulder_pan +", out, re.M)
    command = out.partition("stage action_vae\n")[2].partition("\n\n")[0].replace("\\\n", "")
    words = shlex.split(command)
    assert words[:4] == ["rynnvla", "train", "--config", "configs/action_vae.py:full"]
    assert f"--config.data.source=lerobot:{root}" in words and "--config.data.columns.unit=degrees" in words


def test_the_command_that_checks_a_set_works_as_it_is_printed(tmp_path, capsys):
    """For names that no default has, and a path with spaces."""
    write_libero(tmp_path / "open pi", (45, 46))
    assert cli.main(["data", "inspect", str(tmp_path / "open pi")]) == 0
    command = capsys.readouterr().out.partition("every fault\n")[2].partition("\n\n")[0].replace("\\\n", "")
    assert "--config.data.lerobot.action=actions" in command and "--config.data.front=image" in command
    assert cli.main([*shlex.split(command)[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["looked_at"]["rows"] == 91


def test_episodes_that_are_too_short_are_named(tmp_path, capsys):
    root = tmp_path / "set"
    write_lerobot(root, (5, 45), videos=(FRONT, WRIST))
    assert cli.main(["data", "inspect", str(root)]) == 0
    assert "? 1 of 2 episodes are shorter than the 21 steps that an example needs" in capsys.readouterr().out


def test_hands_have_their_own_stage(tmp_path, capsys):
    write_egodex(tmp_path / "set", 60)
    found = inspect(capsys, tmp_path / "set")
    assert list(found["stages"]) == ["action_vae", "trajectory", "video"] and not found["questions"]


@pytest.mark.parametrize(
    ("cameras", "keys"),
    [
        ((WRIST,), {"data.front": WRIST, "data.wrist": "none"}),
        (("observation.images.left_hand_cam",), {"data.front": "observation.images.left_hand_cam"}),
        (
            ("cam.front_depth", "cam.rgb", "cam.wrist_depth", "cam.wrist_rgb"),
            {"data.front": "cam.rgb", "data.wrist": "cam.wrist_rgb"},
        ),
    ],
)
def test_cameras_of_other_names_are_found(tmp_path, capsys, cameras, keys):
    found = inspect(capsys, lerobot(tmp_path / "set", SO, "so100_follower", cameras))
    assert {f"data.{k}": v for k, v in found["keys"].items()} == keys
    config = config_file.load("configs/robot.py:7b", found["stages"]["robot"]).build()
    assert open_sources(config, progress=False)[0].views == (("front", "wrist") if len(cameras) > 1 else ("front",))


def test_what_there_is_to_choose_from_is_shown_before_the_remedy(tmp_path, capsys):
    root = write_lerobot(tmp_path / "set", (45,), names=("observation.qpos", "actions"))
    file = root / "meta" / "info.json"
    info = json.loads(file.read_text(encoding="utf-8"))
    info["features"]["state"] = info["features"]["observation.qpos"]
    file.write_text(json.dumps(info), encoding="utf-8")
    assert cli.main(["data", "inspect", str(root)]) == 1
    error = capsys.readouterr().err
    assert "observation.qpos  " in error and "actions  " in error
    assert error.rstrip().endswith("set --config.data.lerobot.state to one of observation.qpos, state")
