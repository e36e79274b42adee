"""Recordings of a hand: poses and pictures of the same moment, in EgoDex's layout; objects move because of the hand."""

import json
import signal
import time
from itertools import pairwise

import h5py
import numpy as np
import pytest

from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import DataConfig
from rynnvla_jax.sim import hand, human, record, tasks
from rynnvla_jax.sim.egodex_writer import ClipWriter
from rynnvla_jax.sim.env import TableTop
from rynnvla_jax.sim.human import HandCommand, HandTable
from rynnvla_jax.sim.reach import demonstrate
from tests.simulator import hashes, need_arm, need_eyes, recorded_set, start_recording

ARGUMENTS = ["--human", "--task", "block", "--scenario", "distractor", "--seed", "5", "--size", "48"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder, what the command said) of two clips."""
    return recorded_set(ARGUMENTS, tmp_path_factory.mktemp("recorded") / "set", 2)


def played(task, scenario, seed):
    env = HandTable(task, scenario, fixed_look=True)
    env.reset(seed)
    for command in demonstrate(env, seed):
        env.step(command)
    return env


# The data set


def test_recorded_clips_are_sound(recorded, capsys, tmp_path, monkeypatch):
    out, said = recorded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "Recording human hand clips of block, distractor: 2 episodes" in said and str(out) in said
    assert cli.main(["data", "validate", f"egodex:{out}"]) == 0
    assert "0 errors, 0 warnings (checked: 2 episodes" in capsys.readouterr().out
    assert {f.name for f in (out / "block_distractor").iterdir()} == {"0.hdf5", "0.mp4", "1.hdf5", "1.mp4"}
    assert {f.name for f in out.iterdir()} == {"block_distractor", "meta"}
    how = json.loads((out / "meta/recording.json").read_text(encoding="utf-8"))
    assert how["episode_seeds"][0] == 5 * record.SEEDS and "within 32 mm" in how["grasp"]


def test_our_reader_finds_what_happened(recorded):
    """Frame, wrists and camera of step t are those of the simulator after t steps."""
    out, _ = recorded
    how = json.loads((out / "meta/recording.json").read_text(encoding="utf-8"))
    episodes = open_source(f"egodex:{out}", DataConfig(), None, progress=False)
    assert set(episodes.texts) <= set(tasks.phrasings("block", "distractor"))
    env = HandTable("block", "distractor", size=48)
    wrists = ("leftHand", "rightHand")
    for episode, seed in zip(episodes, how["episode_seeds"], strict=True):
        env.reset(seed)
        assert episode.text(0) == env.instruction and episode.fps == env.fps
        checked = range(0, len(episode), 40)
        seen = []
        for t, command in enumerate(demonstrate(env, seed)):
            poses = env.poses()
            relative = [np.linalg.solve(poses["camera"], poses[name])[:3, 3] for name in wrists]
            np.testing.assert_allclose(episode.state[t], np.ravel(relative), atol=1e-5)
            if t in checked:
                seen.append(env.render())
            env.step(command)
            np.testing.assert_allclose(episode.action[t], np.ravel([env.poses()[n][:3, 3] for n in wrists]), atol=1e-6)
        assert t == len(episode) - 1
        env.close()
        frames, seen = episode.frames("front", list(checked)).astype(float), np.stack(seen)
        errors = np.square(frames[:, None] - seen[None]).mean((2, 3, 4))  # h264 changes pixels a little
        assert (errors.argmin(1) == np.arange(len(seen))).all() and errors.diagonal().max() < 100


def test_every_joint_of_both_hands_is_there(recorded):
    """As EgoDex names them, whole, with rotations, fingers of unchanging length, and no confidence out of sight."""
    with h5py.File(recorded[0] / "block_distractor/0.hdf5") as file:
        tracks = {name: data[:] for name, data in file["transforms"].items()}
        confidences = {name: data[:] for name, data in file["confidences"].items()}
        assert file.attrs["which_llm_description"] == "1" and file.attrs["llm_description"]
        intrinsic = file["camera/intrinsic"][:]
    names = [name for side in ("left", "right") for name in hand.joints(side)]
    assert len(names) == 50 and set(tracks) == {"camera", *names} and set(confidences) == set(names)
    assert {"rightHand", "leftThumbTip", "rightIndexFingerIntermediateBase", "leftLittleFingerMetacarpal"} <= set(names)
    for track in tracks.values():
        turn = track[:, :3, :3]
        np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.tile(np.eye(3), (len(track), 1, 1)), atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-5)
    for first, second in pairwise(n for n in names if "Middle" in n and n.startswith("right")):
        lengths = np.linalg.norm(tracks[first][:, :3, 3] - tracks[second][:, :3, 3], axis=1)
        assert 0.015 < lengths[0] < 0.1 and np.ptp(lengths) < 1e-5
    tip = np.linalg.solve(tracks["camera"], tracks["rightIndexFingerTip"])[:, :3, 3]
    pixels = tip @ intrinsic.T
    inside = (np.abs(pixels[:, :2] / pixels[:, 2:] - 24) <= 24).all(1) & (tip[:, 2] > 0)
    np.testing.assert_array_equal(confidences["rightIndexFingerTip"], inside)
    assert inside.mean() > 0.5


def test_the_hand_is_where_its_pose_says():
    """Its joints' projections lie on the hand in the picture: camera pose, intrinsics and hand agree."""
    need_eyes()
    env = HandTable("block", "single", size=256, fixed_look=True)
    env.reset(0)
    for _, command in zip(range(40), demonstrate(env, 0), strict=False):
        env.step(command)
    paint(env, ["rightForearm"], (0, 0, 0, 0))  # hides some of the hand
    before, poses = env.render().astype(int), env.poses()
    paint(env, ["rightPalm", *hand.phalanges()], (0, 0, 1, 1))
    on_hand = np.abs(env.render().astype(int) - before).sum(2) > 30
    env.close()
    assert 0.01 < on_hand.mean() < 0.1
    for name in hand.joints("right"):
        x, y, z = np.linalg.solve(poses["camera"], poses[name])[:3, 3]
        column, row = (env.intrinsic() @ (x / z, y / z, 1))[:2].astype(int)
        assert on_hand[row - 1 : row + 2, column - 1 : column + 2].any(), name


