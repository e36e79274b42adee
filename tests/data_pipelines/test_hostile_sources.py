"""Damaged data sets of every kind but LeRobot: refused in one line, by the reader and by `validate`."""

import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import video
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.run import validate
from data_pipelines.sources import hdf5_files, open_source
from data_pipelines.sources.exclude import left_out
from rynnvla_jax.config import DataConfig, RLDSConfig
from tests import recordings
from tests.hostile import attempt, changed, damaged, examples, json_files

CONFIG = DataConfig(rlds=RLDSConfig(fps=5.0))


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def read(source):
    """Everything that training reads of the first episodes."""
    hdf5_files.close_files()  # of the example before
    episodes = open_source(source, CONFIG, None, progress=False)
    for number in range(min(len(episodes), 3)):
        episode = episodes[number]
        assert len(episode) == episodes.lengths[number] > 0 and episode.text(0).strip()
        if episode.action.shape[1]:
            assert np.isfinite(episode.chunk(0, 3)).all()
        for view in episode.views:
            episode.frames(view, [0, len(episode) - 1])
    return episodes


def check(source):
    findings = Findings()
    validate(source, findings, CONFIG, progress=False)
    assert not [f for f in findings.found if "\n" in f.message]
    return findings


def refused(source):
    found, findings = attempt(read, source), attempt(check, source)
    assert found is None or findings is not None
    return found is None


def try_bytes(source, file, number, spread=None):
    sound = file.read_bytes()

    @examples(number)
    @given(damaged(sound, spread))
    def try_it(content):
        file.write_bytes(content)
        refused(source)

    try:
        try_it()
    finally:
        file.write_bytes(sound)
    assert not refused(source)


# --- video -----------------------------------------------------------------------------------------------------------


def test_videos_in_memory(tmp_path):
    recordings.write_video(tmp_path / "a.mp4", recordings.grey_ramp(6))
    sound = (tmp_path / "a.mp4").read_bytes()

    def frames(content):
        clip = video.probe("clip", content)
        return clip.frames([0, clip.count - 1]) if clip.count > 0 else None

    assert frames(sound).shape == (2, 32, 32, 3)

    @examples(40)
    @given(damaged(sound))
    def try_it(content):
        attempt(frames, content)

    try_it()


def test_a_video_of_too_many_pixels(tmp_path, monkeypatch):
    """By its header, and by its stream where the header says something else."""
    path = tmp_path / "a.mp4"
    recordings.write_video(path, recordings.grey_ramp(4))
    monkeypatch.setitem(video.LIMITS, "max_pixels", "1000")
    with pytest.raises(DataError, match=r"a.mp4: frame 3 cannot be decoded"):
        video.whole_clip(path)
    monkeypatch.setattr("rynnvla_jax.images.MAX_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a.mp4 has 32 x 32 pixels; pictures of 1 to 1,000 pixels"):
        video.probe(str(path), path.read_bytes())


# --- HDF5 ------------------------------------------------------------------------------------------------------------


def test_bytes_of_hdf5(tmp_path):
    file = recordings.write_hdf5(tmp_path / "set" / "0.hdf5", 6)
    try_bytes(f"hdf5:{tmp_path}/set", file, 40)


def test_bytes_of_egodex(tmp_path):
    file, _ = recordings.write_egodex(tmp_path / "set", 6)
    try_bytes(f"egodex:{tmp_path}/set", file, 30)
    try_bytes(f"egodex:{tmp_path}/set", file.with_suffix(".mp4"), 10)


ATTRIBUTES = (
    *("", " ", "x", "1", "2", "3", b"\xff", b"", "\ud800".encode("utf-8", "surrogatepass"), 1, 1.5, float("nan"), True),
    *(np.zeros(0), np.zeros((2, 2)), np.array([b"a", b"\xff"]), h5py.Empty("f"), 2**63 - 1, -1),
)  # fmt: skip
DATASETS = (
    *(None, 1.0, "text", np.zeros(0), np.zeros(6), np.zeros((6, 6)), np.zeros((6, 5)), np.zeros((6, 7))),
    *(np.zeros((5, 6)), np.zeros((6, 6, 1)), np.full((6, 6), np.nan), np.full((6, 6), 1e300), np.zeros((6, 6), bool)),
    *(np.zeros((6, 6), complex), np.zeros((6, 4, 4)), np.zeros((6, 32, 32, 3), np.uint8), np.zeros((0, 6))),
    *(np.zeros(6, [("a", float)]), np.array([b"x"] * 6), "group", "link", "outside", "huge", "empty"),
    *(np.zeros((6, 0, 0, 3), np.uint8), np.arange(6) * 1e-320, np.full(6, np.inf)),
)  # fmt: skip


