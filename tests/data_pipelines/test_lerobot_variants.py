"""LeRobot data sets as other converters write them: read as they are, by the reader and by `validate`."""

import json
import pickle
import re
import shlex
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import parquet_pictures
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.run import validate
from data_pipelines.sources import open_source
from data_pipelines.video import probe
from rynnvla_jax.cli import main as cli
from rynnvla_jax.cli.data_source import data_config
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.convert.foreign import safetensors_header
from tests.recordings import encoded, grey_ramp, numbers_of, write_lerobot, write_libero, write_video

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


PLAIN = DataConfig()


def load(root, views=("front",), config=PLAIN):
    return open_source(f"lerobot:{root}", config, views, progress=False)


def check(root, config=PLAIN):
    findings = Findings()
    validate(f"lerobot:{root}", findings, config, progress=False)
    return findings


def said(findings):
    return {(f.severity, f.check) for f in findings.found if f.check not in ("constant", "range", "task", "short")}


def check_content(episodes, lengths=(5, 6), views=("front",)):
    """Every row and frame is that of its number in the whole data set."""
    assert episodes.lengths.tolist() == list(lengths)
    first = 0
    for episode in episodes:
        steps = np.arange(len(episode))
        np.testing.assert_allclose(episode.state[:, 0], first + steps)
        np.testing.assert_allclose(episode.action[:, 0], first + steps + 0.5)
        for view in views:
            assert numbers_of(episode.frames(view, steps)) == (first + steps).tolist()
        first += len(episode)


def change_table(path, column, change):
    table = pq.read_table(path)
    values = table[column].to_pylist()
    change(values)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_versions(tmp_path, version):
    root = write_lerobot(tmp_path / "set", version=version)
    check_content(load(root))
    assert not said(check(root))


def test_gr00t_without_frame_index_and_time_from_the_first_step(tmp_path):
    """A second camera is declared, but there are no files of it."""
    root = write_lerobot(
        tmp_path / "set", version="v2.0", without=("frame_index", "index"), first_time=1 / 30, videos=(FRONT, "top")
    )
    for path in root.rglob("top/*.mp4"):
        path.unlink()
    check_content(load(root))
    assert load(root, None).views == ("front",)
    findings = check(root)
    assert (
        said(findings) == {("warning", "camera")} and "top is declared but has no pictures" in findings.found[0].message
    )
    used = check(root, data_config(["--config.data.wrist=top"]))
    assert ("error", "file reference") in said(used)
    assert load(root, None, data_config(["--config.data.wrist=top"])).views == ("front",)


@pytest.mark.parametrize("version", ["v2.0", "v3.0"])
def test_other_names_of_state_and_action(tmp_path, version):
    root = write_lerobot(tmp_path / "set", version=version, names=("state", "actions"))
    for key, other in (("observation.state", "lerobot.state=state"), ("action", "lerobot.action=actions")):
        config = data_config([] if key == "observation.state" else ["--config.data.lerobot.state=state"])
        for look in (load, check):
            with pytest.raises(DataError, match=f"no feature {key}.*; .* set --config.data.{other}"):
                look(root, config=config)
    config = data_config(["--config.data.lerobot.state=state", "--config.data.lerobot.action=actions"])
    check_content(load(root, config=config))
    assert not said(check(root, config))
    assert load(root, config=config).columns.action[-1].name == "gripper"


def test_names_that_could_be_several_are_listed(tmp_path):
    root = write_lerobot(tmp_path / "set", names=("state.left", "state.right"))
    with pytest.raises(
        DataError, match="no feature observation.state.*; set .*lerobot.state to one of state.left, state.r"
    ):
        load(root)


