"""Curation: real photographs, moved slowly under a camera, through the whole pipeline."""

import contextlib
import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.corpus import records
from data_pipelines.curate import duplicates, ledger, run
from data_pipelines.curate.captions import QwenVL, Table, check_model
from data_pipelines.curate.clips import CandidateClip, judge, process_video
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.footage import KEY_FRAMES, Footage, Span, cut, encode, write_video
from data_pipelines.curate.people import WEAK_FACE, Face, Found, Hand, People
from data_pipelines.episode import DataError
from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import DataConfig
from rynnvla_jax.storage import files
from tests import photographs

CONFIG = CurateConfig(clip_seconds=2.5, min_seconds=1.5)
OPTIONS = ["--clip-seconds=2.5", "--min-seconds=1.5", "--shards=3"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory, request):
    photographs.need_people()
    return photographs.load(Path(request.config.cache.mkdir("photographs")))


@pytest.fixture(scope="session")
def videos(photos, tmp_path_factory):
    """A folder of videos of five seconds each, some of them bad, and captions for all of them but one."""
    folder = tmp_path_factory.mktemp("videos")
    for i, (name, photograph) in enumerate(photos.items()):
        size = (240, 320) if photograph.shape[0] > photograph.shape[1] else (320, 240)
        path = folder / ("monday/early" if i % 2 else ".") / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photographs.video(photograph, 5.0, size))
    (folder / "short.mp4").write_bytes(photographs.video(photos["cup"], 1.0))
    (folder / "broken.mp4").write_bytes(b"this is not a video")
    write_captions(folder, leave_out="hand2")
    return folder


def write_captions(folder: Path, leave_out: str) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["caption", "file"])
        for path in sorted(folder.rglob("*.mp4")):
            if path.stem != leave_out:
                table.writerow([f"show the {path.stem}, please", path.relative_to(folder)])


def arguments(videos: Path, out: Path, *more: str) -> list[str]:
    captions = [] if any("caption-model" in m for m in more) else [f"--captions={videos}/captions.csv"]
    return [f"--videos={videos}/**/*.mp4", f"--out={out}", *captions, *OPTIONS, *more]