def put(content, name, value):
    if name in content:
        del content[name]
    if value is None:
        return
    if isinstance(value, str) and value == "group":
        content.create_group(name)
    elif isinstance(value, str) and value == "link":
        content[name] = h5py.SoftLink("/nowhere")
    elif isinstance(value, str) and value == "outside":
        content[name] = h5py.ExternalLink("/etc/passwd", "/x")
    elif isinstance(value, str) and value == "huge":
        content.create_dataset(name, (2**40, 6), np.float32, chunks=(1024, 6))
    elif isinstance(value, str) and value == "empty":
        content[name] = h5py.Empty("f")
    else:
        content[name] = value


@pytest.mark.parametrize("kind", ["hdf5", "egodex"])
def test_content_of_hdf5(kind, tmp_path):
    """Attributes and datasets of every type and shape."""
    if kind == "hdf5":
        file = recordings.write_hdf5(tmp_path / "set" / "0.hdf5", 6)
        attributes = ("language_instruction", "rynnvla_unit")
        datasets = ("obs/state", "action", "timestamp", "obs/front_image", "obs/wrist_image", "obs")
    else:
        file, _ = recordings.write_egodex(tmp_path / "set", 6)
        attributes = ("llm_description", "llm_description2", "which_llm_description")
        datasets = ("transforms/camera", "transforms/leftHand", "transforms/rightHand", "transforms")
    sound, source = file.read_bytes(), f"{kind}:{tmp_path}/set"
    change = st.one_of(
        st.tuples(st.just("attribute"), st.sampled_from(attributes), st.integers(0, len(ATTRIBUTES) - 1)),
        st.tuples(st.just("dataset"), st.sampled_from(datasets), st.integers(0, len(DATASETS) - 1)),
        st.tuples(st.just("dataset"), st.sampled_from(datasets), st.integers(0, len(DATASETS) - 1)),
    )

    @examples(30)
    @given(st.lists(change, min_size=1, max_size=2))
    def try_it(changes):
        file.unlink(missing_ok=True)  # a new file: HDF5 knows files that are open by their inode
        file.write_bytes(sound)
        with h5py.File(file, "a") as content:
            for what, name, number in changes:
                if what == "attribute":
                    content.attrs[name] = ATTRIBUTES[number]
                elif not isinstance(content.get(name.split("/")[0]), h5py.Dataset | None) or "/" not in name:
                    put(content, name, DATASETS[number])
        refused(source)

    try_it()


def test_a_dataset_that_claims_more_than_it_stores(tmp_path):
    file = recordings.write_hdf5(tmp_path / "set" / "0.hdf5", 6)
    with h5py.File(file, "a") as content:
        put(content, "action", "huge")
    with pytest.raises(DataError, match=r"0.hdf5: action claims .* bytes but stores"):
        read(f"hdf5:{tmp_path}/set")


def test_an_attribute_of_a_type_that_ends_the_process(tmp_path):
    """One byte of a text's type: HDF5 2.0, which h5py 3.16 brings along, crashes where such an attribute is read."""
    file = recordings.write_hdf5(tmp_path / "set" / "0.hdf5", 6)
    content = bytearray(file.read_bytes())
    kind = content.index(b"language_instruction\0") + len(b"language_instruction") + 4  # of a list of texts
    assert content[kind : kind + 2] == b"\x19\x01"
    content[kind + 1] = 0xAE
    file.write_bytes(content)
    with pytest.raises(DataError, match="0.hdf5: attribute language_instruction is no text; write it again"):
        read(f"hdf5:{tmp_path}/set")


def test_task_data(tmp_path):
    for i in range(2):
        recordings.write_hdf5(tmp_path / f"{i}.hdf5", 5)
    file = tmp_path / "train.json"
    document = {
        "task_data": {"a": {"data_path": ["0.hdf5"], "instructions": ["go"]}, "b": ["1.hdf5"]},
        "rynnvla_unit": "degrees",
    }
    file.write_text(json.dumps(document), encoding="utf-8")
    assert not refused(f"hdf5:{file}")

    @examples(30)
    @given(json_files(document))
    def try_it(content):
        file.write_bytes(content)
        refused(f"hdf5:{file}")

    try_it()


