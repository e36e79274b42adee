"""Recordings: what is written is what happened, whatever the number of workers and however often it was killed."""

import fcntl
import json
import signal
import subprocess
import time

import av
import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import difference
from rynnvla_jax.config import DataConfig
from rynnvla_jax.sim import lerobot_writer, record, recordings, tasks
from rynnvla_jax.sim.env import CAMERAS, TableTop
from rynnvla_jax.sim.lerobot_writer import EpisodeWriter, Robot
from rynnvla_jax.sim.recordings import ArmRecording
from tests.lerobot_environments import ENVIRONMENT, python  # noqa: F401  a fixture
from tests.recordings import grey_ramp, numbers_of
from tests.simulator import children, gone, hashes, need_arm, need_eyes, recorded_set, start_recording

ROBOT = Robot("so100_follower", ("a", "b", "gripper"), ("front", "wrist"), 32, 30)
ARGUMENTS = ["--task", "block", "--scenario", "distractor", "--seed", "5", "--size", "48", "--noise", "1"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder, what the command said) of three episodes."""
    return recorded_set(ARGUMENTS, tmp_path_factory.mktemp("recorded") / "set", 3)


def rows_of(length, seed, width=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, length, width)).astype(np.float32)


def write_parts(folder, lengths, robot=ROBOT):
    """Synthetic episodes whose frames are numbered through: brightness tells which."""
    folders, first = [], 0
    for i, length in enumerate(lengths):
        part = folder / f"{i:06d}"
        part.mkdir(parents=True)
        states, actions = rows_of(length, i, len(robot.names))
        with EpisodeWriter(part, robot) as writer:
            for step in range(length):
                front, wrist = grey_ramp(2, first=first + step)
                writer.add(states[step], actions[step], {"front": front, "wrist": wrist})
        folders.append(part)
        first += length
    return folders


# The data set


@pytest.mark.parametrize("limits", [(100, 200), (1e-9, 1e-9)], ids=["one file", "a file an episode"])
def test_our_reader_finds_what_was_written(tmp_path, monkeypatch, limits):
    monkeypatch.setattr(lerobot_writer, "_DATA_MB", limits[0])
    monkeypatch.setattr(lerobot_writer, "_VIDEO_MB", limits[1])
    lengths, texts = (11, 31, 5), ["lift it", "drop it", "lift it"]
    lerobot_writer.assemble(write_parts(tmp_path / "parts", lengths), texts, tmp_path / "set", ROBOT)
    files = list((tmp_path / "set" / "videos").rglob("*.mp4"))
    assert len(files) == (2 if limits[0] > 1 else 6)
    episodes = open_source(f"lerobot:{tmp_path / 'set'}", DataConfig(), None, progress=False)
    assert episodes.lengths.tolist() == list(lengths) and episodes.columns.robot == "lerobot:so100_follower"
    first = 0
    for i, episode in enumerate(episodes):
        states, actions = rows_of(lengths[i], i)
        np.testing.assert_array_equal(episode.state, states)
        np.testing.assert_array_equal(episode.action, actions)
        assert {episode.text(step) for step in range(len(episode))} == {texts[i]}
        steps = np.arange(len(episode))
        assert numbers_of(episode.frames("front", steps)) == (first + steps).tolist()
        assert numbers_of(episode.frames("wrist", steps)) == (first + steps + 1).tolist()
        first += lengths[i]


def test_layout_is_that_of_lerobots_own_recordings(tmp_path):
    lerobot_writer.assemble(write_parts(tmp_path / "parts", (4, 3)), ["a", "b"], tmp_path / "set", ROBOT)
    theirs, ours = demo.path("so100"), tmp_path / "set"
    assert set(hashes(ours)) == set(hashes(theirs))
    info = [json.loads((root / "meta/info.json").read_text(encoding="utf-8")) for root in (theirs, ours)]
    assert info[0].keys() == info[1].keys() and info[0]["features"].keys() == info[1]["features"].keys()
    for key, feature in info[0]["features"].items():
        assert feature.keys() == info[1]["features"][key].keys()
    import pyarrow.parquet as pq

    for file in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        schemas = [pq.read_schema(root / file) for root in (theirs, ours)]
        assert set(schemas[0].names) == set(schemas[1].names)
    stats = [json.loads((root / "meta/stats.json").read_text(encoding="utf-8")) for root in (theirs, ours)]
    for key, values in stats[0].items():
        assert values.keys() == stats[1][key].keys()
        for name, value in values.items():
            if key.startswith("observation.images"):
                assert np.shape(value) == np.shape(stats[1][key][name])


def test_statistics_are_of_all_rows_and_pixels(tmp_path):
    lengths = (21, 10)
    lerobot_writer.assemble(write_parts(tmp_path / "parts", lengths), ["a", "b"], tmp_path / "set", ROBOT)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text(encoding="utf-8"))
    actions = np.concatenate([rows_of(n, i)[1] for i, n in enumerate(lengths)])
    for name, expected in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "min": actions.min(0),
        "q10": np.quantile(actions, 0.1, axis=0),
        "count": [31],
    }.items():
        np.testing.assert_allclose(stats["action"][name], expected, rtol=1e-4)
    shades = (40 + 4 * np.array([0, 10, 20, 21])) / 255  # every tenth frame of each episode
    front = stats["observation.images.front"]
    np.testing.assert_allclose(np.ravel(front["mean"]), [shades.mean()] * 3)
    np.testing.assert_allclose(np.ravel(front["std"]), [shades.std()] * 3)
    assert np.ravel(front["q50"]) == pytest.approx([shades[1]] * 3) and front["count"] == [4]


def test_failed_attempts_are_left_out_and_counted(tmp_path, capsys):
    need_eyes()
    recording = ArmRecording("block", "single", 0, ROBOT.size, 0.0, True)
    aside = tmp_path / "set" / ".recording"
    write_parts(aside, (5, 6, 7), recording.robot())
    (aside / "recording.json").write_text(json.dumps(vars(recording)), encoding="utf-8")
    for i, success in enumerate((True, False, True)):
        said = {"success": success, "frames": 5 + i, "instruction": f"text {i}"}
        (aside / f"{i:06d}" / "outcome.json").write_text(json.dumps(said), encoding="utf-8")
    record.record(recording, 2, tmp_path / "set", workers=1)
    assert "1 of 3 attempts failed and were left out" in capsys.readouterr().out
    episodes = open_source(f"lerobot:{tmp_path / 'set'}", DataConfig(), (), progress=False)
    assert episodes.lengths.tolist() == [5, 7] and episodes.texts == ("text 0", "text 2")
    how = json.loads((tmp_path / "set/meta/recording.json").read_text(encoding="utf-8"))
    assert how["episode_seeds"] == [0, 2] and how["failed_attempts"] == 1


def test_an_attempt_that_fails_leaves_no_frames(tmp_path, monkeypatch):
    need_eyes()
    monkeypatch.setattr(TableTop, "success", lambda self: False)
    monkeypatch.setattr(recordings, "demonstrate", lambda *a: iter(()))
    outcome = record._attempt(ArmRecording("block", "single", 0, 32, 0.0, True), 7, tmp_path)
    assert not outcome["success"] and outcome["instruction"] in tasks.phrasings("block", "single")
    assert [f.name for f in (tmp_path / "000007").iterdir()] == ["outcome.json"]


# The command


def test_recorded_data_are_sound(recorded, capsys, tmp_path, monkeypatch):
    out, said = recorded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "Recording expert demonstrations of block, distractor: 3 episodes" in said and str(out) in said
    assert cli.main(["data", "validate", f"lerobot:{out}"]) == 0
    assert "0 errors, 0 warnings (checked: 3 episodes" in capsys.readouterr().out
    assert not (out / ".recording").exists()


def test_recordings_begin_as_their_seeds_say(recorded):
    out, _ = recorded
    how = json.loads((out / "meta/recording.json").read_text(encoding="utf-8"))
    episodes = open_source(f"lerobot:{out}", DataConfig(), None, progress=False)
    assert not difference(episodes.columns, TableTop.columns) and set(episodes.texts) <= set(
        tasks.phrasings("block", "distractor")
    )
    first = {camera: np.stack([e.frames(camera, [0])[0] for e in episodes]).astype(float) for camera in CAMERAS}
    env = TableTop(how["task"], how["scenario"], size=how["size"])
    for i, (episode, seed) in enumerate(zip(episodes, how["episode_seeds"], strict=True)):
        env.reset(seed)
        assert episode.text(0) == env.instruction
        np.testing.assert_array_equal(episode.state[0], env.state)
        for camera in CAMERAS:  # h264 changes pixels a little
            errors = np.square(first[camera] - env.render(camera)).mean((1, 2, 3))
            assert all(errors[i] < errors[k] / 4 for k in range(len(episodes)) if k != i)


def test_recorded_actions_do_it_again(tmp_path, monkeypatch):
    """State, then action, then the next state: what was recorded replays to the same states and the same end."""
    monkeypatch.setattr(TableTop, "render", lambda self, camera: np.zeros((32, 32, 3), np.uint8))
    outcome = record._attempt(ArmRecording("strawberry", "single", 1, 32, 0.0, True), 4, tmp_path)
    assert outcome["success"]
    rows = np.load(tmp_path / "000004" / "rows.npz")
    env = TableTop("strawberry", "single", fixed_look=True)
    env.reset(1 * record.SEEDS + 4)
    for state, action in zip(rows["state"], rows["action"], strict=True):
        np.testing.assert_array_equal(state, env.state)
        env.step(action)
    assert env.success() and len(rows["state"]) == outcome["frames"]


def test_a_killed_recording_continues_to_the_same_bytes(recorded, tmp_path):
    out = tmp_path / "set"
    process = start_recording(ARGUMENTS, out, 3, workers=1)
    first, second = (out / ".recording" / f"{i:06d}" / "outcome.json" for i in range(2))
    while not second.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert workers and gone(workers)
    for file in sorted(first.parent.iterdir()):  # as if another worker had been slower
        file.unlink()
    first.parent.rmdir()
    assert not (out / "meta" / "info.json").exists()
    process = start_recording(ARGUMENTS, out, 3, workers=2)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "1 of 3 are already recorded" in said
    assert hashes(out) == hashes(recorded[0])
    process = start_recording(ARGUMENTS, out, 3, workers=1)
    said, _ = process.communicate()
    assert process.returncode == 0 and "all 3 episodes are already recorded" in said


def test_two_at_once_in_one_folder_are_refused(tmp_path, capsys):
    aside = tmp_path / "set" / ".recording"
    aside.mkdir(parents=True)
    with (aside / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["--task", "block", "--episodes", "1", "--size", "32", "--out", str(aside.parent)]
        assert cli.main(["record", *words]) == 1
    assert "another process is recording" in capsys.readouterr().err


def test_another_recording_is_not_mixed_in(recorded, tmp_path, capsys):
    out = recorded[0]
    common = ["--episodes", "3", "--out", str(out)]
    assert cli.main(["record", *ARGUMENTS, *common, "--seed", "6"]) == 1
    assert "contains another recording" in capsys.readouterr().err
    assert cli.main(["record", *ARGUMENTS, *common, "--episodes", "4"]) == 1
    assert "is finished with 3 episodes of this recording" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert cli.main(["record", *ARGUMENTS, "--episodes", "1", "--out", str(tmp_path)]) == 1
    assert "is not empty; choose another --out" in capsys.readouterr().err
    (tmp_path / ".recording").mkdir()
    unfinished = {**vars(ArmRecording("block", "distractor", 5, 64, 1.0, False))}
    (tmp_path / ".recording" / "recording.json").write_text(json.dumps(unfinished), encoding="utf-8")
    assert cli.main(["record", *ARGUMENTS, "--episodes", "1", "--out", str(tmp_path)]) == 1
    assert "size 64, not 48; repeat its command, or choose another --out" in capsys.readouterr().err


def test_without_the_arm_the_remedy_is_named(tmp_path):
    process = start_recording(ARGUMENTS, tmp_path / "set", 1, 1, RYNNVLA_CACHE=str(tmp_path / "empty"))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("rynnvla record: ") and "run `rynnvla fetch so100`" in errors
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--episodes", "0", "--episodes is 0; it must be at least 1"),
        ("--size", "33", "--size is 33; it must be an even number from 32 to 1024"),
        ("--task", "cup", "--task cup: choose one of block, strawberry, pen"),
        ("--seed", "-1", "--seed is -1; it must be at least 0"),
        ("--noise", "nan", "--noise is nan; it must be at least 0"),
        ("--out", __file__, "is a file, not a folder"),
    ],
)
def test_bad_arguments(option, value, message, tmp_path, capsys):
    words = dict(zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True))
    words |= {"--episodes": "1", "--out": str(tmp_path / "set"), option: value}
    assert cli.main(["record", *(f"{k}={v}" for k, v in words.items())]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lerobots_own_reader_opens_it(recorded, python):  # noqa: F811
    """In an environment of its own: lerobot cannot share ours."""
    program = """
