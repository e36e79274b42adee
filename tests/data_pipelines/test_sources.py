"""Foreign data sets become the same episodes; damage is found before training and named in one line."""

import importlib
import inspect
import json
import shutil
from dataclasses import replace

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from data_pipelines import demo, statistics
from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.sources import KINDS, Load, open_source
from rynnvla_jax.actions import decode_chunk, normalize_actions
from rynnvla_jax.cli.data_source import data_config
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, DataConfig
from tests import DATA, GOLDEN
from tests.recordings import grey_ramp, write_egodex, write_video

V21 = DATA / "so100_v21"
BOTH = ("front", "wrist")


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def load(source, views=BOTH, **kwargs):
    return open_source(source, DataConfig(**kwargs), views, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_follows_the_protocol(kind):
    module = importlib.import_module(f"data_pipelines.sources.{kind}")
    wanted = inspect.signature(Load.__call__)
    assert inspect.signature(module.load) == wanted.replace(parameters=list(wanted.parameters.values())[1:])


# --- LeRobot -----------------------------------------------------------------------------------------------------


def test_lerobot_v30_episodes():
    episodes = load(f"lerobot:{demo.path('so100')}")
    assert [len(e) for e in episodes] == [314, 310, 361, 263, 281, 324]
    assert {e.text(0) for e in episodes} == {
        "pick up the green block and place it on the plate",
        "pick up the strawberry and place it on the plate",
        "put the pen into the holder",
    }
    for episode in episodes:
        assert episode.state.shape == episode.action.shape == (len(episode), 6) and episode.state.dtype == np.float32
        assert episode.columns.kept == (5,) and episode.columns.robot == "lerobot:so100_follower" and episode.fps == 30
    frames = episodes[2].frames("wrist", [0, 360, 5])
    assert frames.shape == (3, 128, 128, 3) and frames.dtype == np.uint8


def test_lerobot_versions_agree():
    """The same recording cut to 90 frames is not in both sets, but their start pose and layout are alike."""
    new, old = load(f"lerobot:{demo.path('so100')}"), load(f"lerobot:{V21}")
    assert [len(e) for e in old] == [90, 90] and old[1].text(0) == "put the pen into the holder"
    np.testing.assert_allclose(old[0].state[0], new[0].state[0], atol=0.5)
    assert old[0].frames("front", [89]).shape == (1, 64, 64, 3)
    assert old[0].columns == new[0].columns


def test_frames_of_an_episode_are_found_in_the_shared_video():
    episodes = load(f"lerobot:{demo.path('so100')}", ("front",))
    whole = []
    with av.open(episodes[0].views["front"].path) as container:
        for frame in container.decode(video=0):
            whole.append(frame.to_ndarray(format="rgb24"))
    first = 0
    generator = np.random.default_rng(0)
    for episode in episodes:
        steps = [0, len(episode) - 1, *generator.integers(0, len(episode), 4)]
        np.testing.assert_array_equal(episode.frames("front", steps), [whole[first + i] for i in steps])
        first += len(episode)
    assert first == len(whole)


def test_steps_outside_an_episode_are_refused():
    episode = load(f"lerobot:{V21}")[0]
    for step in (-1, 90):
        with pytest.raises(IndexError, match="90 frames"):
            episode.frames("front", [step])


def test_the_robot_that_a_data_set_names_is_read(tmp_path):
    root = damaged(tmp_path, V21)
    change_info(root, rynnvla_unit="so100 before mid-2025")
    assert load(f"lerobot:{root}", ())[0].columns.robot == "so100 before mid-2025"


def damaged(tmp_path, source):
    root = tmp_path / "set"
    shutil.copytree(source, root)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def change_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_rows(root, column, change):
    path = root / "data" / "chunk-000" / "episode_000000.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    change(values)
    field = table.schema.field(column)
    table = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    pq.write_table(table, path)


def test_damaged_rows_are_named(tmp_path):
    def swap(values):
        values[3], values[4] = values[4], values[3]

    def nan(values):
        values[7] = [float("nan")] * 6

    def other_task(values):
        values[0] = 9

    def late(values):
        values[5] += 1.0

    cases = {
        "frame_index": (swap, "episode_000000.parquet: episode 0: frame_index"),
        "timestamp": (late, "time stamps"),
        "observation.state": (nan, "observation.state is not finite at frame 7"),
        "episode_index": (other_task, "89 rows but meta/episodes states 90"),
        "task_index": (other_task, "task_index 9"),
    }
    for i, (column, (change, message)) in enumerate(cases.items()):
        (tmp_path / str(i)).mkdir()
        root = damaged(tmp_path / str(i), V21)
        change_rows(root, column, change)
        with pytest.raises(DataError, match=message) as caught:
            load(f"lerobot:{root}", ())
        assert "\n" not in str(caught.value)


def test_damaged_metadata_is_named(tmp_path):
    def widths(info, state, action):
        info["features"]["observation.state"]["shape"] = [state]
        info["features"]["action"]["shape"] = [action]

    cases = (
        (lambda i: widths(i, 7, 7), "6 values per row but meta/info.json states 7"),
        (lambda i: i.update(total_frames=181), "total_frames is 181 but the episodes have 180"),
        (lambda i: i.update(codebase_version="v1.6"), "version v1.6"),
        (lambda i: i.pop("fps"), "lacks fps"),
        (lambda i: i.update(fps=15), "fps"),
    )
    original = json.loads((V21 / "meta" / "info.json").read_text(encoding="utf-8"))
    root = damaged(tmp_path, V21)
    for change, message in cases:
        info = json.loads(json.dumps(original))
        change(info)
        (root / "meta" / "info.json").write_text(json.dumps(info), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load(f"lerobot:{root}")
    (root / "meta" / "info.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="info.json is not JSON"):
        load(f"lerobot:{root}")
    (root / "meta" / "info.json").unlink()
    with pytest.raises(DataError, match="not a LeRobot data set"):
        load(f"lerobot:{root}")


def test_an_instruction_may_hold_a_line_separator(tmp_path):
    root = damaged(tmp_path, V21)
    path = root / "meta" / "tasks.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("put the pen", "put\u2028the pen"), encoding="utf-8")
    assert load(f"lerobot:{root}", ())[1].text(0) == "put\u2028the pen into the holder"


def test_an_empty_data_set_is_an_error(tmp_path):
    root = damaged(tmp_path, V21)
    (root / "meta" / "episodes.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="contains no episode"):
        load(f"lerobot:{root}")


def test_cameras_that_are_not_there_are_config_errors():
    with pytest.raises(ConfigError, match="top.*to one of observation.images.front$"):
        load(f"lerobot:{V21}", front="observation.images.top")
    assert load(f"lerobot:{V21}", ("front",), wrist="observation.images.none")[0].views.keys() == {"front"}


@pytest.mark.parametrize("source", [V21, demo.path("so100")], ids=["v2.1", "v3.0"])
def test_a_truncated_or_missing_video_is_found_at_the_start(tmp_path, source):
    root = damaged(tmp_path, source)
    video = sorted(root.rglob("*.mp4"))[-1]
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{video.name} cannot be opened"):
        load(f"lerobot:{root}")
    video.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{video.name} cannot be opened"):
        load(f"lerobot:{root}")
    video.unlink()
    with pytest.raises(DataError, match=rf"{video.name} does not exist"):
        load(f"lerobot:{root}")
    assert load(f"lerobot:{root}", ())  # actions alone need no video


def test_a_video_that_lost_its_tail_behind_a_good_header_is_found(tmp_path):
    root = damaged(tmp_path, V21)
    video = sorted(root.rglob("*.mp4"))[0]
    noise = np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), dtype=np.uint8)
    write_video(video, noise, movflags="+faststart")
    assert load(f"lerobot:{root}")
    content = video.read_bytes()
    video.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DataError, match=rf"{video.name}: frame 89"):
        load(f"lerobot:{root}")


def test_a_video_with_too_few_frames_is_found(tmp_path):
    root = damaged(tmp_path, V21)
    video = sorted(root.rglob("*.mp4"))[0]
    write_video(video, grey_ramp(50))
    with pytest.raises(DataError, match="has 50 frames but 90 are needed"):
        load(f"lerobot:{root}")


def test_time_stamps_that_drift_half_a_frame_change_nothing(tmp_path):
    root = damaged(tmp_path, demo.path("so100"))
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    column = "videos/observation.images.front/from_timestamp"
    for drift in (-0.5, 0.5):
        stamps = np.array(table[column].to_pylist())
        stamps[1:] += drift / 30
        number = table.column_names.index(column)
        pq.write_table(table.set_column(number, table.schema.field(column), pa.array(stamps)), path)
        moved, there = load(f"lerobot:{root}", ("front",)), load(f"lerobot:{demo.path('so100')}", ("front",))
        assert [e.views["front"].first for e in moved] == [e.views["front"].first for e in there]
    stamps[2] -= 1.0
    pq.write_table(table.set_column(number, table.schema.field(column), pa.array(stamps)), path)
    with pytest.raises(DataError, match="episode 2 starts at frame .* inside the episode before"):
        load(f"lerobot:{root}", ("front",))


def write_exclude(path, source, *names):
    path.write_text(json.dumps({"episodes": {source: names}}), encoding="utf-8")
    return str(path)


def test_lerobot_episodes_left_out_are_not_looked_at(tmp_path):
    """Neither their rows nor their word on where they lie in the shared video."""
    original = f"lerobot:{demo.path('so100')}"
    there = load(original, ("front",))
    root = damaged(tmp_path, demo.path("so100"))
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    column = "videos/observation.images.front/from_timestamp"
    for wrong in (1000.0, 0.0):
        stamps = np.array(table[column].to_pylist())
        stamps[2] = wrong
        number = table.column_names.index(column)
        pq.write_table(table.set_column(number, table.schema.field(column), pa.array(stamps)), path)
        out = write_exclude(tmp_path / "out.json", f"lerobot:{root}", "episode_000002")
        kept = load(f"lerobot:{root}", ("front",), exclude=out)
        assert [e.name for e in kept] == [f"episode_{i:06d}" for i in (0, 1, 3, 4, 5)]
        for mine, theirs in zip(kept, [there[i] for i in (0, 1, 3, 4, 5)], strict=True):
            np.testing.assert_array_equal(mine.action, theirs.action)
            assert mine.views["front"].first == theirs.views["front"].first
    root = damaged(tmp_path / "old", V21)

    def nan(values):
        values[7] = [float("nan")] * 6

    change_rows(root, "action", nan)
    next(root.rglob("episode_000000.mp4")).unlink()
    out = write_exclude(tmp_path / "out.json", f"lerobot:{root}", "episode_000000")
    assert [len(e) for e in load(f"lerobot:{root}", exclude=out)] == [90]


# --- EgoDex ------------------------------------------------------------------------------------------------------


def test_egodex_demo():
    episodes = load(f"egodex:{demo.path('egodex')}", ("front",))
    assert [e.name for e in episodes] == [f"test/pick_place_block/{i}" for i in range(4)]
    assert episodes[1].text(0).startswith("Take the green block off")  # which_llm_description '2'
    assert (
        episodes[0].text(0).startswith("Pick up")
        and episodes[0].columns.action[0].unit == "metres"
        and episodes[0].columns.kept == ()
    )
    assert episodes[0].frames("front", [0, 132]).shape == (2, 128, 128, 3)
    assert 0.2 < episodes[0].state[:, 5].mean() < 1.0  # the right hand is in front of the camera, half a metre off


def test_egodex_frames_of_reference(tmp_path):
    _, poses = write_egodex(tmp_path)
    (episode,) = load(f"egodex:{tmp_path}", ("front",))
    assert len(episode) == 11
    camera = poses["camera"]
    for t in (0, 5):
        inverse = np.linalg.inv(camera[t])
        for hand, columns in (("leftHand", slice(0, 3)), ("rightHand", slice(3, 6))):
            np.testing.assert_allclose(episode.state[t, columns], (inverse @ poses[hand][t])[:3, 3], atol=1e-5)
            chunk = episode.chunk(t, 4)[:, columns]
            for k in range(4):
                moved = poses[hand][t + k + 1][:3, 3] - poses[hand][t + k][:3, 3]
                np.testing.assert_allclose(chunk[k], camera[t][:3, :3].T @ moved, atol=1e-5)
    numbers = (episode.frames("front", range(11)).mean((1, 2, 3)) - 40) / 4
    np.testing.assert_allclose(numbers, np.arange(11), atol=0.5)


def test_decoded_egodex_chunks_are_positions_in_the_first_camera(tmp_path):
    _, poses = write_egodex(tmp_path)
    episodes = load(f"egodex:{tmp_path}", ())
    (episode,) = episodes
    found = statistics.compute([episodes], 4, progress=False)
    normalized = normalize_actions(episode.chunk(3, 4), found)
    out = decode_chunk(normalized, episode.state[3], found)
    for k in range(4):
        expected = (np.linalg.inv(poses["camera"][3]) @ poses["rightHand"][3 + k + 1])[:3, 3]
        np.testing.assert_allclose(out[k, 3:], expected, atol=1e-4)


def test_damaged_egodex_is_named(tmp_path):
    file, _ = write_egodex(tmp_path)
    source = f"egodex:{tmp_path}"
    with h5py.File(file, "a") as content:
        hand = np.array(content["transforms/leftHand"])
        del content["transforms/leftHand"]
    with pytest.raises(DataError, match="0.hdf5 lacks transforms/leftHand"):
        load(source, ())
    with h5py.File(file, "a") as content:
        hand[3, 0, 3] = np.nan
        content["transforms/leftHand"] = hand
    with pytest.raises(DataError, match="leftHand is not finite"):
        load(source, ())
    with h5py.File(file, "a") as content:
        content["transforms/leftHand"][...] = 0
        content.attrs["which_llm_description"] = "2"
        content.attrs["llm_description2"] = " "
    with pytest.raises(DataError, match="0.hdf5: which_llm_description is '2'"):
        load(source, ())
    with h5py.File(file, "a") as content:
        content.attrs["which_llm_description"] = "1"
    write_video(file.with_suffix(".mp4"), grey_ramp(9))
    with pytest.raises(DataError, match="0.mp4 has 9 frames but 0.hdf5 has 12 poses"):
        load(source, ("front",))
    file.with_suffix(".mp4").unlink()
    with pytest.raises(DataError, match="0.mp4 does not exist"):
        load(source, ("front",))
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="0.hdf5 cannot be read"):
        load(source, ())
    file.unlink()
    with pytest.raises(DataError, match="no .hdf5"):
        load(source, ())