@pytest.fixture(scope="session")
def corpus(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    assert cli.main(["data", "curate", *arguments(videos, out)]) == 0
    return out


def ledger_rows(corpus: Path) -> list[dict]:
    return [row for s in range(3) for row in pq.read_table(ledger.path(corpus, s, 3)).to_pylist()]


def shards(corpus: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(corpus.glob("*.array_record-*"))}


def contents(corpus: Path) -> list[list[dict]]:
    """The records of every shard in their order. Bytes of the same record may differ between processes: protobuf."""
    features = records.CLIPS.features()
    with contextlib.ExitStack() as stack:
        readers = [ArrayRecordReader(str(p)) for p in sorted(corpus.glob("*.array_record-*"))]
        for reader in readers:
            stack.callback(reader.close)
        return [[features.deserialize_example_np(r) for r in reader.read_all()] for reader in readers]


def same(one: list[list[dict]], other: list[list[dict]]) -> bool:
    """Every field of every record, videos bit for bit."""
    assert [[r["clip_id"] for r in shard] for shard in one] == [[r["clip_id"] for r in shard] for shard in other]
    pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
    return all(np.array_equal(a[key], b[key]) for a, b in pairs for key in {*a, *b})


# People


@pytest.fixture(scope="module")
def people():
    photographs.need_people()
    return People(CONFIG)


@pytest.mark.parametrize("name, hands, faces", [
    *[(f"hand{i}", 1, 0) for i in range(3)], ("face", 0, 1), ("both", 1, 1), ("cup", 0, 0), ("cat", 0, 0)
])  # fmt: skip
def test_who_is_in_a_photograph(people, photos, name, hands, faces):
    found = people.find(photos[name])
    assert (len(found.hands), len(found.faces_that_count(CONFIG.face_score))) == (hands, faces)
    assert all(face.score >= WEAK_FACE for face in found.faces)


def test_landmarks_turn_with_the_photograph(people, photos):
    photo = photos["hand0"]
    height, width = photo.shape[:2]
    upright = people.find(photo).hands[0].points
    back = {1: lambda x, y: (width - y, x), 2: lambda x, y: (width - x, height - y), 3: lambda x, y: (y, height - x)}
    for quarter, turn in back.items():
        points = people.find(np.ascontiguousarray(np.rot90(photo, quarter))).hands[0].points
        assert np.abs(np.stack(turn(*points.T), axis=1) - upright).max() < 0.08 * np.ptp(upright, axis=0).max()


def test_a_pointing_hand(people, photos):
    """The index finger is stretched and points up, the others are bent."""
    points = people.find(photos["hand0"]).hands[0].points
    reach = np.linalg.norm(points - points[0], axis=1)
    assert points[8, 1] < points[6, 1] < points[5, 1] < points[0, 1]
    assert reach[8] > 1.3 * max(reach[12], reach[16], reach[20])


def test_judgement():
    hand, face = Hand(np.zeros((21, 2)), 1.0), Face(np.array([100.0, 100.0, 140.0, 150.0]), 1.0)
    nothing, hands, both = Found((), ()), Found((hand,), ()), Found((hand,), (face,))

    def outcome(*found, **settings):
        return judge(found, CurateConfig(**settings))[0]

    assert outcome(hands, hands, both, both) == "face"
    assert outcome(hands, hands, hands, both) == "kept"  # several frames must agree
    assert outcome(hands, hands, hands, both, max_face_share=0.0) == "face"
    assert outcome(both) == "face"  # one frame, which agrees with itself
    weak = Found((hand,), (replace(face, score=0.59),))
    assert outcome(weak, weak, weak, weak) == "kept" and outcome(weak, weak, weak, weak, face_score=0.5) == "face"
    assert outcome(hands, hands, nothing, nothing) == "kept"
    assert outcome(hands, nothing, nothing, nothing) == "no_hands"
    assert outcome(nothing, nothing, min_hand_share=0.0) == "no_hands"


def test_a_face_that_a_hand_fills_is_the_hand():
    spread = np.array([(x, y) for x in (0, 25, 50) for y in range(0, 70, 10)], np.float32)  # 21 landmarks
    hand = Hand(spread + 100, 1.0)
    same, larger = Face(np.array([95.0, 95.0, 155.0, 165.0]), 0.68), Face(np.array([60.0, 40.0, 220.0, 240.0]), 0.9)
    beside, within = (
        Face(np.array([300.0, 100.0, 350.0, 160.0]), 0.9),
        Face(np.array([110.0, 110.0, 140.0, 150.0]), 0.9),
    )
    found = Found((hand,), (same, larger, beside, within))
    assert found.faces_that_count(0.6) == [larger, beside]  # a hand that touches a face does not hide it
    assert Found((), (same,)).faces_that_count(0.6) == [same]
    frames = (Found((hand,), (same,)),) * 4
    assert judge(frames, CurateConfig()) == ("kept", "hands in 4 of 4 frames")


def test_a_hand_that_looks_like_a_face_is_kept(people, photos):
    """Bare hands score up to 0.43 as faces on these photographs as they are; the threshold is put below."""
    found = people.find(photos["hand1"])
    assert any(face.score > 0.4 for face in found.faces) and not found.faces_that_count(0.4)


# Footage


def numbered(path: Path, count: int, key_every: int, b_frames: int, rotation: int = 0, **options: str) -> Path:
    """A video at 30 fps whose frames show their number in black and white stripes."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 288, 160, "yuv420p"
        stream.options = {"g": str(key_every), "bf": str(b_frames), "sc_threshold": "0"}
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            stripes = np.repeat([255 * (number >> bit & 1) for bit in range(9)], 32).astype(np.uint8)
            pixels = np.broadcast_to(stripes[None, :, None], (160, 288, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))
        container.mux(stream.encode(None))
    return path


def number(pixels: np.ndarray) -> int:
    stripes = np.split(pixels.mean(axis=(0, 2)), 9)
    return sum(
        1 << bit for bit, stripe in enumerate(stripes) if stripe[len(stripe) // 4 : -len(stripe) // 4].mean() > 128
    )


@pytest.mark.parametrize("key_every, b_frames", [(12, 2), (250, 3), (30, 0)])
def test_frames_by_time(tmp_path, key_every, b_frames):
    path = numbered(tmp_path / "v.mp4", 200, key_every, b_frames)
    with Footage(str(path), 384) as footage:
        assert [number(f) for f in footage.at(i / 30 for i in range(200))] == list(range(200))
        for wanted in np.random.default_rng(0).integers(200, size=40):  # forwards and backwards
            assert number(next(footage.at([wanted / 30]))) == wanted


@pytest.mark.parametrize("fps, wanted", [(0.0, range(45, 90)), (10.0, range(45, 90, 3)), (60.0, range(45, 90))])
def test_a_clip_has_the_frames_of_its_span(tmp_path, fps, wanted):
    path = numbered(tmp_path / "v.mp4", 120, 50, 2)
    with Footage(str(path), 80) as footage:
        mp4, count, rate = encode(footage, Span(1, 1.5, 1.5), fps, 18)
        assert {encode(footage, Span(1, 1.5, 1.5), fps, 18)[0] for _ in range(10)} == {mp4}
    (tmp_path / "clip.mp4").write_bytes(mp4)
    with Footage(str(tmp_path / "clip.mp4"), 384) as clip:
        frames = list(clip.at(i / rate for i in range(count)))
    assert (count, float(rate)) == (len(wanted), min(fps or 30.0, 30.0))
    assert frames[0].shape == (80, 144, 3)  # the shortest edge asked for, the other in proportion
    assert [number(f) for f in frames] == list(wanted)


def test_key_frames_are_near():
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 64, 3), np.uint8)
    with av.open(io.BytesIO(write_video(iter(noise), Fraction(30), 30))) as container:
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert len(keys) > 1 and max(np.diff([*keys, 100])) <= KEY_FRAMES


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_phones_are_turned_upright(tmp_path, rotation):
    with Footage(str(numbered(tmp_path / "v.mp4", 8, 8, 0)), 384) as footage:
        plain = next(footage.at([0.2]))
    with Footage(str(numbered(tmp_path / "r.mp4", 8, 8, 0, rotation)), 384) as footage:
        turned = next(footage.at([0.2]))
    np.testing.assert_array_equal(turned, np.rot90(plain, rotation // 90))


def test_a_truncated_video_loses_its_end_only(tmp_path, people):
    whole = numbered(tmp_path / "v.mp4", 240, 30, 2, movflags="faststart").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    config = CurateConfig(clip_seconds=2.0, min_seconds=1.0)
    outcomes = [c.outcome for c in process_video(str(tmp_path / "half.mp4"), "half.mp4", people, config)]
    assert outcomes[0] == "no_hands" and outcomes[-1] == "unreadable" and len(outcomes) == 4


def test_what_is_no_video_is_unreadable(tmp_path):
    whole = numbered(tmp_path / "v.mp4", 8, 8, 0).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "codec.mp4").write_bytes(whole.replace(b"avc1", b"zzzz"))
    for name, reason in (
        ("empty", "Invalid argument"),
        ("folder", "Is a directory"),
        ("codec", "without a known codec"),
    ):
        (clip,) = process_video(str(tmp_path / f"{name}.mp4"), name, None, CONFIG)  # type: ignore[arg-type]
        assert clip.outcome == "unreadable" and f"{name}.mp4" in clip.reason and reason in clip.reason


@settings(deadline=None)
@given(st.floats(0.5, 4e3), st.floats(1.0, 60.0))
def test_cut_leaves_nothing_out(seconds, clip_seconds):
    spans = cut(seconds, clip_seconds)
    assert spans[0].start == 0
    for before, after in itertools.pairwise(spans):
        assert after.start == pytest.approx(before.start + before.seconds)
    assert spans[-1].start + spans[-1].seconds == pytest.approx(seconds)
    assert spans[0].seconds <= 1.5 * clip_seconds + 1e-9
    assert len(spans) == 1 or spans[0].seconds >= clip_seconds * 2 / 3 - 1e-9


# Captions


def test_caption_tables(tmp_path):
    import pyarrow as pa

    table = pa.table({"file": ["a.mp4", "b/c.mp4", "d.mp4"], "said": ["pick up", " put down ", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    (tmp_path / "t.csv").write_text('said,file\npick up,a.mp4\n" put down ",b/c.mp4\n,d.mp4\n', encoding="utf-8")
    clips = [CandidateClip(name, Span(0, 0.0, 1.0), "kept") for name in ("b/c.mp4", "a.mp4", "d.mp4", "e.mp4")]
    for file in ("t.parquet", "t.jsonl", "t.csv"):
        assert Table(str(tmp_path / file), "said")(clips) == ["put down", "pick up", "", ""]
        with pytest.raises(DataError, match=rf"{file} has no column 'caption', but .*said.*; set --caption-column"):
            Table(str(tmp_path / file), "caption")
    (tmp_path / "t.csv").write_text("file,said\na.mp4,one\na.mp4,two\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"two captions for a\.mp4"):
        Table(str(tmp_path / "t.csv"), "said")
    (tmp_path / "t.csv").write_text("file,said\n007,12\n", encoding="utf-8")  # digits are text, too
    assert Table(str(tmp_path / "t.csv"), "said").captions == {"007": "12"}
    for name, content, said in (
        ("t.csv", "path,said\na.mp4,one\n", "has no column 'file', but path, said; name the one"),
        ("t.csv", "file,said\na.mp4,b,c\n", "cannot be read .*; write it again, as a header and commas, in UTF-8"),
        ("t.jsonl", "{nope\n", "cannot be read .*; write it again, as one JSON object a line"),
        ("t.jsonl", '{"file": "a.mp4", "said": 3}\n', "column 'said' is int64; write it as texts"),
        ("t.parquet", "nope", "cannot be read .*; write it again, as Parquet"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            Table(str(tmp_path / name), "said")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return photographs.tiny_qwen(tmp_path_factory.mktemp("qwen"))


def test_a_batch_of_captions_is_its_clips_one_by_one(qwen):
    config = CurateConfig(samples=2, caption_tokens=8, caption_prompt="what do the hands do?")
    rng = np.random.default_rng(0)
    sizes = ((96, 128), (200, 60), (128, 128))  # as many image tokens, and so as much padding, as they please
    clips = [
        CandidateClip(str(i), Span(0, 0.0, 1.0), "kept", frames=rng.integers(0, 255, (2, *s, 3), np.uint8))
        for i, s in enumerate(sizes)
    ]
    model = QwenVL(qwen, config)
    together = model(clips)
    assert together == [model([clip])[0] for clip in clips]
    assert len(set(together)) > 1  # the frames are looked at


def test_no_model(tmp_path, capsys, videos):
    assert cli.main(["data", "curate", *arguments(videos, tmp_path / "out", f"--caption-model={tmp_path}")]) == 1
    assert "holds no config.json" in capsys.readouterr().err


def test_a_model_is_checked_before_any_work(tmp_path, qwen):
    check_model(qwen)
    folder = tmp_path / "model"
    shutil.copytree(qwen, folder)
    for name, said in (
        ("preprocessor_config.json", "holds no preprocessor_config.json; copy it again"),
        ("tokenizer.json", "holds no tokenizer.json or vocab.json; copy it again"),
        ("model.safetensors", r"holds no \*.safetensors or \*.bin; copy it again"),
    ):
        (folder / name).unlink()
        with pytest.raises(DataError, match=said):
            check_model(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(DataError, match="holds a model of the kind 'bert'; set --caption-model"):
        check_model(folder)


# The pipeline


def test_outcomes(corpus):
    outcomes: dict[str, list[str]] = {}
    for row in ledger_rows(corpus):
        outcomes.setdefault(Path(row["video"]).stem, []).append(row["outcome"])
    assert outcomes == {
        "hand0": ["kept"] * 2,
        "hand1": ["kept"] * 2,
        "hand2": ["no_caption"] * 2,
        "face": ["face"] * 2,
        "both": ["face"] * 2,
        "cup": ["no_hands"] * 2,
        "cat": ["no_hands"] * 2,
        "short": ["too_short"],
        "broken": ["unreadable"],
    }


def test_the_corpus_is_a_source(corpus, videos):
    episodes = open_source(f"records:{corpus}", DataConfig(), views=("front",), progress=False)
    assert len(episodes) == 4
    assert {e.text(0) for e in episodes} == {"show the hand0, please", "show the hand1, please"}
    for episode in episodes:
        assert len(episode) == 25 and episode.fps == 10
        path = next(videos.rglob(f"{episode.text(0).split()[2].rstrip(',')}.mp4"))
        start = 2.5 * int(episode.name.rpartition("#")[2])
        with Footage(str(path), 384) as footage:
            real = np.stack(list(footage.at([start, start + 2.4])))
        seen = episode.frames("front", [0, 24])
        assert np.abs(seen.astype(int) - real).mean() < 4


def test_the_ledger_keeps_landmarks(corpus, people, videos):
    row = next(r for r in ledger_rows(corpus) if Path(r["video"]).stem == "hand0" and r["clip"] == 1)
    path = videos / row["video"]
    with Footage(str(path), 384) as footage:
        frame = next(footage.at([row["sample_seconds"][2]]))
    points = next(h["points"] for h in row["hands"] if h["sample"] == 2)
    np.testing.assert_allclose(np.reshape(points, (21, 2)), people.find(frame).hands[0].points)
    assert (row["height"], row["width"]) == frame.shape[:2] and row["start"] == 2.5
    assert not any(found.faces_that_count(CONFIG.face_score) for found in ledger.people_of(row))
    assert [r for r in ledger_rows(corpus) if r["outcome"] == "face"][0]["faces"]
    broken = next(r for r in ledger_rows(corpus) if r["outcome"] == "unreadable")
    assert broken["video"] == "broken.mp4" and "cannot be read as a video" in broken["reason"]


def test_pages_to_judge_faces_by_eye(videos, corpus, tmp_path, capsys):
    before = shards(corpus)
    corpus = shutil.copytree(corpus, tmp_path / "corpus")
    assert cli.main(["data", "curate", *arguments(videos, corpus, "--review")]) == 0
    assert "review/001.html (1 page to judge faces by eye)" in capsys.readouterr().out and shards(corpus) == before
    page = (corpus / "review/001.html").read_text(encoding="utf-8")
    assert page.count("data-clip=") == len([r for r in ledger_rows(corpus) if r["faces"]]) > 0
    assert 'data-clip="monday/early/both.mp4#00000" data-outcome="face"' in page or "both.mp4#00000" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f'"records:{corpus}"' in page
    kept = dict(re.findall(r"<td>(0\.\d)</td><td>(\d+)</td>", page))
    outcomes = Counter(r["outcome"] for r in ledger_rows(corpus))
    assert int(kept["0.6"]) == outcomes["kept"] + outcomes["no_caption"]
    assert sorted(map(int, kept.values())) == [int(n) for n in kept.values()]  # a higher threshold keeps more


def test_the_page(corpus):
    page = (corpus / "report.html").read_text(encoding="utf-8")
    for text in (
        "show the hand0, please",
        "Dropped: a face",
        'class="bone"',
        'class="face"',
        "broken.mp4",
        "face_score",
    ):
        assert text in page
    assert "http" not in page  # self-contained


def write_ledgers(folder: Path, clips: dict[str, np.ndarray], num_shards: int = 3) -> Path:
    """A finished corpus of kept clips: samples uint8 [n, H, W, 3] by name, whose bytes are the encoded clip."""
    features = sorted(clips)
    for shard in range(num_shards):
        with ledger.written(folder, shard, num_shards, "inputs", pictures=1) as rows:
            for name in features[shard::num_shards]:
                video, _, index = name.rpartition("#")
                span = Span(int(index), 2.0 * int(index), 2.0)
                mp4 = clips[name].tobytes()
                rows.add(
                    CandidateClip(video, span, "kept", frames=clips[name], mp4=mp4, times=(0.0,) * len(clips[name]))
                )
    return folder


def test_copies_are_found_across_shards_and_the_same_place_is_no_copy(tmp_path):
    rng = np.random.default_rng(0)
    table = np.asarray(Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((320, 240)))

    def at_work(positions) -> np.ndarray:
        """A hand at these places above one and the same table."""
        frames = np.repeat(table[None], 4, axis=0)
        for frame, (top, left) in zip(frames, positions, strict=True):
            frame[top : top + 60, left : left + 50] = (200, 150, 120)
        return frames

    one = at_work([(40, 60), (60, 80), (80, 100), (100, 120)])
    other = at_work([(40, 60), (60, 80), (80, 100), (100, 90)])  # the same place and beginning, another end
    again = np.clip(one + rng.normal(0, 4, one.shape), 0, 255).astype(np.uint8)  # compressed anew
    small = np.stack([np.asarray(Image.fromarray(f).resize((200, 150))) for f in one])
    clips = {
        "a.mp4#00000": one,
        "b.mp4#00000": other,
        "c/copy.mp4#00000": one.copy(),
        "d.mp4#00000": again,
        "e.mp4#00000": small,
        "f.mp4#00001": again + 1,  # cut elsewhere
        "a.mp4#00001": at_work([(40, 200)] * 4),
        "a.mp4#00002": at_work([(40, 200)] * 4) + 1,  # one video whose picture rests: no copy
    }
    directory = write_ledgers(tmp_path, clips)
    found = duplicates.find(directory, 3)
    assert {name: (d.of, d.kind) for name, d in found.items()} == {
        "c/copy.mp4#00000": ("a.mp4#00000", "exact"),
        "d.mp4#00000": ("a.mp4#00000", "near"),
        "e.mp4#00000": ("a.mp4#00000", "near"),
    }
    counted = ledger.totals(directory, 3, found)
    assert (counted.clips["kept"], counted.clips["duplicate"], len(counted.lengths)) == (5, 3, 5)
    assert duplicates.find(write_ledgers(tmp_path / "one", {"a.mp4#00000": one}), 3) == {}


def test_copies_are_not_read(videos, tmp_path, capsys):
    """Byte-identical, and encoded anew in another size: the corpus's readers give each picture once."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    whole = (videos / "hand0.mp4").read_bytes()
    for name in ("first", "second"):
        (folder / f"{name}.mp4").write_bytes(whole)
    with Footage(str(videos / "hand0.mp4"), 384) as footage:
        frames = list(footage.at(i / 10 for i in range(50)))
    smaller = [np.asarray(Image.fromarray(f).resize((f.shape[1] * 4 // 5, f.shape[0] * 4 // 5))) for f in frames]
    (folder / "third.mp4").write_bytes(write_video(iter(smaller), Fraction(10), 30))
    write_captions(folder, leave_out="")
    words = [f"--videos={folder}/*.mp4", f"--captions={folder}/captions.csv", f"--out={out}", *OPTIONS]
    assert cli.main(["data", "curate", *words]) == 0
    assert "duplicates: 2 exact, 2 near; delete duplicates.json" in capsys.readouterr().out
    episodes = open_source(f"records:{out}", DataConfig(), progress=False)
    assert [e.name for e in episodes] == ["first.mp4#00000", "first.mp4#00001"] and episodes.seconds == 5
    assert out / "duplicates.json" in episodes.files()  # rows that were kept are not of these records if it changes
    assert cli.main(["data", "validate", f"records:{out}"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Duplicates</h2>" in page and "<td>third.mp4#00001</td><td>first.mp4#00001</td><td>near</td>" in page
    exclude = tmp_path / "exclude.json"
    content = {"episodes": {f"records:{out}": ["first.mp4#00000", "first.mp4#00001"]}}
    exclude.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="leaves only duplicates"):
        open_source(f"records:{out}", DataConfig(exclude=str(exclude)), progress=False)
    (out / "duplicates.json").write_text('{"duplicates": [1]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"duplicates.json.*or delete it to keep all records"):
        open_source(f"records:{out}", DataConfig(), progress=False)
    (out / "duplicates.json").unlink()  # the remedy
    assert len(open_source(f"records:{out}", DataConfig(), progress=False)) == 6


def test_finished_shards_are_left_alone(corpus, videos, capsys):
    def stamps():
        return {p.name: p.stat().st_mtime_ns for p in [*corpus.glob("*.array_record-*"), *corpus.glob("curation/*")]}

    before, content = stamps(), shards(corpus)
    assert cli.main(["data", "curate", *arguments(videos, corpus)]) == 0
    assert stamps() == before
    gone = next(name for name, data in content.items() if data == max(content.values(), key=len))
    (corpus / gone).unlink()
    assert cli.main(["data", "curate", *arguments(videos, corpus)]) == 0
    assert shards(corpus) == content
    assert {n for n, t in stamps().items() if t != before[n]} == {gone, f"{gone[-14:]}.parquet"}
    assert "2 of them already finished" in capsys.readouterr().out


def test_a_new_video_is_taken_in(videos, corpus, photos, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "videos").mkdir()
    for name in ("hand0.mp4", "broken.mp4"):
        (tmp_path / "videos" / name).write_bytes((videos / name).read_bytes())
    write_captions(tmp_path / "videos", leave_out="")
    options = [f"--videos={tmp_path}/videos/*.mp4", f"--out={out}", *OPTIONS]
    captions = [f"--captions={videos}/captions.csv"]
    assert cli.main(["data", "curate", *options, *captions]) == 0
    first = shards(out)
    (tmp_path / "videos" / "new.mp4").write_bytes(photographs.video(photos["face"], 5.0))
    assert cli.main(["data", "curate", *options, *captions]) == 0
    assert {r["video"] for r in ledger_rows(out)} == {"hand0.mp4", "broken.mp4", "new.mp4"}
    assert shards(out) == first  # a face: no clip more


def test_damaged_notes_of_a_corpus(videos, corpus, tmp_path, capsys):
    """A ledger is made again with its shard; settings are not guessed."""
    out = tmp_path / "corpus"
    shutil.copytree(corpus, out)
    ledger.path(out, 1, 3).write_bytes(b"PAR1")
    assert cli.main(["data", "curate", *arguments(videos, out)]) == 0
    said = capsys.readouterr()
    assert "00001-of-00003.parquet is damaged; its shard is made again" in said.err
    assert "3 shards, 2 of them already finished" in said.out
    assert same(contents(out), contents(corpus))
    part = records.manifest_path(out, 1, 3)
    part.write_bytes(b"PAR1")
    assert cli.main(["data", "curate", *arguments(videos, out)]) == 1
    assert "; delete it and run the command that writes the corpus again" in capsys.readouterr().err
    part.unlink()
    assert cli.main(["data", "curate", *arguments(videos, out)]) == 0
    for content in ("{", "[]", '{"shards": 0}'):
        (out / "curation.json").write_text(content, encoding="utf-8")
        assert cli.main(["data", "curate", *arguments(videos, out)]) == 1
        assert "; copy it again, or choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("option, name", [("--face-score=0.7", "face_score"), ("--shards=4", "shards")])
def test_other_settings_need_another_folder(corpus, videos, capsys, option, name):
    assert cli.main(["data", "curate", *arguments(videos, corpus, option)]) == 1
    assert f"was started with {name} " in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--out=ftp://bucket/corpus"], "paths in a bucket begin with gs:// or s3://"),
        (["--captions="], "either --captions FILE or --caption-model DIR"),
        (["--videos=/nowhere/*.mp4"], "no file matches /nowhere"),
        (["--min-seconds=5"], "min_seconds is 5.0"),
        (["--captions=/nowhere.txt"], "is not a caption file"),
    ],
)
def test_what_cannot_be_is_said_at_once(videos, tmp_path, capsys, more, said):
    assert cli.main(["data", "curate", *arguments(videos, tmp_path / "out", *more)]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(videos, tmp_path, capsys):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".env").write_text("KEY=1", encoding="utf-8")
    assert cli.main(["data", "curate", *arguments(videos, tmp_path)]) == 1
    assert "is not empty and was not written by" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {".git", ".env"}


def test_only_what_was_written_aside_is_taken_away(tmp_path):
    names = [".curation.json", ".report.html", f".{records.shard_name(0, 3)}", "manifest/.00000-of-00003.parquet"]
    own = [f"{name}.0123abcd.partial" for name in names]
    others = [".env", ".gitignore", "manifest/.nfs0007", "curation.json"]
    for folder in (".git", "manifest", "curation/.git"):
        (tmp_path / folder).mkdir(parents=True)
    for name in own + others:
        (tmp_path / name).touch()
    run._tidy(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


def test_captions_by_a_model(videos, qwen, tmp_path):
    one = arguments(videos, tmp_path / "a", f"--caption-model={qwen}", "--caption-tokens=6", "--caption-batch=4")
    assert cli.main(["data", "curate", *one]) == 0
    outcomes = [
        (r["outcome"], r["caption"]) for r in ledger_rows(tmp_path / "a") if Path(r["video"]).stem.startswith("hand")
    ]
    assert len(outcomes) == 6
    assert all((caption != "") == (outcome == "kept") for outcome, caption in outcomes)
    assert any(caption for _, caption in outcomes)


@pytest.mark.parametrize("options", [
    ["--runner=dask"],
    ["--runner=direct", "--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"],
], ids=["dask", "processes"])  # fmt: skip
@pytest.mark.slow
def test_engines_write_the_same_bytes(videos, corpus, tmp_path, options):
    done = subprocess.run(command(videos, tmp_path / "out", *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(contents(tmp_path / "out"), contents(corpus))


def command(videos: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rynnvla_jax.cli", "data", "curate", *arguments(videos, out, *more)]


def test_killed_in_the_middle(videos, corpus, tmp_path):
    out = tmp_path / "out"
    running = subprocess.Popen(command(videos, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(out.glob("curation/0*.parquet")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "corpus.json").exists()
    assert cli.main(["data", "curate", *arguments(videos, out)]) == 0
    assert same(contents(out), contents(corpus))
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_into_a_bucket(videos, corpus, bucket, tmp_path, capsys):
    """One video, of which the whole corpus has the same records."""
    words = [f"--videos={videos}/**/hand1.mp4", f"--captions={videos}/captions.csv", *OPTIONS, f"--out={bucket}"]
    assert cli.main(["data", "curate", *words]) == 0
    assert f"{bucket}/report.html" in capsys.readouterr().out
    copy = download(bucket, tmp_path / "copy")
    names = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()}
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == names
    found = [[r for r in shard if r["clip_id"].startswith(b"monday/early/hand1.mp4")] for shard in contents(corpus)]
    assert same(contents(copy), found) and any(found)
    assert ledger_rows(copy) == [row for row in ledger_rows(corpus) if row["video"] == "monday/early/hand1.mp4"]
    assert cli.main(["data", "curate", *words]) == 0
    assert "3 of them already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_in_the_middle_into_a_bucket(videos, corpus, bucket, tmp_path, monkeypatch):
    folder = files.place(bucket)
    running = subprocess.Popen(command(videos, bucket), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not files.listing(folder / "curation"):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (folder / "corpus.json").exists()
    assert cli.main(["data", "curate", *arguments(videos, bucket)]) == 0
    local = download(bucket, tmp_path / "copy")
    assert same(contents(local), contents(corpus)) and ledger_rows(local) == ledger_rows(corpus)


def download(bucket: str, folder: Path) -> Path:
    files.copy_folder(files.place(bucket), folder)
    return folder