import sys, json, torch
torch.library.register_fake = lambda *a, **k: (lambda f: f)  # torchvision wants operators that it does not need
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("local/recorded", root=sys.argv[1])
steps = [data[i] for i in range(len(data))]
print(json.dumps({
    "episodes": data.num_episodes, "frames": len(data), "fps": data.fps, "robot": data.meta.robot_type,
    "task": [s["task"] for s in steps], "action": [s["action"].tolist() for s in steps],
    "front": [(255 * s["observation.images.front"].mean()).item() for s in steps],
}))
"""
    words = [python, "-c", program, str(recorded[0])]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = open_source(f"lerobot:{recorded[0]}", DataConfig(), None, progress=False)
    assert theirs["episodes"] == len(ours) and theirs["frames"] == sum(ours.lengths) and theirs["fps"] == 30
    assert theirs["robot"] == "so100_follower"
    assert theirs["task"] == [e.text(i) for e in ours for i in range(len(e))]
    np.testing.assert_array_equal(np.array(theirs["action"], np.float32), np.concatenate([e.action for e in ours]))
    front = np.concatenate([e.frames("front", range(len(e))).mean((1, 2, 3)) for e in ours])
    np.testing.assert_allclose(theirs["front"], front, atol=1.5)


def test_every_frame_can_be_sought(recorded):
    """A key frame every 30 frames or fewer, and time stamps that run on across episodes."""
    for camera in CAMERAS:
        with av.open(str(recorded[0] / f"videos/observation.images.{camera}/chunk-000/file-000.mp4")) as video:
            stream = video.streams.video[0]
            packets = [p for p in video.demux(stream) if p.pts is not None]
            times = np.array([float(p.pts * p.time_base) for p in packets])
            keys = np.flatnonzero([p.is_keyframe for p in packets])
        np.testing.assert_allclose(times, np.arange(len(times)) / 30, atol=1e-6)
        assert np.diff([*keys, len(times)]).max() <= 30


@pytest.fixture(scope="module", autouse=True)
def model():
    need_arm()