def test_egodex_has_no_wrist_camera():
    with pytest.raises(ConfigError, match="use_wrist_frame=False"):
        load(f"egodex:{demo.path('egodex')}")


def test_unknown_sources_are_config_errors(tmp_path):
    for source in ("hdf6:x", "lerobot", "lerobot:"):
        with pytest.raises(ConfigError, match="not KIND:PATH.*egodex"):
            load(source)
    with pytest.raises(DataError, match="does not exist"):
        load(f"lerobot:{tmp_path}/none")


def test_a_group_of_keys_cannot_be_one_value_as_well():
    for pairs in (("image=3", "image.fit=square"), ("front=top", "front.key=top")):
        with pytest.raises(ConfigError, match=f"--config.data.{pairs[1]}: another option sets .* to a single value"):
            data_config([f"--config.data.{pair}" for pair in pairs])
    given = ["--config.data.image.fit=square", "--config.data.image.jitter=0.1"]
    assert data_config(given).image == replace(DataConfig().image, fit="square", jitter=0.1)
    with pytest.raises(ConfigError, match="--config.seed=1 is not of the form --config.data.KEY=VALUE"):
        data_config(["--config.seed=1"])


# --- Statistics --------------------------------------------------------------------------------------------------


def golden_episodes():
    tensors = load_file(GOLDEN / "relative_actions.safetensors")
    episodes = [
        Episode(
            name=f"ep{i}",
            texts=("go",),
            text_of=np.zeros(len(tensors[f"ep{i}.action"]), np.int32),
            fps=30.0,
            state=tensors[f"ep{i}.state"],
            action=tensors[f"ep{i}.action"],
            columns=Columns.unstated("degrees", 6, 6, (5,)),
        )
        for i in (0, 1)
    ]
    return tensors, episodes