def test_templates_of_v3_in_v2(tmp_path):
    root = write_lerobot(
        tmp_path / "set",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/chunk-{chunk_index:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    check_content(load(root))
    assert not said(check(root))


@pytest.mark.parametrize("change", [lambda i: i + 100 * (i > 6), lambda i: i % 5])
def test_gaps_and_restarts_of_index_are_one_warning(tmp_path, capsys, change):
    lengths = (5, 6, 4)
    root = write_lerobot(tmp_path / "set", lengths, "v3.0")
    number = "data/chunk-000/file-000.parquet"
    change_table(root / number, "index", lambda values: values.__init__([change(i) for i in values]))
    check_content(load(root), lengths)
    assert "column index does not count on in " in capsys.readouterr().err
    findings = check(root)
    assert said(findings) == {("warning", "index")} and len([f for f in findings.found if f.check == "index"]) == 1
    assert findings.exclude("x")[0] == {"episodes": {"x": []}}


def test_episodes_that_were_deleted_leave_a_gap(tmp_path):
    """Their numbers and rows are gone; the others keep theirs."""
    root = write_lerobot(tmp_path / "set", (5, 6, 4), total_episodes=2, total_frames=9)
    for path in root.rglob("episode_000001.*"):
        path.unlink()
    lines = (root / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join([lines[0], lines[2]]), encoding="utf-8")
    episodes = load(root)
    assert [e.name for e in episodes] == ["episode_000000", "episode_000002"]
    assert numbers_of(episodes[1].frames("front", range(4))) == [11, 12, 13, 14]
    findings = check(root)
    assert said(findings) == {("warning", "episode_index")} and findings.exclude("x")[0] == {"episodes": {"x": []}}


@pytest.mark.parametrize("as_floats", [False, True])
def test_one_episode_without_a_camera_can_be_left_out(tmp_path, as_floats):
    """pandas writes the column as floats then, with a NaN."""
    lengths = (5, 6, 4)
    root = write_lerobot(tmp_path / "set", lengths, "v3.0", videos=(FRONT, WRIST))
    for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):

        def empty(values):
            values[:] = [float(v) if as_floats else v for v in values]
            values[1] = float("nan") if as_floats else None

        change_table(root / EPISODES, f"videos/{WRIST}/{name}", empty)
    check_content(load(root), lengths)
    with pytest.raises(DataError, match=rf"row 1: videos/{WRIST}/chunk_index is empty, so episode_000001 .*--fix"):
        load(root, ("front", "wrist"))
    findings = check(root)
    content, rest = findings.exclude(f"lerobot:{root}")
    assert content["episodes"] == {f"lerobot:{root}": ["episode_000001"]} and not rest
    path = tmp_path / "out.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    config = DataConfig(exclude=str(path))
    kept = load(root, ("front", "wrist"), config)
    assert [e.name for e in kept] == ["episode_000000", "episode_000002"]
    assert numbers_of(kept[1].frames("front", range(4))) == [11, 12, 13, 14]
    assert not check(root, config).errors


def test_lfs_pointers_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    for pattern, views in (("*.mp4", ("front",)), ("data/**/*.parquet", ()), ("meta/info.json", ())):
        root = write_lerobot(tmp_path / pattern[:4], version="v3.0")
        (path,) = root.glob(f"**/{pattern}")
        path.write_bytes(pointer)
        with pytest.raises(DataError, match=f"{path.name} .*is a Git LFS pointer, not the file: run `git lfs pull`"):
            load(root, views)
        if path.suffix != ".json":
            assert any("is a Git LFS pointer" in f.message for f in check(root).found)
    for name in ("a.hdf5", "model.safetensors"):
        (tmp_path / name).write_bytes(pointer)
    with pytest.raises(DataError, match="a.hdf5 is a Git LFS pointer.*git lfs pull"):
        open_source(f"hdf5:{tmp_path}/a.hdf5", PLAIN, (), progress=False)
    with pytest.raises(ConversionError, match=r"model.safetensors is a Git LFS pointer.*git lfs pull"):
        safetensors_header(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="clip 7 is a Git LFS pointer"):
        probe("clip 7", pointer)


# --- pictures in Parquet -------------------------------------------------------------------------------------------

LIBERO = [f"--config.data.{pair}" for pair in ("lerobot.state=state", "lerobot.action=actions")]
LIBERO += ["--config.data.front=image", "--config.data.wrist=wrist_image"]


@pytest.mark.parametrize("plain", [False, True])
def test_libero_as_openpi_writes_it(tmp_path, plain):
    root, config = write_libero(tmp_path / "set", (20, 6), widths=(7, 7)), data_config(LIBERO)
    if plain:  # the bytes alone, without a struct
        for path in root.rglob("*.parquet"):
            for key in ("image", "wrist_image"):
                change_table(path, key, lambda values: values.__init__([v["bytes"] for v in values]))
    episodes = load(root, ("front", "wrist"), config)
    check_content(episodes, (20, 6))
    assert numbers_of(episodes[1].frames("wrist", [5, 0, 5])) == [26, 21, 26]  # in any order, and twice
    assert episodes.frame_sizes.keys() == {(32, 32)} and load(root, None, config).views == ("front", "wrist")
    with pytest.raises(IndexError, match="20 is outside the episode's 20 rows"):
        episodes[0].frames("front", [20])
    copied = pickle.loads(pickle.dumps(episodes.read))(1)  # as a worker process reads it
    assert numbers_of(copied.frames("front", [3])) == [23]
    findings = check(root, config)
    assert not said(findings) and findings.looked_at["frames"] == 52


def test_the_remedy_for_one_camera_is_named(tmp_path):
    root = write_lerobot(tmp_path / "set", videos=(FRONT, "top"))
    remedy = "set --config.data.wrist to one of .*top, or set --config.sequence.use_wrist_frame=False"
    with pytest.raises(ConfigError, match=f"data.wrist is 'observation.images.wrist', which .*; {remedy}"):
        load(root, ("front", "wrist"))
    with pytest.raises(ConfigError, match="set --config.data.front to one of .*front, top$"):
        load(root, config=data_config(["--config.data.front=side"]))


def test_pictures_of_v3_share_a_file(tmp_path):
    root = write_lerobot(tmp_path / "set", version="v3.0", videos=(WRIST,), pictures=(FRONT,))
    check_content(load(root, ("front", "wrist")))
    assert load(root, ("wrist", "front"))[0].views.keys() == {"front", "wrist"}
    assert not said(check(root))


def test_a_picture_that_is_damaged_is_named_and_can_be_left_out(tmp_path):
    root, config = write_libero(tmp_path / "set", (5, 6, 4), widths=(7, 7)), data_config(LIBERO)
    path = root / "data/chunk-000/episode_000001.parquet"

    def damage(values):
        values[2] = values[2] | {"bytes": values[2]["bytes"][:40]}
        values[3] = values[3] | {"bytes": None}
        values[4] = values[4] | {"bytes": encoded(grey_ramp(1, 16)[0])}

    change_table(path, "wrist_image", damage)
    episode = load(root, ("front", "wrist"), config)[1]
    for step, what in (
        (2, "not a readable image"),
        (3, "no bytes of a picture"),
        (4, "16 x 16 pixels, others 32 x 32"),
    ):
        with pytest.raises(
            DataError, match=f"episode_000001.parquet: wrist_image at row {step} .*{what}.*leave the ep"
        ):
            episode.frames("wrist", [step])
    assert numbers_of(episode.frames("wrist", [0, 5])) == [6, 11]
    findings = check(root, config)
    assert {(f.check, f.index, *f.episodes) for f in findings.found if f.severity == "error"} == {
        ("picture", 2, "episode_000001")  # of consecutive faults the first
    }
    content, rest = findings.exclude(f"lerobot:{root}")
    (tmp_path / "out.json").write_text(json.dumps(content), encoding="utf-8")
    config = replace(config, exclude=str(tmp_path / "out.json"))
    assert not rest and len(load(root, ("wrist",), config)) == 2 and not check(root, config).errors


def test_a_column_without_pictures_is_named(tmp_path):
    root, config = write_libero(tmp_path / "set", widths=(7, 7)), data_config(LIBERO)
    change_table(root / "data/chunk-000/episode_000001.parquet", "image", lambda values: values.__init__([1] * 6))
    with pytest.raises(DataError, match="episode_000001.parquet: image is int64, not pictures"):
        load(root, ("front",), config)
    assert ("error", "picture") in said(check(root, config))


def test_only_a_few_rows_of_pictures_are_held(tmp_path):
    """However large a row group is: the rows around the last one, of a few columns."""
    root = write_libero(tmp_path / "set", (100,), widths=(7, 7))
    path = root / "data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=1000)
    (episode,) = load(root, ("front",), data_config(LIBERO))
    parquet_pictures.close_files()
    episode.frames("front", [70, 3])
    (reader,) = parquet_pictures._local.readers.values()
    assert len(reader._rows) <= 16 and reader._first == 64  # in order of the file
    parquet_pictures.close_files()


# --- joined videos -------------------------------------------------------------------------------------------------


def write_joined(path, lengths, gap, codec="libx264"):
    """Parts of a video, `gap` seconds further apart than their frames are; the brightness of a frame is its number."""
    base = Fraction(1, 90000)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=30, options={"g": "4", "crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 32, 32, "yuv420p", base
        first = 0
        for part, length in enumerate(lengths):
            for i, pixels in enumerate(grey_ramp(length, first=first)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = round(((first + i) / 30 + part * gap) / base), base
                out.mux(stream.encode(frame))
            first += length
        out.mux(stream.encode(None))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("gap", [0.002, 0.01])
def test_joined_parts_are_numbered_by_count(tmp_path, codec, gap):
    """Times would make the later episodes begin a picture early, or find no room for the last ones."""
    lengths = (4, 3, 5, 4, 4, 3, 4, 5, 4, 4, 3, 4, 5)
    root = write_lerobot(tmp_path / "set", lengths, "v3.0")
    (path,) = root.rglob("*.mp4")
    write_joined(path, lengths, gap, codec)
    for name, after in (("from_timestamp", 0), ("to_timestamp", 1)):

        def late(values, after=after):
            values[:] = [v + gap * (i + after) for i, v in enumerate(values)]

        change_table(root / EPISODES, f"videos/{FRONT}/{name}", late)
    episodes = load(root)
    assert episodes[0].views["front"].times is not None
    check_content(episodes, lengths)
    for number in (12, 3):  # seeking, too
        first = sum(lengths[:number])
        assert numbers_of(episodes[number].frames("front", [2, 0])) == [first + 2, first]
    check_content(pickle.loads(pickle.dumps(episodes)), lengths)
    findings = check(root)
    assert not findings.errors and findings.looked_at["frames"] == sum(lengths)
    assert findings.exclude("x")[0] == {"episodes": {"x": []}}


def test_joined_parts_of_which_one_is_left_out(tmp_path):
    lengths = (4, 3, 5)
    root = write_lerobot(tmp_path / "set", lengths, "v3.0")
    (path,) = root.rglob("*.mp4")
    write_joined(path, lengths, 0.02)
    change_table(root / EPISODES, f"videos/{FRONT}/from_timestamp", lambda v: v.__init__([v[0], 77.0, v[2] + 0.04]))
    (tmp_path / "out.json").write_text(
        json.dumps({"episodes": {f"lerobot:{root}": ["episode_000001"]}}), encoding="utf-8"
    )
    config = DataConfig(exclude=str(tmp_path / "out.json"))
    assert numbers_of(load(root, config=config)[1].frames("front", range(5))) == [7, 8, 9, 10, 11]
    assert not check(root, config).errors


def test_a_joined_video_with_other_frames_than_rows_is_not_counted(tmp_path):
    lengths = (4, 3, 5)
    root = write_lerobot(tmp_path / "set", lengths, "v3.0")
    (path,) = root.rglob("*.mp4")
    write_joined(path, (4, 3, 4), 0.0)
    with pytest.raises(DataError, match="has 11 frames but 12 are needed"):
        load(root)
    assert {f.episodes for f in check(root).found if f.severity == "error"} == {("episode_000002",)}


def test_times_that_are_regular_need_no_list(tmp_path):
    root = write_lerobot(tmp_path / "set", version="v3.0")
    assert all(e.views["front"].times is None for e in load(root))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_videos_of_telephones_are_upright(tmp_path, degrees):
    """The picture is stored lying, with the angle by which it is to be turned; its upper left corner is bright."""
    upright = np.zeros((48, 32, 3) if degrees % 180 else (32, 48, 3), np.uint8)
    upright[:12, :12] = 255
    (tmp_path / "clips").mkdir()
    with av.open(str(tmp_path / "clips" / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        lying = np.ascontiguousarray(np.rot90(upright, -degrees // 90))
        for _ in range(6):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        out.mux(stream.encode(None))
    (tmp_path / "clips" / "captions.csv").write_text("file,caption\na.mp4,wave\n", encoding="utf-8")
    episodes = open_source(f"clips:{tmp_path}/clips", PLAIN, None, progress=False)
    assert list(episodes.frame_sizes) == [upright.shape[:2]]
    frames = episodes[0].frames("front", [0, 5])
    assert np.abs(frames.astype(int) - upright).mean() < 10 and frames.shape == (2, *upright.shape)


def test_the_camera_of_another_view_is_no_remedy(tmp_path):
    """Of one camera: it is the front one, and stays so."""
    root = write_lerobot(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"observation\.images\.front; set --config\.sequence\.use_wrist_frame=False"):
        open_source(f"lerobot:{root}", DataConfig(), ("front", "wrist"), progress=False)
    with pytest.raises(ConfigError, match=r"set --config\.data\.front to one of observation\.images\.front$"):
        open_source(f"lerobot:{root}", DataConfig(front="top"), ("front",), progress=False)


def test_the_command_for_an_episode_without_a_video_knows_the_cameras(tmp_path, capsys):
    cameras = ("observation.images.front", "observation.images.hand")
    root = write_lerobot(tmp_path / "set", version="v3.0", videos=cameras)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1] |= {f"videos/{cameras[1]}/{n}": None for n in ("chunk_index", "file_index", "from_timestamp")}
    pq.write_table(pa.Table.from_pylist(rows), file)
    config, views = DataConfig(wrist=cameras[1]), ("front", "wrist")
    with pytest.raises(DataError) as refused:
        open_source(f"lerobot:{root}", config, views, progress=False)
    command = re.search(r"`rynnvla (.*)` writes", str(refused.value))[1].replace("OUT.json", f"{tmp_path}/out.json")
    assert cli.main(shlex.split(command)) == 1
    found = open_source(f"lerobot:{root}", replace(config, exclude=f"{tmp_path}/out.json"), views, progress=False)
    assert [e.name for e in found] == ["episode_000000"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("fault", ["no length", "twice"])
def test_what_leaving_out_does_not_mend_is_in_no_exclude_file(version, fault, tmp_path, capsys):
    root = write_lerobot(tmp_path / "set", version=version)
    v3 = version == "v3.0"
    file = root / ("meta/episodes/chunk-000/file-000.parquet" if v3 else "meta/episodes.jsonl")
    sound = (
        pq.read_table(file).to_pylist()
        if v3
        else [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    )

    def write(rows):
        if v3:
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    write([*sound, sound[1]] if fault == "twice" else [sound[0], sound[1] | {"length": None}])
    out = tmp_path / "out.json"
    assert cli.main(["data", "validate", f"lerobot:{root}", "--fix", str(out)]) == 1
    said = capsys.readouterr().out
    assert ("keep one entry" if fault == "twice" else "length is null, not a whole number; correct it") in said
    assert "leaving episodes out does not remove this fault" in said
    with pytest.raises(DataError, match="keep one entry" if fault == "twice" else "correct it"):
        open_source(f"lerobot:{root}", DataConfig(exclude=str(out)), (), progress=False)
    write(sound)  # corrected, or one entry kept
    assert len(open_source(f"lerobot:{root}", DataConfig(), (), progress=False)) == 2


def test_metadata_that_were_cut_off_are_copied_again(tmp_path):
    """They describe all episodes, so that none can be left out."""
    root = write_lerobot(tmp_path / "set", version="v3.0")
    for name, remedy in (("meta/tasks.parquet", "; copy it again$"), ("data/chunk-000/file-000.parquet", "--fix OUT")):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:-10])
        with pytest.raises(DataError, match=remedy):
            open_source(f"lerobot:{root}", DataConfig(), (), progress=False)
        (root / name).write_bytes(content)


def test_a_video_at_another_rate_than_its_rows(tmp_path):
    """Correcting the rate of the metadata would only move the fault to the time stamps."""
    root = write_lerobot(tmp_path / "set")
    (video,) = root.rglob("episode_000001.mp4")
    write_video(video, grey_ramp(6), rate=25)
    with pytest.raises(DataError, match="encode the video again at the rate of the rows, or leave its episodes out"):
        open_source(f"lerobot:{root}", DataConfig(), ("front",), progress=False)
    out = tmp_path / "out.json"
    assert cli.main(["data", "validate", f"lerobot:{root}", "--fix", str(out)]) == 1
    assert len(open_source(f"lerobot:{root}", DataConfig(exclude=str(out)), ("front",), progress=False)) == 1
    write_video(video, grey_ramp(6), rate=30)
    assert len(open_source(f"lerobot:{root}", DataConfig(), ("front",), progress=False)) == 2


def test_a_list_of_episodes_of_other_data_is_said_to_leave_out_nothing(tmp_path, capsys):
    root, listed = write_lerobot(tmp_path / "moved"), tmp_path / "bad.json"
    listed.write_text(json.dumps({"episodes": {"lerobot:/before": ["episode_000001"]}}), encoding="utf-8")
    config = DataConfig(exclude=str(listed))
    assert len(open_source(f"lerobot:{root}", config, (), progress=False)) == 2
    assert f"nothing is left out; data.exclude {listed} is about lerobot:/before" in capsys.readouterr().err
    listed.write_text(json.dumps({"episodes": {f"lerobot:{root}": ["episode_000001"]}}), encoding="utf-8")
    assert len(open_source(f"lerobot:{root}", config, (), progress=False)) == 1
    assert "nothing is left out" not in capsys.readouterr().err