# --- CALVIN ----------------------------------------------------------------------------------------------------------


def test_bytes_of_calvin(tmp_path):
    root = recordings.write_calvin(tmp_path / "set")
    try_bytes(f"calvin:{root}", root / "lang_annotations" / "auto_lang_ann.npy", 40)
    try_bytes(f"calvin:{root}", root / "episode_0000003.npz", 25)


def test_annotations_of_calvin(tmp_path):
    root = recordings.write_calvin(tmp_path / "set")
    document = {
        "language": {"ann": ["open", "lift"], "task": ["a"]},
        "info": {"indx": [[3, 8], [8, 12]]},
    }

    @examples(30)
    @given(changed(document))
    def try_it(content):
        array = np.empty((), object)
        array[()] = content
        np.save(root / "lang_annotations" / "auto_lang_ann.npy", array, allow_pickle=True)
        refused(f"calvin:{root}")

    try_it()


def test_arrays_of_calvin(tmp_path):
    root = recordings.write_calvin(tmp_path / "set")
    file = root / "episode_0000004.npz"
    sound = dict(np.load(file))
    values = (None, *[v for v in DATASETS if isinstance(v, np.ndarray) and v.dtype.names is None])
    for key in ("robot_obs", "actions", "rgb_static", "rgb_gripper"):
        for value in values:
            content = sound | {key: value}
            np.savez(file, **{k: v for k, v in content.items() if v is not None})
            refused(f"calvin:{root}")


# --- RLDS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_rlds_metadata(name, tmp_path):
    root = recordings.write_rlds(tmp_path / "set", lengths=(3, 4), shards=1)
    file = root / name
    sound = file.read_bytes()

    @examples(25)
    @given(json_files(json.loads(sound)))
    def try_it(content):
        file.write_bytes(content)
        refused(f"rlds:{root}")

    try_it()
    file.write_bytes(sound)
    assert not refused(f"rlds:{root}")


def test_bytes_of_rlds(tmp_path):
    root = recordings.write_rlds(tmp_path / "set", lengths=(3, 4), shards=1)
    (file,) = root.glob("*array_record*")
    used = len(file.read_bytes()[: 2**16].rstrip(b"\0"))
    try_bytes(f"rlds:{root}", file, 25, used)


def test_bytes_of_tfrecord(tmp_path):
    root = recordings.write_rlds(tmp_path / "set", lengths=(3, 4), shards=1, kind="tfrecord")
    (file,) = root.glob("*tfrecord*")
    try_bytes(f"rlds:{root}", file, 25)


def test_bytes_of_libero(tmp_path):
    file = recordings.write_libero_hdf5(tmp_path / "set" / "a.hdf5", (3, 2), size=(8, 8))
    try_bytes(f"libero:{tmp_path}/set", file, 40)


def test_a_picture_of_rlds_with_too_many_pixels(tmp_path, monkeypatch):
    root = recordings.write_rlds(tmp_path / "set", lengths=(3,), shards=1)
    monkeypatch.setattr("rynnvla_jax.images.MAX_PIXELS", 100)
    with pytest.raises(DataError, match="frame 2 cannot be decoded .*has 24 x 32 pixels"):
        read(f"rlds:{root}")


# --- clips, and what leaves episodes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions(kind, tmp_path):
    root = recordings.write_clips(tmp_path / "set", {"a/0.mp4": "one", "a/1.mp4": "two"}, kind, counts=(4, 3))
    try_bytes(f"clips:{root}", root / f"captions.{kind}", 25)


def test_lines_of_captions(tmp_path):
    root = recordings.write_clips(tmp_path / "set", {"a/0.mp4": "one", "a/1.mp4": "two"}, "jsonl", counts=(4, 3))
    rows = [{"file": "a/0.mp4", "caption": "one"}, {"file": "a/1.mp4", "caption": "two"}]

    @examples(25)
    @given(changed(rows))
    def try_it(value):
        lines = value if isinstance(value, list) else [value]
        (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        refused(f"clips:{root}")

    try_it()


def test_exclude(tmp_path):
    file = tmp_path / "exclude.json"

    @examples(40)
    @given(json_files({"episodes": {"lerobot:/a": ["x", "y"], "hdf5:/b": []}}))
    def try_it(content):
        file.write_bytes(content)
        attempt(left_out, "lerobot:/a", str(file))

    try_it()