def test_statistics_match_the_public_code():
    tensors, episodes = golden_episodes()
    found = statistics.compute([Episodes.of(episodes, "golden")], 10, progress=False)
    for key in ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state"):
        np.testing.assert_allclose(getattr(found, key), tensors[f"{key}_f64"], rtol=1e-5, atol=1e-5)
    assert found.columns == episodes[0].columns


def test_statistics_of_large_sets_sample_percentiles_only(monkeypatch):
    _, episodes = golden_episodes()
    whole = statistics.compute([Episodes.of(episodes, "golden")], 10, progress=False)
    monkeypatch.setattr(statistics, "_PERCENTILE_ROWS", 300)
    sampled = statistics.compute([Episodes.of(episodes, "golden")], 10, progress=False)
    np.testing.assert_array_equal(sampled.rel_std_action, whole.rel_std_action)
    spread = whole.rel_max_action - whole.rel_min_action
    assert (np.abs(sampled.rel_max_action - whole.rel_max_action) < 0.3 * spread).all()


def test_a_chunk_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="chunk of 0 steps contains no action.*set data.chunk .*--chunk"):
        statistics.compute([Episodes.of(golden_episodes()[1], "golden")], 0, progress=False)


def test_episodes_of_two_kinds_are_refused():
    _, episodes = golden_episodes()
    with pytest.raises(DataError, match="ep1 and ep0 differ: robot 'degrees' and 'radians'"):
        Episodes.of([episodes[0], replace(episodes[1], columns=Columns.unstated("radians", 6, 6, (5,)))], "golden")
    with pytest.raises(DataError, match="no episode"):
        Episodes.of([], "golden")
