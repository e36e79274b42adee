"""LeRobot data sets with wrong metadata, rows and bytes: refused in one line, by the reader and by `validate`."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import parquet_pictures
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.run import validate
from data_pipelines.sources import open_source
from rynnvla_jax.config import DataConfig
from tests import DATA
from tests.hostile import VALUES, attempt, changed, damaged, examples, json_files
from tests.recordings import grey_ramp, write_lerobot, write_video

INFO = {
    "codebase_version": "v3.0",
    "robot_type": "so100",
    "total_episodes": 2,
    "total_frames": 10,
    "total_tasks": 2,
    "chunks_size": 1000,
    "fps": 30,
    "splits": {"train": "0:2"},
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "features": {
        "observation.state": {"dtype": "float32", "shape": [6], "names": ["a", "b", "c", "d", "e", "gripper.pos"]},
        "action": {"dtype": "float32", "shape": [6], "names": {"motors": ["a", "b", "c", "d", "e", "gripper"]}},
        "observation.images.front": {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "c"]},
    },
}
INFO_V21 = INFO | {
    "codebase_version": "v2.1",
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
FRONT = "observation.images.front"
EPISODES = [
    {
        "episode_index": i,
        "length": 5,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": 5 * i,
        "dataset_to_index": 5 * i + 5,
        f"videos/{FRONT}/chunk_index": 0,
        f"videos/{FRONT}/file_index": 0,
        f"videos/{FRONT}/from_timestamp": i / 6,
        f"videos/{FRONT}/to_timestamp": (i + 1) / 6,
    }
    for i in range(2)
]
TASKS = [{"task_index": 0, "task": "push"}, {"task_index": 1, "task": "pull"}]
ROWS = [
    {
        "observation.state": [float(i + k) for k in range(6)],
        "action": [float(i + k + 1) for k in range(6)],
        "timestamp": (i % 5) / 30,
        "frame_index": i % 5,
        "episode_index": i // 5,
        "index": i,
        "task_index": i // 5,
    }
    for i in range(10)
]
TABLES = {
    "meta/episodes/chunk-000/file-000.parquet": EPISODES,
    "meta/tasks.parquet": TASKS,
    "data/chunk-000/file-000.parquet": ROWS,
}


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def v30(tmp_path):
    root = tmp_path / "v30"
    for name, rows in TABLES.items():
        write_table(root / name, rows)
    (root / "meta" / "info.json").write_text(json.dumps(INFO), encoding="utf-8")
    video = root / "videos" / FRONT / "chunk-000" / "file-000.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, grey_ramp(10))
    return root


@pytest.fixture
def v21(tmp_path):
    root = tmp_path / "v21"
    for i in range(2):
        write_table(root / f"data/chunk-000/episode_{i:06d}.parquet", ROWS[5 * i : 5 * i + 5])
        video = root / f"videos/chunk-000/{FRONT}/episode_{i:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        write_video(video, grey_ramp(5, first=5 * i))
    (root / "meta").mkdir()
    (root / "meta" / "info.json").write_text(json.dumps(INFO_V21), encoding="utf-8")
    for name, lines in (("episodes", [{"episode_index": i, "length": 5} for i in range(2)]), ("tasks", TASKS)):
        text = "\n".join(map(json.dumps, lines))
        (root / "meta" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return root


def read(root, views=("front",)):
    """Everything that training reads; and what `validate` finds."""
    episodes = open_source(f"lerobot:{root}", DataConfig(), views, progress=False)
    for episode in episodes:
        assert np.isfinite(episode.chunk(0, 3)).all() and episode.text(0).strip()
        for view in episode.views:
            episode.frames(view, [0, len(episode) - 1])
    return episodes


def check(root):
    findings = Findings()
    validate(f"lerobot:{root}", findings, progress=False)
    assert not [f for f in findings.found if "\n" in f.message]
    return findings


def refused(root):
    """The reader and `validate` agree on whether the set can be used; both only raise our errors."""
    found, findings = attempt(read, root), attempt(check, root)
    assert found is None or findings is not None
    return found is None


def test_the_sound_sets_are_read(v30, v21):
    for root in (v30, v21):
        assert not refused(root) and not check(root).errors


@pytest.mark.parametrize("version", ["v30", "v21"])
def test_info(version, request):
    root = request.getfixturevalue(version)
    file = root / "meta" / "info.json"

    @examples(25)
    @given(json_files({"v30": INFO, "v21": INFO_V21}[version]))
    def try_it(content):
        file.write_bytes(content)
        refused(root)

    try_it()


@pytest.mark.parametrize("key", [k for k in INFO if k not in ("splits", "robot_type")])
def test_each_key_of_info_with_each_value(key, v30):
    file = v30 / "meta" / "info.json"
    for value in (*VALUES, "absent"):
        info = INFO | {key: value}
        if value == "absent":
            del info[key]
        file.write_text(json.dumps(info), encoding="utf-8")
        attempt(open_source, f"lerobot:{v30}", DataConfig(), ())


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, v30):
    """Values, types and columns of a table."""

    @examples(20)
    @given(changed(TABLES[name]))
    def try_it(rows):
        try:
            write_table(v30 / name, rows)
        except Exception:  # no table can hold this
            return
        refused(v30)

    try_it()


@pytest.mark.parametrize("name", TABLES)
def test_bytes_of_a_table(name, v30):
    sound = (v30 / name).read_bytes()

    @examples(20)
    @given(damaged(sound))
    def try_it(content):
        (v30 / name).write_bytes(content)
        refused(v30)

    try_it()


def test_bytes_of_pictures(tmp_path):
    root = write_lerobot(tmp_path / "set", (5,), videos=(), pictures=(FRONT,))
    (file,) = root.rglob("*.parquet")
    sound = file.read_bytes()

    @examples(20)
    @given(damaged(sound))
    def try_it(content):
        parquet_pictures.close_files()  # of the example before
        file.write_bytes(content)
        refused(root)

    try_it()


@pytest.mark.parametrize("name", ["episodes", "tasks"])
def test_lines(name, v21):
    file = v21 / "meta" / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    as_lines = changed(lines).map(lambda v: "\n".join(map(json.dumps, v if isinstance(v, list) else [v])).encode())

    @examples(20)
    @given(st.one_of(as_lines, damaged(file.read_bytes())))
    def try_it(content):
        file.write_bytes(content)
        refused(v21)

    try_it()


def test_bytes_of_a_video(v30):
    (file,) = v30.rglob("*.mp4")

    @examples(20)
    @given(damaged(file.read_bytes()))
    def try_it(content):
        file.write_bytes(content)
        refused(v30)

    try_it()


# --- those that were found -----------------------------------------------------------------------------------------


def change_rows(root, change, name="data/chunk-000/file-000.parquet"):
    rows = json.loads(json.dumps(TABLES[name]))
    change(rows)
    write_table(root / name, rows)


def test_a_row_of_five_numbers_and_one_of_seven(v30):
    """Together they are as many as they should be, and every value behind them would be shifted."""

    def shift(rows):
        rows[2]["action"].pop()
        rows[3]["action"].append(0.0)

    change_rows(v30, shift)
    with pytest.raises(DataError, match=r"file-000.parquet: action has 5 values at row 2 but .* states 6 \(2 such"):
        read(v30)
    (finding,) = [f for f in check(v30).found if f.check == "column"]
    assert finding.severity == "error" and finding.index == 2 and finding.file.endswith("file-000.parquet")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_time_stamp_that_is_empty(v30, value):
    change_rows(v30, lambda rows: rows[4].update(timestamp=value))
    with pytest.raises(DataError, match="timestamp has no value at row 4|time stamps are not frame_index"):
        read(v30)
    assert [f.index for f in check(v30).found if f.severity == "error"][:1] == [4]


@pytest.mark.parametrize("version", ["v30", "v21"])
def test_a_task_index_twice(version, request):
    root = request.getfixturevalue(version)
    if version == "v30":
        change_rows(root, lambda rows: rows[1].update(task_index=0), "meta/tasks.parquet")
    else:
        text = "\n".join(json.dumps(t | {"task_index": 0}) for t in TASKS)
        (root / "meta" / "tasks.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="tasks.*task_index 0 occurs twice; keep one text"):
        read(root, ())
    assert any(f.check == "task" and "occurs twice" in f.message for f in check(root).found)


FAULTS = {
    "fps": (None, "", float("nan"), 0, "30", 1e9),
    "data_path": (
        "{x}",
        "{chunk_index.real}",
        "{chunk_index:999999999}",
        "{",
        "/data/{chunk_index}",
        "../{file_index}",
    ),
    "video_path": (None, "{x}", "{video_key!r}", "{video_key:99999999}"),
    "chunks_size": (0, -1, 1.5, None),
    "features": ([], {}, {"action": None}, {"action": {"dtype": "float32", "shape": [-2]}}),
    "codebase_version": (3, "v9", None),
    "total_frames": ("10", -1, 1.5),
}


@pytest.mark.parametrize("key", FAULTS)
def test_faults_of_info_are_named(key, v30):
    for value in FAULTS[key]:
        (v30 / "meta" / "info.json").write_text(json.dumps(INFO | {key: value}), encoding="utf-8")
        for look in (read, check):
            with pytest.raises(
                DataError, match=rf"info.json.*{'feature|action' if key == 'features' else key.split('_')[-1]}"
            ):
                look(v30)


def test_a_length_or_a_time_that_is_no_number(v30, v21):
    name = "meta/episodes/chunk-000/file-000.parquet"
    for key, value in (("length", None), (f"videos/{FRONT}/from_timestamp", float("nan"))):
        change_rows(v30, lambda rows, key=key, value=value: rows[1].update({key: value}), name)
        with pytest.raises(DataError, match=rf"file-000.parquet row 1: {key} is"):
            read(v30)
        assert any(f.check == "metadata" and f.index == 1 for f in check(v30).found)
    (v21 / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "length": null}', encoding="utf-8")
    with pytest.raises(DataError, match="episodes.jsonl line 1: length is null, not a whole number"):
        read(v21)


def test_metadata_that_are_nested_too_deeply(v21):
    for name in ("info.json", "tasks.jsonl"):
        root = v21.with_name(f"{name}-deep")
        shutil.copytree(v21, root)
        (root / "meta" / name).write_bytes(b"[" * 100_000)
        with pytest.raises(DataError, match=rf"{name}.* is not JSON \(maximum recursion"):
            read(root)


def test_published_sets_have_what_is_described():
    assert read(DATA / "so100_v21", ("front", "wrist"))
