"""CALVIN, RLDS, RynnVLA-001's HDF5 and folders of clips; what is left out; and the index of large data sets."""

import json
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest

from data_pipelines import tfrecord
from data_pipelines.checks import check_sources
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.run import validate
from data_pipelines.sources import index, open_source, rlds
from data_pipelines.sources.recognize import source_of
from data_pipelines.video import probe, whole_clip
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, DataConfig, RLDSConfig, TrainConfig, VLAConfig
from tests.recordings import (
    grey_ramp,
    numbers_of,
    write_calvin,
    write_captions,
    write_clips,
    write_egodex,
    write_hdf5,
    write_libero_hdf5,
    write_openx,
    write_rlds,
    write_video,
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def load(source, views=None, **kwargs):
    return open_source(str(source), DataConfig(**kwargs), views, progress=False)


def write_exclude(path, source, *names):
    path.write_text(json.dumps({"episodes": {str(source): names}}), encoding="utf-8")
    return str(path)


def as_worker(episodes, number):
    """The episode as a worker process reads it, to which the source travels as a pickle of our own."""
    return pickle.loads(pickle.dumps(episodes.read))(number)


# --- Videos in memory --------------------------------------------------------------------------------------------


def test_a_video_in_memory_gives_the_frames_of_its_file(tmp_path):
    write_video(tmp_path / "a.mp4", grey_ramp(45))
    data = (tmp_path / "a.mp4").read_bytes()
    clip = probe("clip 7", data)
    assert (clip.count, clip.fps, clip.height, clip.width) == (45, 30.0, 32, 32)
    assert numbers_of(clip.frames([31, 0, 44, 31])) == [31, 0, 44, 31]
    np.testing.assert_array_equal(clip.frames(range(45)), whole_clip(tmp_path / "a.mp4").frames(range(45)))
    assert clip.frames([]).shape == (0, 32, 32, 3)
    with pytest.raises(IndexError, match="clip 7: frame 45"):
        clip.frames([45])


def test_damage_in_memory_is_named(tmp_path):
    for data in (b"", b"nonsense"):
        with pytest.raises(DataError, match="clip 7 cannot be opened"):
            probe("clip 7", data)
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, movflags="+faststart")
    data = (tmp_path / "a.mp4").read_bytes()
    clip = probe("clip 7", data[: len(data) * 3 // 4])
    assert clip.frames([0]).shape == (1, 64, 64, 3)
    with pytest.raises(DataError, match="clip 7: frame 39"):
        clip.frames([0, 39])


# --- The index ---------------------------------------------------------------------------------------------------


def forbid_hdf5(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an HDF5 file was opened")

    monkeypatch.setattr(h5py, "File", refuse)


def test_egodex_is_read_once_and_then_only_what_changed(tmp_path, monkeypatch):
    root = tmp_path / "set"
    files = [write_egodex(root, 12 + i, name=str(i))[0] for i in range(3)]
    before = sorted(root.rglob("*"))
    first = load(f"egodex:{root}")
    assert first.lengths.tolist() == [11, 12, 13] and first.frame_sizes.keys() == {(32, 32)}
    assert sorted(root.rglob("*")) == before
    with monkeypatch.context() as patch:
        forbid_hdf5(patch)
        again = load(f"egodex:{root}")
        assert again.lengths.tolist() == [11, 12, 13] and again.texts == ("lift the cup",)
        assert again.seconds == pytest.approx(36 / 30)
        os.utime(files[1], ns=(1, 1))
        with pytest.raises(AssertionError, match="opened"):
            load(f"egodex:{root}")
    write_egodex(root, 20, name="1")
    assert load(f"egodex:{root}").lengths.tolist() == [11, 19, 13]


def test_poses_are_read_when_asked_for(tmp_path):
    root = tmp_path / "set"
    files = [write_egodex(root, 12, name=str(i))[0] for i in range(2)]
    episodes = load(f"egodex:{root}")
    assert as_worker(episodes, 1).name == "part1/lift/1"
    shutil.copy(write_egodex(tmp_path / "other", 9)[0], files[1])
    assert len(episodes[0]) == 11
    with pytest.raises(DataError, match=r"1.hdf5 now has 9 poses instead of 12"):
        episodes[1]
    files[1].write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"1.hdf5 cannot be read"):
        episodes[1]


def test_every_damaged_file_is_counted_and_the_intact_are_kept(tmp_path, monkeypatch):
    root = tmp_path / "set"
    files = [write_egodex(root, 12, name=str(i))[0] for i in range(4)]
    whole = {i: files[i].read_bytes() for i in (1, 3)}
    for i in whole:
        files[i].write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"lift/1.hdf5 cannot be read .* \(and 1 other files\)"):
        load(f"egodex:{root}", ())
    for i, content in whole.items():
        files[i].write_bytes(content)
    seen = []
    real = h5py.File

    class Spy(real):
        def __init__(self, name, *args, **kwargs):
            seen.append(os.path.basename(name))
            super().__init__(name, *args, **kwargs)

    monkeypatch.setattr(h5py, "File", Spy)
    assert len(load(f"egodex:{root}", ())) == 4 and sorted(seen) == ["1.hdf5", "3.hdf5"]


def test_an_index_cut_short_is_completed(tmp_path, cache):
    for name in "abc":
        (tmp_path / name).write_text(name, encoding="utf-8")
    seen = []

    def read(path):
        seen.append(path.name)
        return {"what": path.read_text(encoding="utf-8")}

    expected = [{"what": name} for name in "abc"]
    assert index.index_files("kind 1", tmp_path, list("abc"), read, False) == expected
    (file,) = (cache / "rynnvla_jax" / "index").iterdir()
    content = file.read_bytes()
    for cut in (len(content) - 1, len(content) - 9, 5, 0):
        file.write_bytes(content[:cut])
        seen.clear()
        assert index.index_files("kind 1", tmp_path, list("abc"), read, False) == expected
        assert len(seen) <= 1 + 2 * (cut < 10)
        seen.clear()
        assert index.index_files("kind 1", tmp_path, list("abc"), read, False) == expected and not seen
    assert index.index_files("kind 2", tmp_path, ["b"], read, False) == [{"what": "b"}] and seen == ["b"]


def test_a_kill_in_the_middle_loses_little(tmp_path, monkeypatch):
    names = [f"{i:03d}" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(index, "_THREADS", 1)
    read = []

    def killed(path):
        read.append(path.name)
        if path.name == "150":
            raise KeyboardInterrupt
        return {"name": path.name}

    with pytest.raises(KeyboardInterrupt):
        index.index_files("kind 1", tmp_path, names, killed, False)
    read.clear()
    rows = index.index_files("kind 1", tmp_path, names, lambda p: read.append(p.name) or {"name": p.name}, False)
    assert [row["name"] for row in rows] == names
    assert len(read) <= 200 - 150 + index._BATCH


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked cannot be listed"):
        index.find_files(tmp_path, {".mp4"})


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        index.index_files("kind 1", tmp_path, ["file"], lambda p: {}, False)


# --- Episodes that are left out ----------------------------------------------------------------------------------


def test_what_is_left_out_is_not_looked_at(tmp_path, capsys):
    root = tmp_path / "set"
    files = [write_egodex(root, 12, name=str(i))[0] for i in range(3)]
    files[1].write_bytes(b"nonsense")
    source = f"egodex:{root}"
    path = write_exclude(tmp_path / "out.json", f"egodex:{root}/part1/..", "part1/lift/1")
    assert [e.name for e in load(source, exclude=path)] == ["part1/lift/0", "part1/lift/2"]
    message = capsys.readouterr().err
    assert message.count("1 of 3 episodes left out") == 1 and source in message
    path = write_exclude(tmp_path / "out.json", f"clips:{root}", "part1/lift/1")
    with pytest.raises(DataError, match="1.hdf5 cannot be read"):
        load(source, exclude=path)


def test_names_that_match_nothing_are_an_error(tmp_path):
    write_egodex(tmp_path / "set")
    source = f"egodex:{tmp_path / 'set'}"
    path = write_exclude(tmp_path / "out.json", source, "part1/lift/0", "part1/lift/7")
    with pytest.raises(DataError, match=r"out.json names 'part1/lift/7' .*\(unknown names: 1\)"):
        load(source, exclude=path)
    with pytest.raises(DataError, match="leaves no episode"):
        load(source, exclude=write_exclude(tmp_path / "out.json", source, "part1/lift/0"))
    for content, message in (("{", "not JSON"), ('{"episodes": ["a"]}', "KIND:PATH"), ("[]", "KIND:PATH")):
        (tmp_path / "out.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load(source, exclude=path)
    with pytest.raises(ConfigError, match="does not exist"):
        load(source, exclude=str(tmp_path / "none.json"))


# --- CALVIN ------------------------------------------------------------------------------------------------------


def test_calvin_windows(tmp_path):
    root = write_calvin(tmp_path / "training")
    episodes = load(f"calvin:{root}")
    assert episodes.lengths.tolist() == [6, 5] and episodes.views == ("front", "wrist")
    assert episodes.texts == ("lift the block", "open the drawer") and episodes.columns.robot == "calvin:tcp"
    assert set(episodes.frame_sizes) == {(200, 200), (84, 84)} and episodes.seconds == pytest.approx(11 / 30)
    first, second = episodes
    assert (first.text(0), second.text(4), first.fps) == ("open the drawer", "lift the block", 30.0)
    assert first.state.shape == first.action.shape == (6, 7) and first.columns.kept == (6,)
    np.testing.assert_allclose(first.state[:, 0], np.arange(3, 9) / 100, atol=1e-6)
    np.testing.assert_allclose(first.state[:, 6], 6 + np.arange(3, 9) / 100, atol=1e-6)
    np.testing.assert_allclose(first.action[:, 6], [-1, 1, -1, 1, -1, 1])
    assert numbers_of(second.frames("front", [0, 4, 2])) == [8, 12, 10]
    assert numbers_of(as_worker(episodes, 1).frames("wrist", [4])) == [13]
    assert load(f"calvin:{root}", ("front",))[0].views.keys() == {"front"}


@pytest.mark.parametrize("angle", [2.5, 2.8, 3.0])
def test_calvin_angles_never_jump(tmp_path, angle):
    """The state passes pi within a window, or the action alone does."""
    episodes = load(f"calvin:{write_calvin(tmp_path / 'training', ((0, 12, 'turn'),), angle)}")
    (episode,) = episodes
    for start in range(13):
        np.testing.assert_allclose(episode.chunk(start, 5)[0, 3], 0.05, atol=1e-5)
        np.testing.assert_allclose(episode.chunk(start, 5)[1:, 3], 0.1, atol=1e-5)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_annotation_is_refused_and_not_run(tmp_path):
    root = write_calvin(tmp_path / "training")
    path, mark = root / "lang_annotations" / "auto_lang_ann.npy", tmp_path / "run"
    np.save(path, {"language": Evil(mark)}, allow_pickle=True)
    with pytest.raises(DataError, match=r"auto_lang_ann.npy refers to (posix|nt).system"):
        load(f"calvin:{root}")
    assert not mark.exists()
    np.load(path, allow_pickle=True)
    assert mark.exists()  # the file would have done it


def test_other_annotations_are_refused_too(tmp_path):
    root = write_calvin(tmp_path / "training")
    path = root / "lang_annotations" / "auto_lang_ann.npy"
    content = path.read_bytes()
    cases = (
        (lambda: np.save(path, {"language": np.random.default_rng}, allow_pickle=True), "refers to numpy.random"),
        (lambda: np.save(path, {"language": {"ann": ["a"]}}, allow_pickle=True), "lacks language/ann or info/indx"),
        (lambda: np.save(path, np.zeros(3)), "expected one object"),
        (lambda: path.write_bytes(content[:-40]), "cannot be read"),
        (lambda: path.write_bytes(b""), "cannot be read"),
        (path.unlink, "does not exist"),
    )
    for change, message in cases:
        change()
        with pytest.raises(DataError, match=message):
            load(f"calvin:{root}")


def test_damaged_calvin_is_named(tmp_path):
    root = write_calvin(tmp_path / "training")
    step = root / "episode_0000005.npz"
    content = step.read_bytes()
    episodes = load(f"calvin:{root}")
    step.write_bytes(content[: len(content) // 2])
    assert len(episodes[1]) == 5
    with pytest.raises(DataError, match="episode_0000005.npz cannot be read"):
        episodes[0]
    np.savez(step, robot_obs=np.full(15, np.nan), actions=np.zeros(7))
    with pytest.raises(DataError, match="episode_0000005.npz: robot_obs is not 15 finite"):
        episodes[0]
    np.savez(step, robot_obs=np.array([Evil(tmp_path / "run")], object), actions=np.zeros(7))
    with pytest.raises(DataError, match="episode_0000005.npz cannot be read .*allow_pickle"):
        episodes[0]
    assert not (tmp_path / "run").exists()
    step.unlink()
    with pytest.raises(DataError, match=r"episode_0000005.npz does not exist.*window_000000 \(1 windows"):
        load(f"calvin:{root}")
    out = write_exclude(tmp_path / "out.json", f"calvin:{root}", "window_000000")
    assert [e.name for e in load(f"calvin:{root}", exclude=out)] == ["window_000001"]
    for windows, message in ((((3, 3, "a"),), "from step 3 to 3"), (((3, 5, " "),), "has no text")):
        with pytest.raises(DataError, match=message):
            load(f"calvin:{write_calvin(tmp_path / message[:3], windows)}")


# --- RLDS --------------------------------------------------------------------------------------------------------


def test_rlds_episodes(tmp_path):
    episodes = load(f"rlds:{write_rlds(tmp_path / 'toy')}", rlds=RLDSConfig(fps=5.0))
    assert episodes.lengths.tolist() == [4, 6, 5] and episodes.texts == ("do 0", "do 1", "do 2")
    assert episodes.views == ("front", "wrist") and episodes.columns.robot == "rlds:toy" and episodes.seconds == 3.0
    assert set(episodes.frame_sizes) == {(24, 32)} and (episodes.state_width, episodes.action_width) == (8, 7)
    episode = episodes[1]
    assert (episode.name, episode.text(5), episode.fps) == ("train_000001", "do 1", 5.0)
    np.testing.assert_array_equal(episode.state, np.repeat(np.arange(6.0)[:, None], 8, 1))
    np.testing.assert_array_equal(episode.action[:, 0], np.arange(6) + 10)
    np.testing.assert_array_equal(episode.chunk(2, 3), episode.action[2:5])  # as recorded, no differences
    assert numbers_of(episode.frames("front", [5, 0, 3])) == [5, 0, 3]
    assert numbers_of(as_worker(episodes, 2).frames("wrist", [4])) == [5]
    with pytest.raises(IndexError):
        episode.frames("front", [6])


def test_rlds_keys(tmp_path):
    root = write_rlds(tmp_path / "toy", action_keys=True, text_in="observation", size=(None, None))
    source = f"rlds:{root}"
    (first, *_) = load(source, ("front",), rlds=RLDSConfig(action="pose", state=""))
    assert first.state.shape == (4, 0) and first.action.shape == (4, 7) and first.text(0) == "do 0"
    assert (first.views["front"].height, first.views["front"].width) == (24, 32)
    cases = (
        ({"action": "pose", "front": "rgb"}, "data.rlds.front is 'rgb'.* image, .*wrist_image"),
        ({"action": "pose", "front": "depth"}, "of shape .*; set one of image, wrist_image$"),
        ({"action": "pose", "state": "joints"}, "data.rlds.state is 'joints'.*state, or ''"),
        ({}, "data.rlds.action is ''.*end, pose"),
        ({"action": "pose", "split": "test"}, "data.rlds.split is 'test'.*train"),
    )
    for keys, message in cases:
        with pytest.raises(ConfigError, match=message):
            load(source, ("front",), rlds=RLDSConfig(**keys))
    with pytest.raises(ConfigError, match="data.rlds.fps"):
        RLDSConfig(fps=0.0)
    texts = ["", "do 1", "do 2"]
    outside = load(f"rlds:{write_rlds(tmp_path / 'episode', text_in='episode')}", ())
    assert outside.texts == ("do 0", "do 1", "do 2") and outside[0].views == {}
    source = f"rlds:{write_rlds(tmp_path / 'empty', texts=texts)}"
    with pytest.raises(DataError, match="train_000000 has no instruction at step 0"):
        load(source)
    out = write_exclude(tmp_path / "out.json", source, "train_000000")
    assert [e.name for e in load(source, exclude=out)] == ["train_000001", "train_000002"]


def test_rlds_is_read_once(tmp_path, monkeypatch):
    root = write_rlds(tmp_path / "toy")
    load(f"rlds:{root}")

    def refuse(*args):
        raise AssertionError("a record was read")

    with monkeypatch.context() as patch:
        patch.setattr(rlds._EpisodeReader, "__call__", refuse)
        assert load(f"rlds:{root}").lengths.tolist() == [4, 6, 5]
        with pytest.raises(AssertionError, match="record was read"):
            load(f"rlds:{root}", ())
    shard = root / "toy-train.array_record-00001-of-00002"
    content = bytearray(shard.read_bytes())
    content[200:400] = bytes(200)
    shard.write_bytes(content)
    with pytest.raises(DataError, match="train_000002 cannot be read"):
        load(f"rlds:{root}")
    shard.unlink()
    with pytest.raises(DataError, match="00001-of-00002 does not exist"):
        load(f"rlds:{root}")


def test_an_rlds_episode_that_failed_once_is_whole_the_second_time(tmp_path, monkeypatch):
    root = write_rlds(tmp_path / "toy")
    read = rlds._EpisodeReader.__call__

    def fail_once(self, number):
        if number == 1:
            raise DataError("the network")
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(rlds._EpisodeReader, "__call__", fail_once)
        with pytest.raises(DataError, match="the network"):
            load(f"rlds:{root}")
    episodes = load(f"rlds:{root}")
    assert episodes.lengths.tolist() == [4, 6, 5] and episodes.texts == ("do 0", "do 1", "do 2")


def test_rlds_that_cannot_be_opened_safely_or_at_all(tmp_path):
    root = write_rlds(tmp_path / "toy")
    info = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
    (root / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}), encoding="utf-8")
    with pytest.raises(DataError, match="stored as riegeli.*file_format='tfrecord' or 'array_record'"):
        load(f"rlds:{root}")
    (root / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    text = (root / "features.json").read_text(encoding="utf-8")
    (root / "features.json").write_text(
        text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text"), encoding="utf-8"
    )
    with pytest.raises(DataError, match="features.json refers to evil.Text"):
        load(f"rlds:{root}")
    (root / "features.json").unlink()
    with pytest.raises(DataError, match="lacks features.json"):
        load(f"rlds:{root}")


@pytest.mark.parametrize("stated", [True, False])
def test_rlds_in_tfrecord(tmp_path, stated):
    """Open-X's own files; old ones do not state their format. The instruction is a plain string there."""
    root = write_rlds(
        tmp_path / "toy", kind="tfrecord", plain_text=True, text_in="observation", splits=("train", "val")
    )
    if not stated:
        path = root / "dataset_info.json"
        info = json.loads(path.read_text(encoding="utf-8"))
        assert info.pop("fileFormat") == "tfrecord"
        path.write_text(json.dumps(info), encoding="utf-8")
    for split in ("train", "val"):
        episodes = load(f"rlds:{root}", rlds=RLDSConfig(split=split))
        assert episodes.lengths.tolist() == [4, 6, 5] and episodes.texts == ("do 0", "do 1", "do 2")
        for number in (2, 0, 1):
            episode = as_worker(episodes, number)
            assert (
                episode.name == f"{split}_{number:06d}" and episode.fps == 10.0 and episode.columns.robot == "rlds:toy"
            )
            np.testing.assert_array_equal(episode.action[:, 6], np.arange(len(episode)) + 10 * number)
            np.testing.assert_array_equal(episode.chunk(1, 2), episode.action[1:3])
            assert numbers_of(episode.frames("front", [3, 0])) == [3, 0]
            assert numbers_of(episode.frames("wrist", [3])) == [4]


def test_damaged_tfrecord_is_named(tmp_path):
    root = write_rlds(tmp_path / "toy", kind="tfrecord", lengths=(3, 4), shards=1)
    source, (shard,) = f"rlds:{root}", root.glob("*tfrecord*")
    sound = shard.read_bytes()
    (first, length), second = tfrecord.offsets(shard)
    shard.write_bytes(sound[: first + 50] + bytes([sound[first + 50] ^ 255]) + sound[first + 51 :])
    with pytest.raises(DataError, match="train_000000 cannot be read: .*tfrecord.* is damaged: the record at byte 12"):
        load(source)
    out = write_exclude(tmp_path / "out.json", source, "train_000000")
    assert [e.name for e in load(source, exclude=out)] == ["train_000001"]
    at = first + length + 4  # the length of the second record
    for content, message in (
        (sound[:-7], "truncated in record 1"),
        (sound[: at + 5], "truncated in record 1"),
        (sound[:at] + b"\7" + sound[at + 1 :], "damaged at record 1"),
        (sound[:at], "has 1 episodes but dataset_info.json states 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"nonsense of some length", "is no TFRecord file"),
    ):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=f"{shard.name} .*{message}"):
            load(source)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} does not exist"):
        load(source)


ARM = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1, "terminate_episode": 3}
OPENX = {
    # name: (observation, action, where the text is, rate, (front, wrist), state, action as read at step 0)
    "fractal20220817_data": (
        {"image": (32, 40), "base_pose_tool_reached": 7, "gripper_closed": 1},
        ARM,
        ("observation", 3, (0, None), [100] * 7 + [200], [0, 0, 0, 100, 100, 100, 200]),
    ),
    "bridge": (
        {"image": (32, 40), "state": 7},
        {"open_gripper": 0, "rotation_delta": 3, "terminate_episode": 0, "world_vector": 3},
        ("observation", 5, (0, None), [100] * 7, [300, 300, 300, 100, 100, 100, 0]),
    ),
    "bridge_dataset": (
        {"image_0": (32, 40), "image_1": (32, 40), "state": 7},
        7,
        ("steps", 5, (0, None), [200] * 7, [0] * 7),
    ),
    "droid": (
        {
            "cartesian_position": 6,
            "exterior_image_1_left": (20, 32),
            "exterior_image_2_left": (20, 32),
            "gripper_position": 1,
            "joint_position": 7,
            "wrist_image_left": (20, 32),
        },
        7,
        ("steps", 15, (1, 5), [400] * 7 + [300], [0] * 7),
    ),
    "taco_play": (
        {"rgb_static": (32, 40), "rgb_gripper": (16, 16), "robot_obs": 15},
        {"actions": 7, "rel_actions_world": 7, "terminate_episode": 0},
        ("observation", 15, (0, 1), [200] * 15, [100] * 7),
    ),
    "viola": (
        {"agentview_rgb": (32, 32), "eye_in_hand_rgb": (32, 32), "gripper_states": 1, "joint_states": 7},
        ARM | {"gripper_closedness_action": 0},
        ("observation", 20, (0, 1), [300] * 7 + [200], [0, 0, 0, 100, 100, 100, 200]),
    ),
    "roboturk": ({"front_rgb": (32, 32)}, ARM, ("observation", 10, (0, None), [], [0, 0, 0, 100, 100, 100, 200])),
}


@pytest.mark.parametrize("name", OPENX)
def test_openx_by_name(tmp_path, name, capsys):
    """Nothing is set: the table knows the keys, what is a delta stays one."""
    observation, action, (text_in, fps, cameras, state, first) = OPENX[name]
    root = write_openx(tmp_path / name, name, observation, action, text_in)
    views = ("front",) if cameras[1] is None else ("front", "wrist")
    (episode,) = load(f"rlds:{root}", views)
    assert f"known as the Open-X data set {name}: " in capsys.readouterr().err
    assert (episode.fps, episode.columns.robot, episode.text(0)) == (fps, f"rlds:{name}", "push")
    np.testing.assert_array_equal(episode.state[2], np.array(state) + 2)
    np.testing.assert_array_equal(episode.action, np.array(first) + np.arange(3)[:, None])
    np.testing.assert_array_equal(episode.chunk(0, 3), episode.action)
    for view, number in zip(views, cameras, strict=False):
        assert numbers_of(episode.frames(view, [1])) == [number + 1]
    assert load(f"rlds:{root}").views == views
    if cameras[1] is None:
        with pytest.raises(ConfigError, match="data.rlds.wrist is 'wrist_image'.*or set .*use_wrist_frame=False"):
            load(f"rlds:{root}", ("front", "wrist"))


def test_what_is_set_goes_before_the_table(tmp_path, capsys):
    observation, action, (text_in, *_) = OPENX["taco_play"]
    root = write_openx(tmp_path / "taco", "taco_play", observation, action, text_in)
    keys = RLDSConfig(front="rgb_gripper", state="", action="actions", fps=30.0)
    (episode,) = load(f"rlds:{root}", ("front",), rlds=keys)
    assert episode.fps == 30.0 and episode.state.shape == (3, 0) and episode.action[0, 0] == 0
    assert numbers_of(episode.frames("front", [0])) == [1]


# --- LIBERO's HDF5 -----------------------------------------------------------------------------------------------


def libero_numbers(frames):
    """Numbers of frames whose upper left corner is black, so that they stand upright."""
    assert not frames[:, :4, :4].any() and frames[:, -4:, :4].all()
    return numbers_of(frames[:, 8:])


@pytest.mark.parametrize("convention", ["opengl", "opencv", None])
def test_libero_demonstrations(tmp_path, convention):
    write_libero_hdf5(tmp_path / "set" / "b_demo.hdf5", convention=convention)
    write_libero_hdf5(tmp_path / "set" / "a_demo.hdf5", tuple([3] * 11), ["open", "the", "drawer"], convention)
    root = tmp_path / "set"
    episodes = load(f"libero:{root}")
    names = [f"a_demo.hdf5/demo_{i}" for i in range(11)] + ["b_demo.hdf5/demo_0", "b_demo.hdf5/demo_1"]
    assert [e.name for e in episodes] == names and episodes.texts == ("open the drawer", "turn on the stove")
    assert (episodes.state_width, episodes.action_width, episodes.columns.robot) == (8, 7, "libero")
    episode = as_worker(episodes, 12)
    assert (len(episode), episode.fps, episode.text(0)) == (4, 20.0, "turn on the stove")
    np.testing.assert_allclose(episode.state, np.repeat(10.0 + np.arange(4)[:, None], 8, 1))
    np.testing.assert_allclose(episode.action[:, 6], 1 + np.arange(4) / 10, rtol=1e-6)
    np.testing.assert_array_equal(episode.chunk(1, 2), episode.action[1:3])  # deltas, as recorded
    assert libero_numbers(episode.frames("front", [3, 0, 3])) == [13, 10, 13]
    assert libero_numbers(episode.frames("wrist", [2])) == [13] and not len(episode.frames("front", []))
    with pytest.raises(IndexError, match="outside the episode's 4 frames"):
        episode.frames("front", [4])
    assert source_of(str(root)) == f"libero:{root}" and source_of(f"{root}/b_demo.hdf5").startswith("libero:")
    assert len(load(f"libero:{root}/b_demo.hdf5")) == 2
    with pytest.raises(DataError, match="layout of robomimic.*libero:PATH"):
        load(f"hdf5:{root}")


def test_damaged_libero_is_named_and_can_be_left_out(tmp_path):
    root = tmp_path / "set"
    file = write_libero_hdf5(root / "a_demo.hdf5", (6, 4, 5, 3))
    write_libero_hdf5(root / "b_demo.hdf5", (2,))
    with h5py.File(file, "a") as content:
        content["data/demo_1/actions"][2] = np.nan
        del content["data/demo_2/obs/ee_states"]
        del content["data/demo_3/obs/agentview_rgb"]
    (root / "c_demo.hdf5").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source, out = f"libero:{root}", tmp_path / "out.json"
    with pytest.raises(DataError, match=r"demo_1/actions is not finite at step 2; .*\(and 2 other episodes\)"):
        load(source)
    findings = Findings()
    validate(source, findings, progress=False)
    assert any("c_demo.hdf5 is a Git LFS pointer" in f.message for f in findings.found)
    bad = ["a_demo.hdf5/demo_1", "a_demo.hdf5/demo_2", "c_demo.hdf5"]
    write_exclude(out, source, *bad)
    with pytest.raises(DataError, match="a_demo.hdf5/demo_3 lacks obs/agentview_rgb; leave it out"):
        load(source, ("front",), exclude=str(out))
    write_exclude(out, source, *bad, "a_demo.hdf5/demo_3")
    kept = load(source, ("front", "wrist"), exclude=str(out))
    assert [e.name for e in kept] == ["a_demo.hdf5/demo_0", "b_demo.hdf5/demo_0"]
    sound = Findings()
    validate(source, sound, DataConfig(exclude=str(out)), progress=False)
    assert not sound.errors and sound.looked_at["rows"] == 8
    for text in ("", []):
        write_libero_hdf5(root / "c_demo.hdf5", (2,), text)
        with pytest.raises(DataError, match="c_demo.hdf5: language_instruction is empty"):
            load(source, (), exclude=write_exclude(out, source, *bad[:2]))
    with h5py.File(root / "c_demo.hdf5", "a") as content:
        del content["data"].attrs["problem_info"]
    with pytest.raises(DataError, match="c_demo.hdf5: attribute problem_info of data has no language_instruction"):
        load(source, (), exclude=str(out))
    with h5py.File(root / "c_demo.hdf5", "w") as content:
        content["obs"] = 1
    with pytest.raises(DataError, match="c_demo.hdf5 has no data/demo_0"):
        load(source, (), exclude=str(out))


def test_libero_without_a_wrist_camera(tmp_path):
    file = write_libero_hdf5(tmp_path / "a.hdf5", (2,))
    with h5py.File(file, "a") as content:
        del content["data/demo_0/obs/eye_in_hand_rgb"]
    assert load(f"libero:{tmp_path}").views == ("front",)
    with pytest.raises(ConfigError, match="no demonstration has obs/eye_in_hand_rgb; set .*use_wrist_frame=False"):
        load(f"libero:{tmp_path}", ("front", "wrist"))


# --- RynnVLA-001's HDF5 ------------------------------------------------------------------------------------------


def test_hdf5_folder(tmp_path, monkeypatch):
    root = tmp_path / "set"
    write_hdf5(root / "stack" / "episode_000010.hdf5", 15)
    write_hdf5(root / "stack" / "episode_000009.h5", 20, ["open the box"])
    episodes = load(f"hdf5:{root}")
    assert episodes.lengths.tolist() == [20, 15] and episodes.texts == ("open the box", "stack the cups")
    assert (
        episodes.columns.robot == "lerobot:so100"
        and episodes.columns.kept == (5,)
        and episodes.views == ("front", "wrist")
    )
    episode = episodes[1]
    assert episode.name == "stack/episode_000010.hdf5" and episode.fps == 30.0
    np.testing.assert_allclose(episode.chunk(3, 2)[:, 0], [0.5, 1.0])
    np.testing.assert_allclose(episode.chunk(3, 2)[:, 5], [0.8, 0.9], atol=1e-6)
    assert numbers_of(episode.frames("front", [14, 0, 14])) == [14, 0, 14]
    assert numbers_of(as_worker(episodes, 0).frames("wrist", [0])) == [1]
    with pytest.raises(IndexError):
        episode.frames("front", [15])
    with monkeypatch.context() as patch:
        forbid_hdf5(patch)
        assert load(f"hdf5:{root}").lengths.tolist() == [20, 15]
    assert len(load(f"hdf5:{root}/stack/episode_000010.hdf5")) == 1


def test_hdf5_json(tmp_path):
    """As the public code writes it: absolute paths and several instructions a task."""
    root = tmp_path / "set"
    for name in "abc":
        write_hdf5(root / f"{name}.hdf5", 15)
    tasks = {
        "stack": {"data_path": [str(root / "b.hdf5"), "set/a.hdf5"], "instructions": ["stack them", "build a tower"]},
        "open": {"data_path": [str(root / "c.hdf5")]},
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"task_data": tasks, "mean_state": [0] * 6}), encoding="utf-8")
    episodes = load(f"hdf5:{path}")
    assert [e.name for e in episodes] == ["b.hdf5", "a.hdf5", "c.hdf5"]
    assert [episodes[0].text(i) for i in (0, 1, 2)] == ["stack them", "build a tower", "stack them"]
    assert episodes[2].text(1) == "stack the cups" and len(episodes.texts) == 3
    for listed in ({"stack": ["set/a.hdf5", "set/b.hdf5"]}, ["set/a.hdf5", "set/b.hdf5"]):
        path.write_text(json.dumps({"task_data": listed, "rynnvla_unit": "radians"}), encoding="utf-8")
        episodes = load(f"hdf5:{path}")
        assert [e.name for e in episodes] == ["a.hdf5", "b.hdf5"] and episodes.columns.robot == "radians"
    for content, message in (
        ("{}", "no readable task_data"),
        ('{"task_data": {}}', "lists no file"),
        ("[", "readable"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load(f"hdf5:{path}")
    path.write_text(json.dumps({"task_data": ["set/none.hdf5"]}), encoding="utf-8")
    with pytest.raises(DataError, match="none.hdf5 does not exist"):
        load(f"hdf5:{path}")


def test_hdf5_rates(tmp_path):
    long = 5000 / 30 + np.arange(3000) / 30  # float32 resolves these to 2e-5 s only
    write_hdf5(tmp_path / "a.hdf5", 3000, times=long)
    assert load(f"hdf5:{tmp_path}", ())[0].fps == pytest.approx(30, abs=2e-3)
    times = np.arange(20) / 30
    gap, slow = times.copy(), np.arange(20) / 30 * (1 + np.arange(20) / 10)
    gap[12:] += 1 / 30
    for bad, message in ((gap, "uneven at step 12 .30 fps"), (slow, "uneven"), (-times, "not ascend")):
        write_hdf5(tmp_path / "a.hdf5", 20, times=bad)
        with pytest.raises(DataError, match=f"a.hdf5: timestamp .*{message}|a.hdf5: timestamp does {message}"):
            load(f"hdf5:{tmp_path}", ())


def test_damaged_hdf5_is_named(tmp_path):
    file, secret = tmp_path / "set" / "a.hdf5", write_hdf5(tmp_path / "secret.hdf5")
    source = f"hdf5:{tmp_path / 'set'}"

    def replaced(key, value):
        def change(content):
            del content[key]
            if value is not None:
                content[key] = value

        return change

    nan = np.zeros((20, 6), np.float32)
    nan[7, 2] = np.nan
    cases = (
        (replaced("action", None), "lacks action"),
        (replaced("action", nan), "action is not finite at step 7"),
        (replaced("action", np.zeros((20, 7))), r"action has shape \[20, 7\], expected \[N, 6\]"),
        (replaced("action", np.zeros((19, 6))), "20 states but 19 actions"),
        (replaced("action", np.array([b"text"] * 20)), "action is not numeric"),
        (replaced("timestamp", np.zeros(4)), "4 time stamps for 20"),
        (replaced("obs/front_image", np.zeros((20, 24, 32, 3))), "front_image is float64"),
        (replaced("obs/front_image", np.zeros((9, 24, 32, 3), np.uint8)), r"not uint8 \[20, H, W, 3\]"),
        (replaced("action", h5py.ExternalLink(str(secret), "action")), "action is a link, and links are not followed"),
        (replaced("obs", h5py.ExternalLink(str(secret), "obs")), "obs/state is a link, and links are not followed"),
        (
            replaced("obs/front_image", h5py.ExternalLink(str(secret), "obs/front_image")),
            "is a link, and links are not followed",
        ),
        (lambda c: c.attrs.__delitem__("language_instruction"), "a.hdf5 has no language_instruction"),
    )
    for change, message in cases:
        with h5py.File(write_hdf5(file), "a") as content:
            change(content)
        with pytest.raises(DataError, match=message):
            load(source)
    write_hdf5(file, wrist=False)
    assert load(source).views == ("front",)
    with pytest.raises(ConfigError, match="no file has obs/wrist_image.*use_wrist_frame"):
        load(source, ("front", "wrist"))
    write_hdf5(tmp_path / "set" / "b.hdf5")
    with pytest.raises(DataError, match="a.hdf5 lacks obs/wrist_image"):
        load(source, ("front", "wrist"))
    write_hdf5(file, rynnvla_unit="radians")
    with pytest.raises(DataError, match="b.hdf5 has the unit lerobot:so100 but a.hdf5 has radians"):
        load(source)
    write_hdf5(tmp_path / "set" / "c.hdf5")  # now the other unit is the usual one
    with pytest.raises(DataError, match="a.hdf5 has the unit radians but b.hdf5 has lerobot:so100"):
        load(source)


# --- Folders of clips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_clips(tmp_path, kind):
    root = write_clips(tmp_path / "set", {"a/1.mp4": "pour, slowly", "a/0.mp4": "wipe the table"}, kind)
    episodes = load(f"clips:{root}")
    assert episodes.lengths.tolist() == [12, 9] and episodes.texts == ("pour, slowly", "wipe the table")
    assert episodes.columns == Columns()
    assert episodes.views == ("front",) and set(episodes.frame_sizes) == {(32, 32)} and episodes.seconds == 0.7
    episode = as_worker(episodes, 1)
    assert (len(episode), episode.name, episode.text(8)) == (9, "a/1.mp4", "pour, slowly")
    assert numbers_of(episode.frames("front", [8, 0])) == [8, 0]
    assert episode.state.shape == episode.action.shape == (9, 0)
    with pytest.raises(ConfigError, match="use_wrist_frame"):
        load(f"clips:{root}", ("front", "wrist"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_caption_may_hold_a_line_separator(tmp_path, kind):
    root = write_clips(tmp_path / "set", {"a/0.mp4": "wipe\u2028slowly", "a/1.mp4": "pour\x85it"}, kind)
    captions = root / f"captions.{kind}"
    text = captions.read_text(encoding="utf-8").replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    captions.write_text(text if kind == "jsonl" else text.replace('"', ""), encoding="utf-8")
    assert load(f"clips:{root}").texts == ("pour\x85it", "wipe\u2028slowly")


def test_captions_and_clips_must_match(tmp_path):
    root = write_clips(tmp_path / "set", {"a/0.mp4": "wipe"}, counts=(5, 6, 7))
    source = f"clips:{root}"
    with pytest.raises(DataError, match=r"a/1.mp4 has no caption in captions.csv \(2 such clips\)"):
        load(source)
    out = write_exclude(tmp_path / "out.json", source, "a/1.mp4", "a/2.mp4")
    assert [e.name for e in load(source, exclude=out)] == ["a/0.mp4"]
    everything = {f"a/{i}.mp4": "wipe" for i in range(3)}
    write_captions(root, everything | {"a/2.mp4": " "})
    with pytest.raises(DataError, match=r"a/2.mp4 has no caption in captions.csv \(1 such"):
        load(source)
    write_captions(root, everything | {"b/9.mp4": "wipe"})
    with pytest.raises(DataError, match=r"b/9.mp4 is listed in captions.csv but does not exist \(1 such"):
        load(source)
    (root / "captions.csv").write_text("file,caption\na/0.mp4,x\na/0.mp4,y\n", encoding="utf-8")
    with pytest.raises(DataError, match="a/0.mp4 is listed twice"):
        load(source)
    (root / "captions.csv").write_text("clip,caption\na/0.mp4,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 1 lacks file or caption"):
        load(source)
    write_captions(root, everything, "jsonl")
    with pytest.raises(DataError, match="captions.csv and captions.jsonl"):
        load(source)
    (root / "captions.csv").unlink()
    assert len(load(source)) == 3
    content = (root / "a" / "1.mp4").read_bytes()
    (root / "a" / "1.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="a/1.mp4 cannot be opened"):
        load(source)
    (root / "captions.jsonl").unlink()
    with pytest.raises(DataError, match="contains no captions; it must contain one of captions.csv"):
        load(source)


def test_libero_without_a_wrist_camera_in_one_demonstration(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    write_libero_hdf5(root / "a_demo.hdf5")
    with h5py.File(root / "a_demo.hdf5", "a") as file:
        del file["data/demo_1/obs/eye_in_hand_rgb"]
    source, out = f"libero:{root}", tmp_path / "out.json"
    with pytest.raises(DataError, match="demo_1 lacks obs/eye_in_hand_rgb; leave it out with data.exclude"):
        open_source(source, DataConfig(), None, progress=False)
    assert cli.main(["data", "validate", source, "--fix", str(out)]) == 1
    found = open_source(source, DataConfig(exclude=str(out)), None, progress=False)
    assert [e.name for e in found] == ["a_demo.hdf5/demo_0"] and found.views == ("front", "wrist")


def test_a_file_that_a_list_names_can_be_left_out(tmp_path):
    """Removing it from the folder would not be enough."""
    for name in "ab":
        write_hdf5(tmp_path / f"{name}.hdf5")
    with h5py.File(tmp_path / "b.hdf5", "a") as file:
        file["action"][0, 0] = np.nan
    (tmp_path / "list.json").write_text(json.dumps({"task_data": ["a.hdf5", "b.hdf5"]}), encoding="utf-8")
    source, out = f"hdf5:{tmp_path}/list.json", tmp_path / "out.json"
    out.write_text(json.dumps({"episodes": {source: ["b.hdf5"]}}), encoding="utf-8")
    for remove in (False, True):
        if remove:
            (tmp_path / "b.hdf5").unlink()
        with pytest.raises(DataError, match="out with data.exclude"):
            open_source(source, DataConfig(), (), progress=False)
        assert len(open_source(source, DataConfig(exclude=str(out)), (), progress=False)) == 1


def test_no_file_that_the_user_never_wrote_is_named(tmp_path, capsys):
    """Nothing is left of these clips, which is no fault of the list that the command makes for itself."""
    write_clips(tmp_path / "set", {"a/0.mp4": "", "a/1.mp4": ""})
    assert cli.main(["data", "validate", f"clips:{tmp_path / 'set'}", "--fix", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().out
    assert "faulty.json" not in said and "these are all episodes" in said


@pytest.mark.parametrize("key, value", [("front", "top"), ("front", "state"), ("state", "image")])
def test_rlds_remedies_list_keys_that_fit(key, value, tmp_path):
    root = tmp_path / "set"
    write_rlds(root)
    with pytest.raises(ConfigError) as refused:
        open_source(f"rlds:{root}", DataConfig(rlds=RLDSConfig(**{key: value})), ("front",), progress=False)
    listed = str(refused.value).partition("set one of ")[2].partition(", or")[0].split(", ")
    assert listed == (["image", "wrist_image"] if key == "front" else ["state"])
    for one in listed:
        open_source(f"rlds:{root}", DataConfig(rlds=RLDSConfig(**{key: one})), ("front",), progress=False)


def test_a_stage_that_reads_states_refuses_data_without(tmp_path):
    root = tmp_path / "set"
    write_rlds(root)
    without = open_source(f"rlds:{root}", DataConfig(rlds=RLDSConfig(state="")), (), progress=False)
    with pytest.raises(ConfigError, match="set it to 0, or name the state's key"):
        check_sources([without], TrainConfig(stage="robot"))
    check_sources([without], TrainConfig(stage="robot", vla=VLAConfig(state_dim=0)))
    named = open_source(f"rlds:{root}", DataConfig(), (), progress=False)
    check_sources([named], TrainConfig(stage="robot", vla=VLAConfig(state_dim=8)))