def paint(env, bodies, rgba):
    ids = [env.model.body(name).id for name in bodies]
    env.model.geom_rgba[np.isin(env.model.geom_bodyid, ids)] = rgba


def test_a_failed_clip_is_not_complete(tmp_path):
    with pytest.raises(KeyError), ClipWriter(tmp_path, 32, 30, np.eye(3, dtype=np.float32), {}) as writer:
        writer.add({"camera": np.eye(4, dtype=np.float32)}, np.zeros((32, 32, 3), np.uint8))
        raise KeyError
    assert not (tmp_path / "clip.h5").exists()


# The command


def test_a_killed_recording_continues_to_the_same_bytes(recorded, tmp_path):
    out = tmp_path / "set"
    process = start_recording(ARGUMENTS, out, 2, workers=1)
    first = out / ".recording" / "000000" / "outcome.json"
    while not first.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(out.rglob("*.hdf5"))  # half of a recording does not pass for data
    process = start_recording(ARGUMENTS, out, 2, workers=2)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "1 of 2 are already recorded" in said or "2 of 2 are already recorded" in said
    assert hashes(out) == hashes(recorded[0])


def test_arm_and_hand_are_not_mixed(recorded, capsys):
    out = recorded[0]
    arguments = [*ARGUMENTS[1:], "--episodes", "2", "--out", str(out)]
    need_arm()
    assert cli.main(["record", *arguments]) == 1
    assert "contains another recording" in capsys.readouterr().err


def test_noise_is_for_the_arm(tmp_path, capsys):
    words = [*ARGUMENTS, "--episodes", "1", "--out", str(tmp_path / "set"), "--noise", "1"]
    assert cli.main(["record", *words]) == 2
    assert "leave it out with --human" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


# What happens


@pytest.mark.parametrize(
    ("task", "scenario", "seed"), [("block", "multi", 1), ("strawberry", "distractor", 2), ("pen", "single", 3)]
)
def test_the_hand_does_the_task(task, scenario, seed):
    env = played(task, scenario, seed)
    assert env.success() and env.held is None


def test_nothing_moves_what_is_not_taken(monkeypatch):
    """With no reach for an object, the same motion leaves everything where it lay: the hand makes the success."""
    monkeypatch.setattr(human, "HOLDS", 0.0)
    env = played("strawberry", "single", 2)
    assert not env.success() and env.things.position("target0")[2] < 0.03


def test_only_what_is_near_both_fingertips_is_taken():
    env = HandTable("block", "single", fixed_look=True)
    env.reset(0)
    command = env.command
    env.step(HandCommand(command.position, command.rotation, command.fingers, True))
    assert env.held is None


def test_layouts_and_instructions_are_those_of_the_arm():
    need_arm()
    arm, person = TableTop("pen", "distractor"), HandTable("pen", "distractor")
    for seed in range(3):
        arm.reset(seed)
        person.reset(seed)
        assert arm.layout == person.layout and arm.instruction == person.instruction


def test_seeds_vary_what_is_seen_and_done():
    """Start, speed, yaw, camera and light differ from seed to seed; with a fixed look only the motion does."""
    wrists, cameras, lights = [], [], []
    for fixed in (False, True):
        for seed in range(3):
            env = HandTable("block", "single", fixed_look=fixed)
            env.reset(seed)
            wrists.append(env.poses()["rightHand"])
            cameras.append(env.model.camera("head").fovy[0])
            lights.append(tuple(env.model.light_dir[0]))
    assert len({tuple(w[:3, 3]) for w in wrists[:3]}) == len({tuple(w[:3, 0]) for w in wrists[:3]}) == 3
    assert len(set(cameras[:3])) == len(set(lights[:3])) == 3
    assert len(set(cameras[3:])) == len(set(lights[3:])) == 1
    np.testing.assert_array_equal(wrists[:3], wrists[3:])
