"""`rynnvla data validate` as an auditor: data that can be read and are not what was meant. Sound data say nothing."""

import json
import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines import cut_off
from data_pipelines.inspect.validate.audit import Audit
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.pictures import Look, alike
from data_pipelines.inspect.validate.rows import Location
from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import DataConfig
from tests.data_pipelines.test_validate import (
    EGODEX,
    EPISODES,
    FIRST,
    FRONT,
    ROWS,
    V21,
    V30,
    VIDEO,
    WRIST,
    change_info,
    change_table,
    copy,
    decoded,
    run,
    write_hdf5,
    write_video,
)
from tests.recordings import encoded, write_lerobot


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- pictures ----------------------------------------------------------------------------------------------------


def blue(frames):
    return [np.full_like(frames[0], (20, 30, 200))] * len(frames)


PICTURES = {
    "black": (lambda x: [np.zeros_like(x[0])] * len(x), "picture", "all of the pictures are black"),
    "blue": (blue, "picture", "all of the pictures have a single colour"),
    "frozen": (lambda x: [x[0]] * len(x), "picture", "does not change for 90 of 90 frames while the state of"),
    "hangs": (lambda x: x[:30] + [x[30]] * 60, "picture", "does not change for 60 of 90 frames while the state of"),
    "twice": (lambda x: [x[i // 2 * 2] for i in range(len(x))], "repeated pictures", "occurs 2 times in a row"),
    "thrice": (lambda x: [x[i // 3 * 3] for i in range(len(x))], "repeated pictures", "occurs 3 times in a row"),
}


def moving(frames: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures with a large hand that moves all the time."""
    out = []
    for i, frame in enumerate(frames):
        frame = frame.copy()
        at = int(20 + 18 * np.sin(i / 4))
        frame[at : at + 20, at // 2 : at // 2 + 20] = (200, 160, 130)
        out.append(frame)
    return out


@pytest.mark.parametrize("case", PICTURES)
def test_what_a_camera_shows(case, tmp_path, capsys):
    change, check, text = PICTURES[case]
    root = copy(V21, tmp_path)
    frames = moving(decoded(root / VIDEO["v21"]))
    write_video(root / VIDEO["v21"], frames)
    assert run(capsys, root)[:2] == (0, [])
    write_video(root / VIDEO["v21"], change(frames))
    status, findings, _ = run(capsys, root)
    (finding,) = findings
    assert (status, finding["severity"], finding["check"]) == (0, "warning", check)
    assert text in finding["message"] and f"camera {FRONT}" in finding["message"]
    assert finding["episodes"] == ["episode_000000"] and finding["file"] == str(root / VIDEO["v21"])
    assert finding["index"] == (30 if case == "hangs" else 0)


def test_fix_says_that_episodes_with_warnings_stay_in_and_how_to_leave_them_out(tmp_path, capsys):
    root, out = copy(V21, tmp_path), tmp_path / "fix.json"
    write_video(root / VIDEO["v21"], [np.zeros((64, 64, 3), np.uint8)] * 90)
    assert cli.main(["data", "validate", f"lerobot:{root}", "--fix", str(out)]) == 0
    assert "1 other episodes have warnings and stay in; look at them (rynnvla data show" in capsys.readouterr().out
    assert cli.main(["data", "show", f"lerobot:{root}", "--out", str(tmp_path / "page.html"), "--episodes", "1"]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    content["episodes"][f"lerobot:{root}"].append("episode_000000")
    out.write_text(json.dumps(content), encoding="utf-8")
    assert run(capsys, root, f"--config.data.exclude={out}")[:2] == (0, [])
    assert [e.name for e in open_source(f"lerobot:{root}", DataConfig(exclude=str(out)))] == ["episode_000001"]


def test_black_episodes_are_no_duplicates(tmp_path, capsys):
    root = copy(V21, tmp_path)
    for i in (0, 1):
        write_video(root / VIDEO["v21"].replace("000000.mp4", f"00000{i}.mp4"), [np.zeros((64, 64, 3), np.uint8)] * 90)
    status, findings, _ = run(capsys, root)
    assert status == 0 and [f["check"] for f in findings] == ["picture"] * 2


def test_a_camera_that_is_still_beside_an_arm_that_is_still_is_sound(tmp_path, capsys):
    root = copy(V21, tmp_path)
    write_video(root / VIDEO["v21"], [decoded(root / VIDEO["v21"])[0]] * 90)
    for column in ("observation.state", "action"):
        rows = pq.read_table(root / ROWS["v21"])[column].to_pylist()
        change_table(root / ROWS["v21"], column, lambda v, rows=rows: v.__init__([rows[0]] * 90))
    _, findings, summary = run(capsys, root)
    assert {f["check"] for f in findings} == {"idle", "constant"} and summary["figures"]["idle share"] > 0.4


def test_one_camera_twice(tmp_path, capsys):
    root = copy(V21, tmp_path)
    frames = [np.clip(f.astype(int) + 1, 0, 255).astype(np.uint8) for f in decoded(root / VIDEO["v21"])]
    write_video(root / VIDEO["v21"].replace(FRONT, WRIST), frames)  # other bytes, other pixels, the same pictures
    status, findings, _ = run(capsys, root)
    (finding,) = findings
    assert status == 0 and finding["message"].startswith(
        f"episode_000000: the cameras {FRONT} and {WRIST} show the same"
    )


def test_swapped_cameras(tmp_path, capsys):
    root = copy(V30, tmp_path)
    paths = [root / VIDEO["v30"].replace(FRONT, key) for key in (FRONT, WRIST)]
    front, wrist = ([f[::4, ::4] for f in decoded(path)] for path in paths)
    swapped = slice(624, 985)  # episode 2
    front[swapped], wrist[swapped] = wrist[swapped], front[swapped]
    for path, frames in zip(paths, (front, wrist), strict=True):
        write_video(path, frames)
    status, findings, _ = run(capsys, root)
    (finding,) = findings
    assert status == 0 and "look swapped" in finding["message"] and finding["episodes"] == ["episode_000002"]


def test_looks_are_those_of_the_pictures():
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (240, 320), dtype=np.uint8)
    noise = [np.clip(scene + rng.normal(0, 2, scene.shape), 0, 255).astype(np.uint8) for _ in range(40)]
    still, other = Look(40), Look(40)
    for i, picture in enumerate(noise):
        still.add(i, picture)
        other.add(i, noise[-1 - i])
    assert still.still == (0, 40) and still.repeats() == 1 and not still.empty  # a sensor's noise is no motion
    assert alike(still.copies, other.copies) and not alike(still.copies, [255 - c for c in other.copies])
    tiny = Look(3)
    for i in range(3):
        tiny.add(i, np.full((2, 5), 40 * i, np.uint8))
    assert tiny.still == (0, 1) and tiny.flat == 2 and tiny.black == 1


def test_a_slow_arm_whose_small_motions_are_left_out_by_the_codec_is_not_repeated():
    """Every second frame is a copy where nothing moves much; where it moves, it is not."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (64, 64), dtype=np.uint8)
    look = Look(120)
    for i in range(120):
        shift = (i if 40 <= i < 80 else i // 2 * 2) // (1 if 40 <= i < 80 else 8)
        look.add(i, np.roll(scene, shift, axis=1))
    assert look.repeats() == 1


# --- rows --------------------------------------------------------------------------------------------------------


def set_columns(root, columns, values: np.ndarray) -> None:
    """Puts `values` [90, n] into the columns of state and, half a step later, of action, in both episodes."""
    for episode in (0, 1):
        path = root / ROWS["v21"].replace("000000.parquet", f"00000{episode}.parquet")
        for name, shift in (("observation.state", 0), ("action", 1)):
            rows = np.array(pq.read_table(path)[name].to_pylist(), np.float32)
            rows[:, columns] = np.roll(values, -shift - 5 * episode, axis=0)
            change_table(path, name, lambda v, rows=rows: v.__init__(rows.tolist()))


def declare(root, meaning: dict, **action) -> None:
    """Writes rynnvla_columns.json: what `meaning` says of columns by name, and `action` of those of the action."""
    names = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
    state = [{"name": name, **meaning.get(name, {})} for name in names]
    actions = [entry | (action if entry["name"] in meaning else {}) for entry in state]
    content = json.dumps({"state": state, "action": actions})
    (root / "rynnvla_columns.json").write_text(content, encoding="utf-8")


@pytest.mark.parametrize(("turn", "unit"), [(2 * np.pi, "radians"), (360.0, "degrees")])
def test_an_angle_that_wraps(turn, unit, tmp_path, capsys):
    root = copy(V21, tmp_path)
    there = turn * (0.4 + 0.2 * np.sin(np.arange(90) / 90 * 2 * np.pi))
    set_columns(root, [4], there[:, None])
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]
    set_columns(root, [4], (there - turn * (there > turn / 2))[:, None])
    found = [f for f in run(capsys, root)[1] if f["check"] == "angle"]
    assert len(found) == 2 and all(f"a whole turn in {unit} (4 times" in f["message"] for f in found)
    assert {"state", "action"} == {f["message"].split(": ")[1].split()[0] for f in found}
    assert all("wrist roll" in f["message"] and f["severity"] == "warning" for f in found)
    assert all(
        f"in rynnvla_columns.json beside the data set that it is an euler angle in {unit} (kind euler; " in f["message"]
        for f in found
    )
    declare(root, {"wrist_roll": {"kind": "euler", "unit": unit}})  # the remedy
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]
    declare(root, {"wrist_roll": {"kind": "euler", "unit": unit}}, pair="")
    (kept,) = [f["message"] for f in run(capsys, root)[1] if f["check"] == "angle"]
    assert ": action of wrist roll" in kept and "pair it in rynnvla_columns.json" in kept


def test_fast_degrees_are_no_radians_that_wrap(tmp_path, capsys):
    root = copy(V21, tmp_path)
    swing = 40 * np.sin(np.arange(90) / 90 * 6 * np.pi)
    at = int(np.argmin(np.abs(swing[1:] - swing[:-1] - 2 * np.pi)))
    swing -= (swing[at] + swing[at + 1]) / 2  # from -3.1 to 3.1 degrees in one step
    assert abs(swing[at] + np.pi) < 0.4 and abs(swing[at + 1] - np.pi) < 0.4
    set_columns(root, [4], swing[:, None])
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]


def test_a_quaternion_that_changes_its_sign(tmp_path, capsys):
    root = copy(V21, tmp_path)
    half = np.sin(np.arange(90) / 90 * 2 * np.pi) * 0.6
    axis = np.array([1.0, 2.0, 2.0]) / 3
    quaternion = np.concatenate([np.sin(half)[:, None] * axis, np.cos(half)[:, None]], axis=1)
    set_columns(root, [1, 2, 3, 4], quaternion)
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]
    quaternion[40:60] *= -1
    set_columns(root, [1, 2, 3, 4], quaternion)
    found = [f for f in run(capsys, root)[1] if f["check"] == "angle"]
    assert {f["message"].split(" in ")[1].split(" changes")[0] for f in found} == {
        "state columns 1 to 4", "action columns 1 to 4"
    }  # fmt: skip
    assert all("4 times in all episodes" in f["message"] for f in found) and found[0]["index"] == 40
    assert all(
        "say in rynnvla_columns.json beside the data set that they are a quaternion" in f["message"] for f in found
    )
    names = ("shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
    declare(root, {name: {"kind": "quaternion", "unit": "1"} for name in names})  # the remedy
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]


def test_actions_that_repeat_the_state(tmp_path, capsys):
    root = copy(V21, tmp_path)
    for episode in (0, 1):
        path = root / ROWS["v21"].replace("000000.parquet", f"00000{episode}.parquet")
        rows = pq.read_table(path)["observation.state"].to_pylist()
        change_table(path, "action", lambda v, rows=rows: v.__init__(rows))
    status, findings, _ = run(capsys, root)
    (finding,) = findings
    assert (status, finding["check"], finding["file"]) == (0, "action", str(root))
    assert "shoulder pan" in finding["message"] and "equals the state of the same step" in finding["message"]


def test_an_episode_in_which_nothing_moves(tmp_path, capsys):
    root = copy(V21, tmp_path)
    for column in ("observation.state", "action"):
        rows = pq.read_table(root / ROWS["v21"])[column].to_pylist()
        change_table(root / ROWS["v21"], column, lambda v, rows=rows: v.__init__([rows[0]] * 88 + rows[88:]))
    _, findings, summary = run(capsys, root)
    idle = [f["message"] for f in findings if f["check"] == "idle"]
    share = summary["figures"]["idle share"]
    assert 0.5 <= share < 0.6 and idle[0] == f"nothing moves in {share:.0%} of all steps; cut the pauses"
    assert idle[1:] == ["episode_000000: nothing moves in 98% of its steps"]
    assert cli.main(["data", "validate", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; idle share {share:.0%}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda names: [f"ee_{i}" for i in range(6)],
            "elbow flex and 3 more) and action (ee 0, ee 1, ee 2 and 3 more)",
        ),
        (lambda names: names[::-1], None),  # paired by name
        (lambda names: [f"main_{n.removesuffix('.pos')}" for n in names], None),  # a leader's and a follower's
        (lambda names: None, None),
    ],
)
def test_names_of_state_and_action(change, text, tmp_path, capsys):
    root = copy(V21, tmp_path)
    features = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))["features"]
    names = features["observation.state"]["names"]
    features["action"] = features["action"] | {"names": change(names)}
    change_info(root, features=features)
    status, findings, _ = run(capsys, root)
    assert status == 0 and len(findings) == (text is not None)
    assert all(f["check"] == "column" and f["severity"] == "warning" and text in f["message"] for f in findings)


def test_episodes_too_short_for_a_stage(tmp_path, capsys):
    root = copy(V21, tmp_path)
    assert run(capsys, root, "--config.data.chunk=85")[1] == []
    _, findings, _ = run(capsys, root, "--config.data.chunk=87")  # and one step, and four frames
    (finding,) = findings
    assert "stage trajectory and robot needs 92 steps with data.chunk=87" in finding["message"]
    assert "so 2 of 2 episodes" in finding["message"] and finding["check"] == "short"
    _, (all_stages,), _ = run(capsys, root, "--config.data.chunk=90")
    assert "stage action_vae needs 91 steps" in all_stages["message"]
    source = f"lerobot:{root}"  # the remedy, by the stages' own rule
    assert open_source(source, DataConfig(chunk=85)).lengths.tolist() == [90, 90]


# --- what the remedies say is what helps ----------------------------------------------------------------------------


def test_line_separators_inside_an_instruction_are_part_of_it(tmp_path, capsys):
    """JSON may contain U+2028, U+2029 and U+0085 as they are; they end no line of a file."""
    root = copy(V21, tmp_path)
    path = root / "meta" / "tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    spoken = [f"{t['task']}\u2028then\u2029wait\x85" for t in tasks]
    lines = [json.dumps(t | {"task": text}, ensure_ascii=False) for t, text in zip(tasks, spoken, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run(capsys, root)[:2] == (0, [])
    assert set(open_source(f"lerobot:{root}", DataConfig()).texts) == set(spoken)


@pytest.mark.parametrize("kind", ["v30", "egodex"])
def test_files_of_macos_are_no_data(kind, tmp_path, capsys):
    root = copy({"v30": V30, "egodex": EGODEX}[kind], tmp_path)
    before = run(capsys, root)
    for path in [p for p in root.rglob("*") if p.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    status, findings, summary = run(capsys, root)
    assert status == 0 and summary["looked_at"] == before[2]["looked_at"] and len(findings) == len(before[1]) + 1
    (finding,) = [f for f in findings if f["check"] == "file reference"]
    assert finding["severity"] == "warning" and f"find {root} -name '._*' -delete removes them" in finding["message"]
    config = DataConfig()
    assert len(open_source(f"{'egodex' if kind == 'egodex' else 'lerobot'}:{root}", config)) in (4, 6)
    for path in root.rglob("._*"):  # the remedy
        path.unlink()
    assert run(capsys, root)[1] == before[1]


def test_a_frame_rate_that_is_null(tmp_path, capsys):
    root = copy(V21, tmp_path)
    change_info(root, fps=None)
    assert cli.main(["data", "validate", str(root)]) == 2
    error = capsys.readouterr().err
    assert "fps is null" in error and "correct it to the videos' frame rate (ffprobe FILE.mp4 prints it)" in error
    change_info(root, fps=30)
    assert run(capsys, root)[:2] == (0, [])


def test_a_recording_that_was_cut_off_is_told_from_other_damage(tmp_path, capsys):
    root = copy(V21, tmp_path)
    video, rows = root / VIDEO["v21"], root / ROWS["v21"]
    for path in (video, rows, EGODEX / f"{FIRST}.hdf5"):
        content = path.read_bytes()
        part = tmp_path / f"part{path.suffix}"
        assert cut_off.remedy(path) == "copy it again"  # nothing is missing
        for share in (0.3, 0.9, 1 - 9 / len(content)):
            part.write_bytes(content[: int(share * len(content))])
            assert cut_off.remedy(part).startswith("its end is missing")
        part.write_bytes(b"something else")
        others = (part, tmp_path / "absent", "record 3 front", "a\0b")
        assert [cut_off.remedy(x) for x in others] == ["copy it again"] * 4
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    rows.write_bytes(rows.read_bytes()[:-100])
    out = tmp_path / "fix.json"
    status, findings, _ = run(capsys, root, "--fix", out)
    assert status == 1 and {f["check"] for f in findings} == {"file", "video"}
    assert all("if the recording itself was cut off, leave its episodes out" in f["message"] for f in findings)
    arguments = f"--config.data.exclude={out}"  # the remedy
    status, findings, summary = run(capsys, root, arguments)
    assert (status, findings, summary["looked_at"]["videos"]) == (0, [], 2)
    assert [e.name for e in open_source(f"lerobot:{root}", DataConfig(exclude=str(out)))] == ["episode_000001"]


def test_what_follows_from_a_row_of_metadata_that_cannot_be_read_is_no_further_fault(tmp_path, capsys):
    root = copy(V30, tmp_path)
    change_table(root / EPISODES, f"videos/{WRIST}/chunk_index", lambda values: values.__setitem__(2, None))
    out = tmp_path / "fix.json"
    status, (finding,), _ = run(capsys, root, "--fix", out)
    assert status == 1 and (finding["check"], finding["index"], finding["episodes"]) == (
        "metadata",
        2,
        ["episode_000002"],
    )
    assert run(capsys, root, f"--config.data.exclude={out}")[:2] == (0, [])


def test_what_is_left_out_is_not_read(tmp_path, capsys):
    root = copy(V21, tmp_path)
    out = tmp_path / "fix.json"
    out.write_text(json.dumps({"episodes": {f"lerobot:{root}": ["episode_000000"]}}), encoding="utf-8")
    for path in (root / ROWS["v21"], root / VIDEO["v21"], root / VIDEO["v21"].replace(FRONT, WRIST)):
        path.unlink()
    status, findings, summary = run(capsys, root, f"--config.data.exclude={out}")
    assert (status, findings) == (0, [])
    assert summary["looked_at"] == {"episodes": 1, "rows": 90, "videos": 2, "frames": 180}


def test_faults_of_a_camera_that_is_not_used_cost_no_episode(tmp_path, capsys):
    root = copy(V21, tmp_path)
    features = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))["features"]
    features["observation.images.top"] = features[WRIST]
    change_info(root, features=features)
    top = root / VIDEO["v21"].replace(FRONT, "observation.images.top")
    top.parent.mkdir()
    shutil.copy(root / VIDEO["v21"], top)  # a copy, cut off later; the file of the second episode is missing
    top.write_bytes(top.read_bytes()[: top.stat().st_size // 2])
    out = tmp_path / "fix.json"
    status, findings, _ = run(capsys, root, "--fix", out)
    assert status == 0 and {f["check"] for f in findings} == {"file reference", "video", "totals"}
    assert json.loads(out.read_text(encoding="utf-8"))["episodes"] == {f"lerobot:{root}": []}
    assert len(open_source(f"lerobot:{root}", DataConfig(exclude=str(out)))) == 2
    status, findings, _ = run(capsys, root, "--config.data.wrist=observation.images.top", "--fix", out)
    assert status == 1
    assert json.loads(out.read_text(encoding="utf-8"))["episodes"][f"lerobot:{root}"] == [
        "episode_000000", "episode_000001"
    ]  # fmt: skip


def test_pictures_in_parquet_are_audited_too(tmp_path, capsys):
    root = write_lerobot(tmp_path / "set", (30, 30), "v3.0", pictures=("top",))
    data, front = root / "data/chunk-000/file-000.parquet", ["--config.data.chunk=1"]
    usual = {"range", "constant"}  # of rows that count up
    assert not [f for f in run(capsys, root, *front)[1] if f["check"] not in usual]
    black = {"bytes": encoded(np.zeros((32, 32, 3), np.uint8)), "path": ""}
    change_table(data, "top", lambda v: v.__setitem__(slice(30, 60), [black] * 30))
    status, findings, _ = run(capsys, root, *front)
    (finding,) = [f for f in findings if f["check"] not in usual]
    assert status == 0 and finding["message"].startswith("episode_000001, camera top: all of the pictures are black")
    assert (finding["check"], finding["severity"], finding["index"]) == ("picture", "warning", 30)
    assert (finding["episodes"], finding["file"]) == (["episode_000001"], str(data))


def test_faults_of_unused_pictures_in_parquet_cost_no_episode(tmp_path, capsys):
    root, out = write_lerobot(tmp_path / "set", (30, 30), "v3.0", pictures=("top",)), tmp_path / "fix.json"
    damaged = {"bytes": b"no picture", "path": ""}
    change_table(root / "data/chunk-000/file-000.parquet", "top", lambda v: v.__setitem__(4, damaged))
    for used, status, left_out in (([], 0, []), (["--config.data.wrist=top"], 1, ["episode_000000"])):
        found = run(capsys, root, "--fix", out, *used)
        assert found[0] == status and [f["index"] for f in found[1] if f["check"] == "picture"] == [4]
        assert json.loads(out.read_text(encoding="utf-8"))["episodes"] == {f"lerobot:{root}": left_out}


def test_an_unused_camera_that_one_episode_lacks_costs_no_episode(tmp_path, capsys):
    root = write_lerobot(tmp_path / "set", (30, 30), "v3.0", videos=(FRONT, "top"))
    table, out = root / "meta/episodes/chunk-000/file-000.parquet", tmp_path / "fix.json"
    for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
        change_table(table, f"videos/top/{name}", lambda v: v.__setitem__(1, None))
    for used, status, left_out in (([], 0, []), (["--config.data.wrist=top"], 1, ["episode_000001"])):
        found = run(capsys, root, "--fix", out, *used)
        assert found[0] == status and [f["index"] for f in found[1] if f["check"] == "metadata"] == [1]
        assert json.loads(out.read_text(encoding="utf-8"))["episodes"] == {f"lerobot:{root}": left_out}
        config = DataConfig(wrist="top" if used else WRIST, exclude=str(out))
        assert len(open_source(f"lerobot:{root}", config)) == 2 - len(left_out)


def test_other_kinds_are_audited_too(tmp_path, capsys):
    root = tmp_path / "hdf5"
    root.mkdir()
    for i in range(3):
        write_hdf5(root / f"{i}.hdf5", seed=i)
    assert run(capsys, root)[:2] == (0, [])
    with h5py.File(root / "1.hdf5", "a") as file:
        file["obs/front_image"][...] = 0
        file["action"][...] = file["obs/state"][...]
    _, findings, _ = run(capsys, root)
    assert [(f["check"], f["episodes"]) for f in findings] == [("picture", ["1.hdf5"])]
    for i in (0, 2):
        with h5py.File(root / f"{i}.hdf5", "a") as file:
            file["action"][...] = file["obs/state"][...]
    assert {f["check"] for f in run(capsys, root)[1]} == {"picture", "action"}


def test_an_angle_that_is_called_one_is_unwrapped_in_training_and_not_reported(tmp_path, capsys):
    root = copy(V21, tmp_path)
    there = 2 * np.pi * (0.4 + 0.2 * np.sin(np.arange(90) / 90 * 2 * np.pi))
    set_columns(root, [4], (there - 2 * np.pi * (there > np.pi))[:, None])
    found = [f["message"] for f in run(capsys, root)[1] if f["check"] == "angle"]
    assert found and all("euler" in m and "in rynnvla_columns.json beside the data set" in m for m in found)
    declare(root, {"wrist_roll": {"kind": "euler", "unit": "radians"}})
    assert not [f for f in run(capsys, root)[1] if f["check"] == "angle"]


@pytest.mark.parametrize("corpus", [False, True])
def test_the_file_of_columns_is_named_where_it_is_read(corpus, tmp_path):
    """Beside a corpus it is refused."""
    if corpus:
        (tmp_path / "corpus.json").touch()
    findings = Findings()
    audit = Audit(findings, Columns.of_joints("arm", ["a"], "radians", ""), tmp_path, DataConfig(), cameras=0)
    state = np.array([[3.0], [3.1], [-3.1], [-3.0]], np.float32)
    audit.rows(Location("one", tmp_path), state, state, 30.0)
    audit.finish()
    said = " ".join(f.message for f in findings.found if f.check == "angle")
    beside = "the data that this corpus is made from, and make it again, that" if corpus else "the data set that"
    assert f"say in rynnvla_columns.json beside {beside}" in said
