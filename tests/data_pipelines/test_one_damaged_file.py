"""One damaged file among good ones, of every kind: `validate` names it with a remedy, and `--fix` leaves it out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.corpus import records
from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import DataConfig
from tests.recordings import (
    grey_ramp,
    halved,
    write_calvin,
    write_clips,
    write_egodex,
    write_hdf5,
    write_lerobot,
    write_libero_hdf5,
    write_rlds,
    write_video,
)

LENGTHS = (5, 6, 7)
FRONT = "observation.images.front"
VIDEO = f"videos/chunk-000/{FRONT}/episode_{{:06d}}.mp4"
ROWS = "data/chunk-000/episode_{:06d}.parquet"
EPISODES = ["episode_000000", "episode_000001", "episode_000002"]


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lerobot(root):
    return f"lerobot:{write_lerobot(root, LENGTHS)}", EPISODES


def in_parquet(root):
    names = ("observation.state", "action")
    return f"lerobot:{write_lerobot(root, LENGTHS, 'v2.0', names, pictures=(FRONT,), videos=())}", EPISODES


def egodex(root):
    for i in range(3):
        write_egodex(root, 6 + i, name=str(i))
    return f"egodex:{root}", [f"part1/lift/{i}" for i in range(3)]


def calvin(root):
    write_calvin(root, ((0, 3, "open the drawer"), (4, 8, "lift the block"), (9, 12, "turn the switch")))
    return f"calvin:{root}", ["window_000000", "window_000001", "window_000002"]


def tfrecord(root):
    write_rlds(root, (3, 4, 5, 6), 2, kind="tfrecord")
    return f"rlds:{root}", [f"train_{i:06d}" for i in range(4)]


def arrayrecord(root):
    write_rlds(root, (3, 4, 5, 6), 2)
    return f"rlds:{root}", [f"train_{i:06d}" for i in range(4)]


def hdf5(root):
    for i in range(3):
        write_hdf5(root / "a" / f"{i}.hdf5", 20 + i)
    return f"hdf5:{root}", [f"a/{i}.hdf5" for i in range(3)]


def listed(root):
    """The same files by the JSON that lists them, which is elsewhere."""
    _, names = hdf5(root / "files")
    tasks = {"stack": {"data_path": [f"files/{name}" for name in names], "instructions": ["stack the cups"]}}
    (root / "train.json").write_text(json.dumps({"task_data": tasks}), encoding="utf-8")
    return f"hdf5:{root / 'train.json'}", [f"{i}.hdf5" for i in range(3)]


def libero(root):
    for i in range(3):
        write_libero_hdf5(root / f"{i}.hdf5", (6 + i, 4 + i))
    return f"libero:{root}", [f"{i}.hdf5/demo_{d}" for i in range(3) for d in range(2)]


def clips(root):
    write_clips(root, {f"a/{i}.mp4": f"a hand does {i}" for i in range(3)}, counts=(12, 9, 8))
    return f"clips:{root}", [f"a/{i}.mp4" for i in range(3)]


def corpus(root):
    root.mkdir()
    for i in range(3):
        write_video(root / "clip.mp4", grey_ramp(10, first=i))
        content = (root / "clip.mp4").read_bytes()
        records.write_shard(root, i, 3, [records.video_record(f"clip {i}", "a hand", 30.0, content, 10)])
    (root / "clip.mp4").unlink()
    records.finish(root, 3, {})
    return f"records:{root}", [f"clip {i}" for i in range(3)]


def in_two_files(root):
    """v3.0 with a data file and a video for the first episode, and others for the rest."""
    write_lerobot(root, LENGTHS, "v3.0")
    data, meta = root / "data/chunk-000", root / "meta/episodes/chunk-000/file-000.parquet"
    videos = root / f"videos/{FRONT}/chunk-000"
    table, first = pq.read_table(data / "file-000.parquet"), LENGTHS[0]
    for i, (start, end) in enumerate(((0, first), (first, sum(LENGTHS)))):
        pq.write_table(table.slice(start, end - start), data / f"file-{i:03d}.parquet")
        write_video(videos / f"file-{i:03d}.mp4", halved(grey_ramp(end - start, first=start)))
    rows = pq.read_table(meta).to_pylist()
    for row in rows[1:]:
        row["data/file_index"] = row[f"videos/{FRONT}/file_index"] = 1
        for key in ("from_timestamp", "to_timestamp"):
            row[f"videos/{FRONT}/{key}"] -= first / 30
    pq.write_table(pa.Table.from_pylist(rows), meta)
    return f"lerobot:{root}", EPISODES


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"\x00" * path.stat().st_size)


def missing(path):
    path.unlink()


def pointer(path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n", encoding="utf-8")


CASES = {  # how it is written, the file to damage, the episodes that need it
    "lerobot-rows-first": (lerobot, ROWS.format(0), EPISODES[:1]),
    "lerobot-rows": (lerobot, ROWS.format(1), EPISODES[1:2]),
    "lerobot-video-first": (lerobot, VIDEO.format(0), EPISODES[:1]),
    "lerobot-video": (lerobot, VIDEO.format(1), EPISODES[1:2]),
    "lerobot-pictures": (in_parquet, ROWS.format(1), EPISODES[1:2]),
    "lerobot-v3-rows-first": (in_two_files, "data/chunk-000/file-000.parquet", EPISODES[:1]),
    "lerobot-v3-rows": (in_two_files, "data/chunk-000/file-001.parquet", EPISODES[1:]),
    "lerobot-v3-video": (in_two_files, f"videos/{FRONT}/chunk-000/file-001.mp4", EPISODES[1:]),
    "egodex-poses": (egodex, "part1/lift/0.hdf5", ["part1/lift/0"]),
    "egodex-video": (egodex, "part1/lift/1.mp4", ["part1/lift/1"]),
    "calvin-first": (calvin, "episode_0000000.npz", ["window_000000"]),
    "calvin": (calvin, "episode_0000006.npz", ["window_000001"]),
    "rlds-tfrecord-first": (tfrecord, "toy-train.tfrecord-00000-of-00002", ["train_000000", "train_000001"]),
    "rlds-tfrecord": (tfrecord, "toy-train.tfrecord-00001-of-00002", ["train_000002", "train_000003"]),
    "rlds-arrayrecord-first": (arrayrecord, "toy-train.array_record-00000-of-00002", ["train_000000", "train_000001"]),
    "rlds-arrayrecord": (arrayrecord, "toy-train.array_record-00001-of-00002", ["train_000002", "train_000003"]),
    "hdf5-first": (hdf5, "a/0.hdf5", ["a/0.hdf5"]),
    "hdf5": (hdf5, "a/2.hdf5", ["a/2.hdf5"]),
    "hdf5-in-a-list": (listed, "files/a/1.hdf5", ["1.hdf5"]),
    "libero": (libero, "0.hdf5", ["0.hdf5/demo_0", "0.hdf5/demo_1"]),
    "clips-first": (clips, "a/0.mp4", ["a/0.mp4"]),
    "clips": (clips, "a/2.mp4", ["a/2.mp4"]),
    "records-first": (corpus, "corpus-train.array_record-00000-of-00003", ["clip 0"]),
    "records": (corpus, "corpus-train.array_record-00002-of-00003", ["clip 2"]),
}
UNLISTED = {"egodex-poses", "hdf5-first", "hdf5", "libero"}  # nothing tells that such a file is missing
DAMAGES = [truncated, emptied, overwritten, missing, pointer]


@pytest.mark.parametrize(
    ("case", "damage"),
    [(c, d) for c in CASES for d in DAMAGES if not (c in UNLISTED and d is missing)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_it_is_a_finding_and_can_be_left_out(case, damage, tmp_path, capsys):
    write, name, bad = CASES[case]
    source, episodes = write(tmp_path / "my data")
    file, out = tmp_path / "my data" / name, tmp_path / "fix it.json"
    damage(file)

    capsys.readouterr()
    assert cli.main(["data", "validate", source, "--json", "--fix", str(out)]) == 1
    *findings, last = map(json.loads, capsys.readouterr().out.splitlines())
    errors = [f for f in findings if f["severity"] == "error"]
    assert {e["file"] for e in errors} == {str(file)}
    for error in errors:
        remedy = error["message"].rpartition("; " if "; " in error["message"] else ": ")[2]
        assert any(words in remedy for words in ("copy", "leave", "git lfs pull", "run the command")), error
    assert last["summary"]["looked_at"]["episodes"] == len(episodes) - (write is libero)  # its file is one of them

    left = [name for name in episodes if name not in bad]
    opened = open_source(source, DataConfig(exclude=str(out)), None, progress=False)
    assert [e.name for e in opened] == left
    assert cli.main(["data", "validate", source, f"--config.data.exclude={out}"]) == 0
