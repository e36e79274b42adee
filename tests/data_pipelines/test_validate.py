"""Every kind of damage, inflicted on a copy of sound data, is found with file and index; the data stays as it is."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import demo
from data_pipelines.corpus import records
from data_pipelines.sources import open_source
from data_pipelines.sources.recognize import source_of
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import ConfigError, DataConfig
from tests import DATA
from tests.recordings import write_lerobot, write_rlds

V21 = DATA / "so100_v21"
V30 = demo.path("so100")
EGODEX = demo.path("egodex")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
ROWS = {"v21": "data/chunk-000/episode_000000.parquet", "v30": "data/chunk-000/file-000.parquet"}
VIDEO = {
    "v21": f"videos/chunk-000/{FRONT}/episode_000000.mp4",
    "v30": f"videos/{FRONT}/chunk-000/file-000.mp4",
}
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FIRST = "test/pick_place_block/0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copy(source: Path, tmp_path: Path) -> Path:
    root = tmp_path / "set"
    shutil.copytree(source, root)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def run(capsys, source, *arguments) -> tuple[int, list[dict], dict]:
    """(exit status, findings, summary)."""
    capsys.readouterr()
    status = cli.main(["data", "validate", str(source), "--json", *map(str, arguments)])
    *findings, last = map(json.loads, capsys.readouterr().out.splitlines())
    return status, findings, last["summary"]


def change_table(path: Path, column: str, change) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    change(values)
    field = table.schema.field(column)
    pq.write_table(table.set_column(table.column_names.index(column), field, pa.array(values, field.type)), path)


def set_row(row: int, value):
    """A change that makes row `row` `value`, or what `value` makes of it."""

    def change(values):
        values[row] = value(values[row]) if callable(value) else value

    return change


def set_number(row: int, column: int, value: float):
    def change(values):
        values[row] = [*values[row][:column], value, *values[row][column + 1 :]]

    return change


def change_info(root: Path, **changes) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_video(path: Path, frames, stamps=None, rate: int = 30, **options) -> None:
    with av.open(str(path), "w", options=options) as writer:
        stream = writer.add_stream("libx264", rate=rate, options={"g": "10", "crf": "20", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = i if stamps is None else stamps[i]
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))


def fingerprint(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- sound data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [V21, V30], ids=["v2.1", "v3.0"])
def test_sound_lerobot_data_has_no_finding(root, capsys):
    status, findings, summary = run(capsys, root)
    assert (status, findings) == (0, []) and summary["complete"]
    steps = {V21: 180, V30: 1853}[root]
    assert summary["looked_at"]["rows"] == steps and summary["looked_at"]["frames"] == 2 * steps


def test_sound_egodex_data_has_warnings_at_most(capsys):
    status, findings, summary = run(capsys, EGODEX)
    assert status == 0 and summary["looked_at"] == {"episodes": 4, "rows": 536, "videos": 4, "frames": 536}
    assert {f["check"] for f in findings} == {"constant"}  # the simulated left hand never moves
    assert all("left wrist x" in f["message"] and "right" not in f["message"] for f in findings)


# --- LeRobot -----------------------------------------------------------------------------------------------------


def test_rows_named_by_file_and_index(tmp_path, capsys):
    """Every fault of the rows at once: none hides another."""
    root = copy(V30, tmp_path)
    data = root / ROWS["v30"]  # episodes have 314, 310, 361, ... rows
    change_table(data, "index", set_row(7, 8))
    change_table(data, "frame_index", set_row(314 + 5, 6))
    change_table(data, "timestamp", set_row(20, lambda t: t + 0.6 / 30))
    change_table(data, "timestamp", set_row(30, lambda t: t + 0.4 / 30))  # half a frame is tolerated
    change_table(data, "observation.state", set_number(700, 2, float("nan")))
    change_table(data, "action", set_number(1000, 3, float("inf")))
    change_table(data, "action", set_number(1300, 1, -4000.0))
    change_table(data, "task_index", set_row(1500, 99))
    status, findings, _ = run(capsys, root)
    assert status == 1
    found = {(f["severity"], f["check"], f["index"], *f["episodes"]) for f in findings}
    assert found >= {
        ("warning", "index", 7, "episode_000000"),
        ("error", "frame_index", 319, "episode_000001"),
        ("error", "timestamp", 20, "episode_000000"),
        ("error", "finite", 700, "episode_000002"),
        ("error", "finite", 1000, "episode_000003"),
        ("warning", "range", 1300, "episode_000004"),
        ("error", "task", 1500, "episode_000004"),
    }
    assert {f["file"] for f in findings} == {str(data)}
    assert not any(f["index"] == 30 for f in findings)


@pytest.mark.parametrize("kind", ["v21", "v30"])
def test_a_row_of_another_episode(kind, tmp_path, capsys):
    root = copy({"v21": V21, "v30": V30}[kind], tmp_path)
    change_table(root / ROWS[kind], "episode_index", set_row(3, 77))
    status, findings, _ = run(capsys, root)
    assert status == 1
    found = {(f["check"], f["index"]) for f in findings if f["file"] == str(root / ROWS[kind])}
    assert ("episode_index", 3) in found  # whose the row is, and the first row that is not with the others
    assert any(f["check"] == "row count" and f["episodes"] == ["episode_000000"] for f in findings)


def test_a_joint_that_never_moves(tmp_path, capsys):
    root = copy(V21, tmp_path)

    def freeze(values):
        values[:] = [[*row[:4], 12.5, row[5]] for row in values]

    change_table(root / ROWS["v21"], "observation.state", freeze)
    status, findings, _ = run(capsys, root)
    assert status == 0
    (finding,) = [f for f in findings if f["check"] == "constant"]
    assert finding["severity"] == "warning" and finding["file"] == str(root / ROWS["v21"])
    assert "state of wrist roll" in finding["message"] and finding["episodes"] == ["episode_000000"]


def test_an_episode_in_radians_among_degrees(tmp_path, capsys):
    root = copy(V30, tmp_path)

    def radians(values):
        values[:314] = [[x / 57.3 for x in row] for row in values[:314]]

    for column in ("observation.state", "action"):
        change_table(root / ROWS["v30"], column, radians)
    status, findings, _ = run(capsys, root)
    assert status == 0
    units = [f for f in findings if f["check"] == "units"]
    assert {tuple(f["episodes"]) for f in units} == {("episode_000000",)} and len(units) == 2


def test_actions_outside_the_declared_range(tmp_path, capsys):
    root = copy(V30, tmp_path)
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text(encoding="utf-8"))
    stats["action"]["max"][1] -= 5.0
    path.write_text(json.dumps(stats), encoding="utf-8")
    actions = np.stack(pq.read_table(root / ROWS["v30"])["action"].to_pylist())
    status, findings, _ = run(capsys, root)
    assert status == 0 and {f["check"] for f in findings} == {"range"}
    assert any(f["index"] == int(actions[:, 1].argmax()) for f in findings)


@pytest.mark.parametrize("kind", ["v21", "v30"])
def test_totals(kind, tmp_path, capsys):
    root = copy({"v21": V21, "v30": V30}[kind], tmp_path)
    change_info(root, total_episodes=3, total_frames=99, total_tasks=17)
    status, findings, _ = run(capsys, root)
    assert status == 1 and {f["check"] for f in findings} == {"totals"}
    assert {f["message"].split()[0] for f in findings} == {"total_episodes", "total_frames", "total_tasks"}
    assert {f["file"] for f in findings} == {str(root / "meta" / "info.json")}


def test_features_that_training_refuses(tmp_path, capsys):
    root = copy(V21, tmp_path)
    features = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))["features"]
    features["action"] = features["action"] | {"shape": [5]}
    features[WRIST]["dtype"] = "image"
    change_info(root, features=features)
    arguments = "--config.data.front=top", "--config.data.wrist=none"
    status, findings, _ = run(capsys, root, *arguments)
    assert status == 1
    said = [(f["severity"], f["message"]) for f in findings if f["file"] == str(root / "meta" / "info.json")]
    assert any(m.startswith(f"{root}/meta/info.json: feature action has 5 columns but 6 names") for _, m in said)
    assert (
        "warning",
        f"{WRIST} is declared but has no pictures; data.front, data.wrist and data.extra_views do not use it",
    ) in said
    assert ("error", f"data.front is 'top', which is not a camera of this data set; it has {FRONT}, {WRIST}") in said
    assert ("warning", f"data.wrist is 'none', which is not a camera of this data set; it has {FRONT}, {WRIST}") in said


@pytest.mark.parametrize("kind", ["v21", "v30"])
def test_files_that_only_one_side_knows(kind, tmp_path, capsys):
    root = copy({"v21": V21, "v30": V30}[kind], tmp_path)
    (root / VIDEO[kind]).rename(root / "videos" / "lost.mp4")
    extra = root / "data" / "chunk-000" / "extra.parquet"
    shutil.copy(root / ROWS[kind], extra)
    status, findings, _ = run(capsys, root)
    assert status == 1 and {f["check"] for f in findings} == {"file reference"}
    by_file = {f["file"]: f for f in findings}
    assert by_file.keys() == {str(root / VIDEO[kind]), str(root / "videos" / "lost.mp4"), str(extra)}
    assert by_file[str(root / VIDEO[kind])]["severity"] == "error"
    assert len(by_file[str(root / VIDEO[kind])]["episodes"]) == {"v21": 1, "v30": 6}[kind]
    assert by_file[str(extra)]["severity"] == "warning"
    (root / ROWS[kind]).unlink()
    status, findings, _ = run(capsys, root)
    assert status == 1 and any(f["file"] == str(root / ROWS[kind]) for f in findings)


def test_metadata_of_episodes(tmp_path, capsys):
    root = copy(V30, tmp_path)
    path = root / EPISODES
    change_table(path, "length", set_row(1, 312))
    change_table(path, "episode_index", set_row(5, 9))
    change_table(path, "dataset_to_index", set_row(3, 980))
    status, findings, _ = run(capsys, root)
    assert status == 1
    there = {(f["check"], f["index"]) for f in findings if f["file"] == str(path)}
    assert {("metadata", 1), ("episode_index", 5), ("metadata", 3)} <= there
    data = {(f["check"], f["index"]) for f in findings if f["file"] == str(root / ROWS["v30"])}
    assert {("row count", 314), ("episode_index", 1529)} <= data


def test_segments_that_overlap_in_a_video(tmp_path, capsys):
    root = copy(V30, tmp_path)
    change_table(root / EPISODES, f"videos/{WRIST}/from_timestamp", set_row(2, lambda t: t - 1.0))
    status, findings, _ = run(capsys, root)
    assert status == 1
    (error,) = [f for f in findings if f["severity"] == "error"]
    assert error["check"] == "video segment" and error["index"] == 2 and error["file"] == str(root / EPISODES)
    assert error["episodes"] == ["episode_000002"] and "inside episode_000001" in error["message"]


def test_instructions(tmp_path, capsys):
    root = copy(V21, tmp_path)
    path = root / "meta" / "tasks.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], json.dumps({"task_index": 1, "task": " "})]), encoding="utf-8")
    status, findings, _ = run(capsys, root)
    assert status == 1 and {f["check"] for f in findings} == {"instruction"}
    assert {(f["file"], f["index"]) for f in findings} == {
        (str(path), 1),
        (str(root / "data/chunk-000/episode_000001.parquet"), 0),
    }


def test_the_same_episode_twice(tmp_path, capsys):
    root = copy(V21, tmp_path)
    for column in ("observation.state", "action"):
        values = pq.read_table(root / ROWS["v21"])[column].to_pylist()
        change_table(root / "data/chunk-000/episode_000001.parquet", column, lambda v, new=values: v.__init__(new))
    second = root / VIDEO["v21"].replace("000000.mp4", "000001.mp4")
    shutil.copy(root / VIDEO["v21"], second)
    status, findings, _ = run(capsys, root)
    assert status == 1
    found = {(f["file"], f["index"], *f["episodes"]) for f in findings if f["check"] == "duplicate"}
    assert found == {
        (str(root / "data/chunk-000/episode_000001.parquet"), 0, "episode_000001"),
        (str(second), 0, "episode_000001"),
    }


def test_the_same_pictures_within_one_file(tmp_path, capsys):
    """Content counts, not bytes of a file: v3.0 has many episodes in one."""
    root = copy(V30, tmp_path)
    frames = decoded(root / VIDEO["v30"])
    frames[985:1248] = [frames[0]] * 263  # episode 3 stands still, and so does
    frames[1248:1529] = [frames[0]] * 281  # episode 4, but for longer: not the same
    frames[624:985], frames[0:314] = [frames[5]] * 361, frames[0:314]
    frames[314:624] = frames[0:310]  # a part of episode 0 only
    write_video(root / VIDEO["v30"], [f[::4, ::4] for f in frames])
    status, findings, _ = run(capsys, root)
    still = {("picture", "warning", f"episode_00000{i}") for i in (2, 3, 4)}  # while the arm moves
    assert status == 0 and {(f["check"], f["severity"], *f["episodes"]) for f in findings} == still
    rows = pq.read_table(root / ROWS["v30"])
    shutil.copy(root / VIDEO["v30"], root / f"videos/{WRIST}/chunk-000/file-000.mp4")
    status, findings, _ = run(capsys, root)
    assert status == 1 and len(rows) == 1853
    errors = {(f["check"], f["index"]) for f in findings if f["severity"] == "error"}
    assert errors == {("duplicate", i) for i in (0, 314, 624, 985, 1248, 1529)}
    same = {tuple(f["episodes"]) for f in findings if "show the same pictures" in f["message"]}
    assert same == {(f"episode_00000{i}",) for i in range(6)}


# --- videos ------------------------------------------------------------------------------------------------------


def test_a_frame_dropped_from_a_video(tmp_path, capsys):
    root = copy(V21, tmp_path)
    frames = decoded(root / VIDEO["v21"])
    write_video(root / VIDEO["v21"], frames[:40] + frames[41:])
    status, findings, _ = run(capsys, root)
    assert status == 1
    (finding,) = findings
    assert (finding["check"], finding["file"], finding["index"]) == ("frame count", str(root / VIDEO["v21"]), 89)
    write_video(root / VIDEO["v21"], frames[:40] + frames[41:], stamps=[i for i in range(90) if i != 40])
    status, findings, _ = run(capsys, root)
    assert status == 1 and ("frame count", 40) in {(f["check"], f["index"]) for f in findings}


def test_frames_that_belong_to_no_row(tmp_path, capsys):
    root = copy(V21, tmp_path)
    frames = decoded(root / VIDEO["v21"])
    write_video(root / VIDEO["v21"], [*frames, frames[-1]])
    status, findings, _ = run(capsys, root)
    assert status == 1 and [(f["check"], f["index"]) for f in findings] == [("frame count", 90)]


def test_a_video_at_another_rate(tmp_path, capsys):
    root = copy(V21, tmp_path)
    write_video(root / VIDEO["v21"], decoded(root / VIDEO["v21"]), rate=15)
    status, findings, _ = run(capsys, root)
    assert status == 1 and ("frame rate", str(root / VIDEO["v21"])) in {(f["check"], f["file"]) for f in findings}


@pytest.mark.parametrize("kind", ["v21", "v30"])
def test_a_truncated_video(kind, tmp_path, capsys):
    root = copy({"v21": V21, "v30": V30}[kind], tmp_path)
    video = root / VIDEO[kind]
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    status, findings, _ = run(capsys, root)
    assert status == 1
    (finding,) = findings
    assert (finding["check"], finding["file"]) == ("video", str(video)) and "cannot be opened" in finding["message"]
    assert len(finding["episodes"]) == {"v21": 1, "v30": 6}[kind]


def test_a_video_damaged_in_the_middle_costs_only_the_episodes_there(tmp_path, capsys):
    root = copy(V30, tmp_path)
    video = root / VIDEO["v30"]
    noise = np.random.default_rng(0).integers(0, 255, (1853, 32, 32, 3), dtype=np.uint8)
    write_video(video, noise, movflags="+faststart")
    assert run(capsys, root)[0] == 0
    content = bytearray(video.read_bytes())
    middle = len(content) * 700 // 1853  # some frames of episode 2, which has rows 624 to 984
    content[middle : middle + 20_000] = bytes(20_000)
    video.write_bytes(content)
    status, findings, _ = run(capsys, root)
    assert status == 1
    errors = [f for f in findings if f["severity"] == "error"]
    assert {name for f in errors for name in f["episodes"]} == {"episode_000002"}
    assert all(f["file"] == str(video) and 624 <= f["index"] < 985 for f in errors)


# --- EgoDex ------------------------------------------------------------------------------------------------------


def pose(file, name, change):
    with h5py.File(file, "a") as content:
        values = np.array(content[f"transforms/{name}"])
        change(values)
        content[f"transforms/{name}"][...] = values


def attribute(file, **values):
    with h5py.File(file, "a") as content:
        content.attrs.update(values)


def remove(file, name):
    with h5py.File(file, "a") as content:
        del content[name]


EGODEX_DAMAGE = {
    "finite": (lambda f: pose(f, "rightHand", lambda v: v.__setitem__((11, 0, 3), np.nan)), ".hdf5", 11),
    "rotation": (lambda f: pose(f, "camera", lambda v: v.__setitem__((4, slice(3), slice(3)), 0)), ".hdf5", 4),
    "range": (lambda f: pose(f, "rightHand", lambda v: v.__setitem__((50, 0, 3), 9.0)), ".hdf5", 49),
    "instruction": (lambda f: attribute(f, which_llm_description="2", llm_description2=" "), ".hdf5", None),
    "column": (lambda f: remove(f, "transforms/leftHand"), ".hdf5", None),
    "file": (lambda f: f.write_bytes(f.read_bytes()[:300]), ".hdf5", None),
    "video": (lambda f: f.with_suffix(".mp4").write_bytes(b"no video"), ".mp4", None),
    "file reference": (lambda f: f.with_suffix(".mp4").unlink(), ".mp4", None),
}


@pytest.mark.parametrize("check", EGODEX_DAMAGE)
def test_egodex(check, tmp_path, capsys):
    root = copy(EGODEX, tmp_path)
    damage, suffix, index = EGODEX_DAMAGE[check]
    damage(root / f"{FIRST}.hdf5")
    status, findings, _ = run(capsys, root)
    assert status == (0 if check == "range" else 1)
    (*_, finding) = [f for f in findings if f["check"] == check and f["index"] == index]
    assert finding["file"] == str(root / f"{FIRST}{suffix}") and finding["episodes"] == [FIRST]


def test_egodex_with_a_dropped_frame_a_copy_and_a_video_alone(tmp_path, capsys):
    root = copy(EGODEX, tmp_path)
    video = root / f"{FIRST}.mp4"
    write_video(video, decoded(video)[:-1])
    for suffix in (".hdf5", ".mp4"):
        shutil.copy(root / f"test/pick_place_block/3{suffix}", root / f"test/pick_place_block/7{suffix}")
    shutil.copy(root / "test/pick_place_block/2.mp4", root / "test/alone.mp4")
    status, findings, _ = run(capsys, root)
    assert status == 1
    found = {(f["severity"], f["check"], Path(f["file"]).name, f["index"]) for f in findings}
    assert found >= {
        ("error", "frame count", "0.mp4", 133),
        ("error", "duplicate", "7.hdf5", 0),
        ("error", "duplicate", "7.mp4", 0),
        ("warning", "file reference", "alone.mp4", None),
    }


# --- other kinds -------------------------------------------------------------------------------------------------


def write_clips(root: Path, count: int = 4) -> Path:
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        write_video(root / f"{i}.mp4", generator.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8))
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *((f"{i}.mp4", f"a hand does {i}") for i in range(count))])
    return root


def test_clips(tmp_path, capsys):
    root = write_clips(tmp_path / "clips")
    assert run(capsys, root)[:2] == (0, [])
    with open(root / "captions.csv", "a", encoding="utf-8") as file:
        file.write("gone.mp4,it went away\n")
    shutil.copy(root / "1.mp4", root / "silent.mp4")
    (root / "2.mp4").write_bytes(b"nothing")
    shutil.copy(root / "0.mp4", root / "3.mp4")
    out = tmp_path / "fix.json"
    status, findings, summary = run(capsys, root, "--fix", out)
    assert status == 1 and summary["complete"]
    found = {(f["check"], Path(f["file"]).name) for f in findings}
    assert found == {
        ("file reference", "gone.mp4"),
        ("instruction", "silent.mp4"),
        ("file", "2.mp4"),
        ("duplicate", "3.mp4"),
    }
    episodes = open_source(f"clips:{root}", DataConfig(exclude=str(out)), progress=False)
    assert [e.name for e in episodes] == ["0.mp4", "1.mp4"]


def write_hdf5(path: Path, steps: int = 30, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["obs/state"] = np.cumsum(generator.normal(size=(steps, 6)), 0).astype(np.float32)
        file["action"] = file["obs/state"][:] + 0.5
        file["timestamp"] = np.arange(steps) / 30
        file["obs/front_image"] = generator.integers(0, 255, (steps, 32, 32, 3), dtype=np.uint8)
        file.attrs["language_instruction"] = "push the button"


def test_hdf5(tmp_path, capsys):
    root = tmp_path / "hdf5"
    root.mkdir()
    for i in range(5):
        write_hdf5(root / f"{i}.hdf5", seed=i)
    assert run(capsys, root)[:2] == (0, [])
    with h5py.File(root / "1.hdf5", "a") as file:
        file["action"][3] = np.nan
    (root / "2.hdf5").write_bytes((root / "2.hdf5").read_bytes()[:500])
    shutil.copy(root / "0.hdf5", root / "4.hdf5")
    out = tmp_path / "fix.json"
    status, findings, summary = run(capsys, root, "--fix", out)
    assert status == 1 and summary["looked_at"]["episodes"] == 5
    found = {(f["check"], Path(f["file"]).name, *f["episodes"]) for f in findings}
    assert found == {
        ("file", "1.hdf5", "1.hdf5"),
        ("file", "2.hdf5", "2.hdf5"),
        ("duplicate", "4.hdf5", "4.hdf5"),
    }
    assert any("action is not finite at step 3" in f["message"] for f in findings)
    assert len(open_source(f"hdf5:{root}", DataConfig(exclude=str(out)), progress=False)) == 2


def test_calvin(tmp_path, capsys):
    root = tmp_path / "calvin"
    (root / "lang_annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(40):
        np.savez(
            root / f"episode_{i:07d}.npz",
            rgb_static=generator.integers(0, 255, (32, 32, 3), dtype=np.uint8),
            rgb_gripper=generator.integers(0, 255, (16, 16, 3), dtype=np.uint8),
            robot_obs=generator.normal(size=15) * 0.1,
            actions=generator.normal(size=7) * 0.1,
        )
    windows = {"language": {"ann": ["open", "close", "turn"]}, "info": {"indx": [(0, 9), (10, 24), (25, 39)]}}
    np.save(root / "lang_annotations" / "auto_lang_ann.npy", windows, allow_pickle=True)
    assert run(capsys, root)[0] == 0
    (root / "episode_0000012.npz").unlink()
    (root / "episode_0000030.npz").write_bytes(b"PK")
    out = tmp_path / "fix.json"
    status, findings, _ = run(capsys, root, "--fix", out)
    errors = [f for f in findings if f["severity"] == "error"]
    assert status == 1
    assert {(Path(f["file"]).name, f["check"]) for f in errors} == {
        ("episode_0000012.npz", "file reference"),
        ("episode_0000030.npz", "file"),
    }
    assert [e["episodes"] for e in errors] == [["window_000001"], ["window_000002"]]
    assert run(capsys, root, f"--config.data.exclude={out}")[0] == 0
    assert [e.name for e in open_source(f"calvin:{root}", DataConfig(exclude=str(out)))] == ["window_000000"]


def test_rlds(tmp_path, capsys):
    texts = ("pour", "", "stir")
    root = write_rlds(tmp_path / "toy", texts=texts)
    out = tmp_path / "fix.json"
    status, findings, summary = run(capsys, f"rlds:{root}", "--config.data.rlds.fps=5.0", "--fix", out)
    assert status == 1 and summary["looked_at"]["episodes"] == 3
    (error,) = [f for f in findings if f["severity"] == "error" and f["check"] == "file"]
    assert error["episodes"] == ["train_000001"] and "no instruction at step 0" in error["message"]
    assert "train_000001" in json.loads(out.read_text(encoding="utf-8"))["episodes"][f"rlds:{root}"]


def test_many_episodes_of_rlds_without_an_instruction(tmp_path, capsys, monkeypatch):
    """They are all left out at once: every fifth episode of DROID has none."""
    monkeypatch.setattr("data_pipelines.inspect.validate.opening._REOPEN", 2)
    texts = ["push", *[""] * 6, "pull"]
    root = write_rlds(tmp_path / "toy", lengths=[2] * 7 + [3], texts=texts, kind="tfrecord")
    out = tmp_path / "fix.json"
    status, findings, summary = run(capsys, f"rlds:{root}", "--fix", out)
    errors = [f for f in findings if f["severity"] == "error" and f["check"] == "file"]
    assert status == 1 and len(errors) == 6 and summary["looked_at"]["episodes"] == 8
    config = DataConfig(exclude=str(out))
    assert [e.name for e in open_source(f"rlds:{root}", config)] == ["train_000000", "train_000007"]


def test_records(tmp_path, capsys):
    root = tmp_path / "corpus"
    root.mkdir()
    videos = [(EGODEX / f"test/pick_place_block/{i}.mp4").read_bytes() for i in (0, 1, 2, 0)]
    clips = [records.video_record(f"clip {i}", "a hand", 30.0, video, 134) for i, video in enumerate(videos)]
    records.write_shard(root, 0, 1, clips)
    records.finish(root, 1, {})
    status, findings, _ = run(capsys, root)
    assert status == 1 and [(f["check"], f["episodes"]) for f in findings] == [("duplicate", ["clip 3"])]
    (shard,) = root.glob("corpus-train*")
    content = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8))  # records of one size, padded with zeros
    start = int(used[len(used) * 5 // 8])
    content[start : start + 200] = bytes(200)
    shard.write_bytes(content)
    out = tmp_path / "fix.json"
    status, findings, _ = run(capsys, root, "--fix", out)
    (error,) = [f for f in findings if f["check"] == "file"]
    assert status == 1 and error["file"] == str(shard) and "record 2 cannot be read" in error["message"]
    assert error["episodes"] == ["clip 2"]
    assert json.loads(out.read_text(encoding="utf-8"))["episodes"] == {f"records:{root}": ["clip 2", "clip 3"]}
    assert run(capsys, root, f"--config.data.exclude={out}")[0] == 0
    shutil.rmtree(root / "manifest")
    status, findings, _ = run(capsys, root)
    (error,) = [f for f in findings if f["check"] == "file reference"]
    assert status == 1 and "manifest/00000-of-00001.parquet does not exist" in error["message"]


# --- the command -------------------------------------------------------------------------------------------------


def test_fix_leaves_the_data_alone_and_names_episodes(tmp_path, capsys):
    root = copy(EGODEX, tmp_path)
    pose(root / f"{FIRST}.hdf5", "rightHand", lambda v: v.__setitem__((11, 0, 3), np.nan))
    (root / "test/pick_place_block/2.mp4").write_bytes(b"no video")
    before, out = fingerprint(root), tmp_path / "fix.json"
    assert cli.main(["data", "validate", str(root), "--fix", str(out)]) == 1
    assert "2 of 4 episodes have errors" in capsys.readouterr().out
    assert fingerprint(root) == before
    assert json.loads(out.read_text(encoding="utf-8")) == {
        "episodes": {f"egodex:{root}": [FIRST, "test/pick_place_block/2"]}
    }
    episodes = open_source(f"egodex:{root}", DataConfig(exclude=str(out)), progress=False)
    assert [e.name for e in episodes] == ["test/pick_place_block/1", "test/pick_place_block/3"]


def test_fix_of_lerobot(tmp_path, capsys):
    root = copy(V21, tmp_path)
    change_table(root / ROWS["v21"], "action", set_number(4, 0, float("nan")))
    (root / VIDEO["v21"].replace(FRONT, WRIST)).unlink()
    before, out = fingerprint(root), tmp_path / "fix.json"
    assert cli.main(["data", "validate", f"lerobot:{root}", "--fix", str(out)]) == 1
    assert "does not remove" not in capsys.readouterr().out and fingerprint(root) == before
    assert json.loads(out.read_text(encoding="utf-8")) == {"episodes": {f"lerobot:{root}": ["episode_000000"]}}
    episodes = open_source(f"lerobot:{root}", DataConfig(exclude=str(out)), progress=False)
    assert [e.name for e in episodes] == ["episode_000001"]


@pytest.mark.parametrize("kind", ["v21", "v30", "egodex"])
def test_what_fix_wrote_can_be_checked_and_does_from_another_folder(kind, tmp_path, capsys, monkeypatch):
    root = copy({"v21": V21, "v30": V30, "egodex": EGODEX}[kind], tmp_path)
    bad = {"v21": ["episode_000000"], "v30": ["episode_000000", "episode_000002"], "egodex": [FIRST]}[kind]
    if kind == "egodex":
        pose(root / f"{FIRST}.hdf5", "rightHand", lambda v: v.__setitem__((11, 0, 3), np.nan))
    else:
        change_table(root / ROWS[kind], "action", set_number(4, 0, float("nan")))
    if kind == "v21":
        (root / VIDEO["v21"]).unlink()
    if kind == "v30":  # starts inside the episode before
        change_table(root / EPISODES, f"videos/{WRIST}/from_timestamp", set_row(2, lambda t: t - 1.0))
    monkeypatch.chdir(tmp_path)
    _, _, before = run(capsys, root.name, "--fix", "fix.json")
    source = f"{'egodex' if kind == 'egodex' else 'lerobot'}:{root}"
    assert json.loads(Path("fix.json").read_text(encoding="utf-8"))["episodes"] == {source: bad}
    monkeypatch.chdir(root)
    status, _, after = run(capsys, root, "--config.data.exclude=../fix.json", "--fix", "../again.json")
    assert status == 0 and after["looked_at"]["episodes"] == before["looked_at"]["episodes"] - len(bad)
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == (tmp_path / "fix.json").read_text(encoding="utf-8")
    assert len(open_source(source, DataConfig(exclude="../fix.json"))) == after["looked_at"]["episodes"]


def test_fix_needs_a_folder_before_the_work(tmp_path, capsys):
    assert cli.main(["data", "validate", str(V21), "--fix", str(tmp_path / "none" / "fix.json")]) == 2
    assert "the folder does not exist" in capsys.readouterr().err


def test_fix_says_what_it_cannot_mend(tmp_path, capsys):
    root = copy(V21, tmp_path)
    change_info(root, total_frames=99)
    out = tmp_path / "fix.json"
    assert cli.main(["data", "validate", str(root), "--fix", str(out)]) == 1
    assert json.loads(out.read_text(encoding="utf-8"))["episodes"] == {f"lerobot:{root}": []}
    assert "leaving episodes out does not remove this fault: error" in capsys.readouterr().out


def test_the_table_counts_what_it_does_not_list(tmp_path, capsys):
    root = copy(V30, tmp_path)
    change_table(root / ROWS["v30"], "timestamp", lambda values: values.__setitem__(slice(None), [5.0] * len(values)))
    assert cli.main(["data", "validate", str(root)]) == 1
    out = capsys.readouterr().out
    assert "... and 1 more" in out and "timestamp" in out.splitlines()[1]  # six episodes, five shown
    assert out.splitlines()[-1].startswith(f"lerobot:{root}: 6 errors, 0 warnings (checked: 6 episodes, 1,853 rows")


def test_stop_after(tmp_path, capsys):
    root = copy(V30, tmp_path)
    change_table(root / ROWS["v30"], "timestamp", lambda values: values.__setitem__(slice(None), [5.0] * len(values)))
    status, findings, summary = run(capsys, root, "--stop-after", 2)
    assert status == 1 and len(findings) == 2 and not summary["complete"]


def test_what_cannot_be_read_at_all(tmp_path, capsys):
    root = copy(V21, tmp_path)
    (root / "meta" / "info.json").write_text("{", encoding="utf-8")
    for source in (root, tmp_path / "none", "lerobot:", f"rlds:{root}", f"egodex:{root}", f"lerobot:{tmp_path}/none"):
        assert cli.main(["data", "validate", str(source)]) == 2, source
        assert capsys.readouterr().err.startswith("rynnvla data validate: ")
    assert cli.main(["data", "validate"]) == 2


def test_kinds_are_told_by_files(tmp_path):
    for name, file, kind in (
        ("a", "meta/info.json", "lerobot"),
        ("b", "corpus.json", "records"),
        ("c", "dataset_info.json", "rlds"),
        ("d", "lang_annotations/auto_lang_ann.npy", "calvin"),
        ("e", "captions.jsonl", "clips"),
        ("f", "x/0.h5", "hdf5"),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).touch()
        assert source_of(str(tmp_path / name)) == f"{kind}:{tmp_path / name}"
    (tmp_path / "b" / "dataset_info.json").touch()  # a corpus has it, too
    assert source_of(str(tmp_path / "b")).startswith("records:")
    assert source_of(str(EGODEX)) == f"egodex:{EGODEX}" and source_of("hdf5:any") == "hdf5:any"
    (tmp_path / "g").mkdir()
    with pytest.raises(ConfigError, match="calvin:PATH.*\n.*rlds:PATH"):
        source_of(str(tmp_path / "g"))


@pytest.mark.parametrize("others", [False, True])
def test_an_unreadable_file_of_episodes_is_the_only_fault(others, tmp_path, capsys):
    root = write_lerobot(tmp_path / "set", lengths=(30, 31), version="v3.0")
    first = root / EPISODES
    table = pq.read_table(first)
    damaged = first.with_name("file-001.parquet") if others else first
    if others:
        pq.write_table(table.slice(0, 1), first)
    pq.write_table(table, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    status, findings, _ = run(capsys, f"lerobot:{root}")
    assert status == 1 and [(f["check"], f["file"]) for f in findings] == [("file", str(damaged))]
