"""`rynnvla data stats` tells what numpy tells of the raw files; `rynnvla data show` has the frames and the words."""

import base64
import io
import json
import re

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import demo, sources
from data_pipelines.episode import Episode, Episodes
from data_pipelines.inspect import show, summary
from data_pipelines.inspect.summary import summarise
from data_pipelines.sources import open_source
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import DataConfig
from tests.data_pipelines.test_validate import V21, write_clips

SO100, EGODEX = demo.path("so100"), demo.path("egodex")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stats(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["data", "stats", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pictures(html: str, kind: str) -> list[bytes]:
    return [base64.b64decode(m) for m in re.findall(rf"data:image/{kind};base64,([A-Za-z0-9+/=]+)", html)]


def page(tmp_path, *arguments) -> str:
    out = tmp_path / "deep" / "page.html"
    assert cli.main(["data", "show", *map(str, arguments), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


# --- stats -------------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_raw_rows(capsys):
    found = stats(capsys, SO100, "--chunk", 5)
    table = pq.read_table(SO100 / "data" / "chunk-000" / "file-000.parquet")
    rows = {"state": "observation.state", "action": "action"}
    rows = {name: np.stack(table[key].to_pylist()).astype(np.float64) for name, key in rows.items()}
    for name, raw in rows.items():
        for statistic, value in (
            ("mean", raw.mean(0)),
            ("std", raw.std(0)),
            ("min", raw.min(0)),
            ("max", raw.max(0)),
            ("p1", np.percentile(raw, 1, axis=0)),
            ("p99", np.percentile(raw, 99, axis=0)),
        ):
            np.testing.assert_allclose(found[name][statistic], value, rtol=1e-5, atol=1e-5)
    assert (found["episodes"], found["steps"], found["fps"]) == (6, 1853, [30.0])
    assert found["hours"] == pytest.approx(1853 / 30 / 3600)
    assert found["views"] == ["front", "wrist"] and found["frame_sizes"] == [[128, 128]]
    assert found["columns"]["robot"] == "lerobot:so100_follower" and not found["questions"]
    columns = [(c["name"], c["unit"], c["pair"]) for c in found["columns"]["action"]]
    assert columns[4:] == [("wrist_roll", "-100..100", 4), ("gripper", "0..100", None)]
    lengths = found["lengths"]
    assert (lengths["min"], lengths["median"], lengths["max"]) == (263, 312.0, 361)
    assert sum(lengths["histogram"]["counts"]) == 6 and lengths["histogram"]["edges"][0] == 263


def test_relative_statistics_are_over_all_chunks(capsys):
    found = stats(capsys, V21, "--chunk", 3)
    chunks = []
    for i in range(2):
        table = pq.read_table(V21 / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
        state, action = (np.stack(table[k].to_pylist()).astype(np.float64) for k in ("observation.state", "action"))
        for start in range(90):
            rows = action[start : start + 3].copy()
            rows[:, :5] -= np.concatenate([state[start : start + 1], rows[:-1]])[:, :5]  # the gripper stays
            chunks.append(rows)
    rows = np.concatenate(chunks)
    np.testing.assert_allclose(found["relative_action"]["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["relative_action"]["std"], rows.std(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["relative_action"]["p99"], np.percentile(rows, 99, axis=0), rtol=1e-4, atol=1e-5)


def test_percentiles_of_large_sets_take_every_kth_row(monkeypatch):
    episodes = open_source(f"lerobot:{V21}", DataConfig(), (), progress=False)
    whole = summarise("x", episodes, progress=False).tables["action"]
    monkeypatch.setattr(summary, "_PERCENTILE_ROWS", 25)  # of 180: every eighth, across the episodes
    sampled = summarise("x", episodes, progress=False).tables["action"]
    np.testing.assert_array_equal(sampled["std"], whole["std"])
    raw = np.concatenate([e.action for e in episodes])
    np.testing.assert_allclose(sampled["p1"], np.percentile(raw[::8], 1, axis=0), rtol=1e-6)


def test_instructions_are_counted(capsys):
    found = stats(capsys, SO100)["instructions"]
    table = pq.read_table(SO100 / "data" / "chunk-000" / "file-000.parquet")
    _, counts = np.unique(table["task_index"].to_numpy(), return_counts=True)
    assert sorted(t["steps"] for t in found) == sorted(counts.tolist())
    assert [t["episodes"] for t in found] == [2, 2, 2]
    assert "put the pen into the holder" in {t["text"] for t in found}


def test_the_table_for_people(capsys):
    assert cli.main(["data", "stats", str(SO100)]) == 0
    out = capsys.readouterr().out
    for text in ("6 episodes, 1,853 steps, 61.8 s at 30 fps", "128 x 128", "put the pen"):
        assert text in out
    assert "target, relative to state wrist_flex" in out
    (row,) = re.findall(r"^  wrist flex +([-\d.]+) ", out.partition("  state ")[2].partition("  action ")[0], re.M)
    raw = np.stack(pq.read_table(SO100 / "data/chunk-000/file-000.parquet")["observation.state"].to_pylist())
    assert float(row) == pytest.approx(raw[:, 3].mean(), rel=1e-3)


def test_several_sources_and_what_they_disagree_in(capsys):
    assert cli.main(["data", "stats", str(SO100), str(EGODEX)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"lerobot:{SO100}") and lines[2].startswith(f"egodex:{EGODEX}")
    assert lines[3].split()[:3] == ["all", "10", "2,385"]
    assert "they differ in what columns mean: robot 'lerobot:so100_follower' and 'egodex' (lerobot:" in lines[4]
    found = stats(capsys, SO100, EGODEX)
    assert [s["episodes"] for s in found["sources"]] == [6, 4]
    assert found["differences"][0].startswith("what columns mean: ")
    assert stats(capsys, V21, V21)["differences"] == []


def test_clips_have_no_action_to_tell_of(tmp_path, capsys):
    root = write_clips(tmp_path / "clips")
    found = stats(capsys, root)
    assert (found["episodes"], found["steps"]) == (4, 48) and not found.keys() & {"state", "action", "relative_action"}
    assert cli.main(["data", "stats", str(root)]) == 0 and "without states and actions" in capsys.readouterr().out


def test_keys_of_the_data_config_are_taken_and_checked(capsys):
    assert stats(capsys, SO100, "--config.data.wrist=none")["views"] == ["front"]
    for wrong in ("fronts=x", "front", "chunk=many"):
        assert cli.main(["data", "stats", str(SO100), f"--config.data.{wrong}"]) == 1
        assert wrong.partition("=")[0] in capsys.readouterr().err


# --- show --------------------------------------------------------------------------------------------------------


def test_a_page_has_the_frames_the_words_and_the_curves(tmp_path):
    html = page(tmp_path, SO100, "--episodes", 3)
    assert [m for m in re.findall(r"<h2>(.*?)</h2>", html)] == ["episode_000000", "episode_000002", "episode_000005"]
    assert "pick up the strawberry and place it on the plate" in html
    assert "gripper in 0..100" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing else is needed
    frames = pictures(html, "jpeg")
    assert len(frames) == 3 * 2 * 8
    episode = open_source(f"lerobot:{SO100}", DataConfig(), None, progress=False)[2]
    for first, view in ((16, "front"), (24, "wrist")):
        for picture, step in ((frames[first], 0), (frames[first + 7], 360)):
            shown = np.asarray(Image.open(io.BytesIO(picture))).astype(float)
            assert np.abs(shown - episode.frames(view, [step])[0]).mean() < 6  # JPEG
    curves = [svg.decode() for svg in pictures(html, r"svg\+xml")]
    assert len(curves) == 4 and all("<svg" in c for c in curves)  # lengths, and one an episode


def test_a_page_of_egodex(tmp_path):
    html = page(tmp_path, f"egodex:{EGODEX}")
    assert len(pictures(html, "jpeg")) == 4 * 8 and len(pictures(html, r"svg\+xml")) == 5
    with h5py.File(EGODEX / "test/pick_place_block/0.hdf5") as file:
        text = file.attrs["llm_description"]
    assert str(text) in html and "test/pick_place_block/3" in html


def test_a_page_of_clips_has_no_curves(tmp_path):
    html = page(tmp_path, write_clips(tmp_path / "clips"), "--episodes", 2)
    assert len(pictures(html, "jpeg")) == 16 and len(pictures(html, r"svg\+xml")) == 1 and "a hand does 3" in html


def test_a_state_may_be_narrower_than_the_action():
    for width in (0, 3):
        action = np.cumsum(np.ones((8, 7), np.float32), 0)
        episode = Episode(
            name="pour",
            texts=("pour",),
            text_of=np.zeros(8, np.int32),
            fps=10.0,
            state=action[:, :width],
            action=action,
            columns=Columns.unstated("rlds:toy", 8, 7, range(7)),
        )
        html, problems = show.page("rlds:x", Episodes.of([episode], "rlds:x"), 1, progress=False)
        assert not problems and len(pictures(html, r"svg\+xml")) == 2


def test_what_the_page_cannot_be_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "open_source", None)  # before the work
    (tmp_path / "file").touch()
    for out, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "page.html", "File exists")):
        assert cli.main(["data", "show", str(V21), "--out", str(out)]) == 1
        assert said in capsys.readouterr().err


def test_cameras_are_named_where_none_is_the_configured_one(tmp_path, capsys):
    html = page(tmp_path, V21, "--config.data.front=top", "--config.data.wrist=none")
    assert not pictures(html, "jpeg")
    assert "does not have; set --config.data.front to one of observation.images.front" in capsys.readouterr().err


def test_codes_are_a_map_of_colours():
    codes = np.zeros((4, 6, 6), np.uint16)
    codes[2, 0, 5] = 17
    episode = Episode(
        name="tokenised",
        texts=("<b>fold</b> it", "put it down"),
        text_of=np.array([0, 0, 0, 1, 1, 1, 1, 1], np.int32),
        fps=10.0,
        state=np.zeros((8, 0), np.float32),
        action=np.zeros((8, 0), np.float32),
        columns=Columns(),
        codes={"front": codes},
        stride=2,
    )
    html, problems = show.page("records:x", Episodes.of([episode], "records:x"), 3, progress=False)
    assert not problems and "&lt;b&gt;fold&lt;/b&gt; it" in html and "steps 3 to 7" in html and "0.6 s" in html
    maps = [np.asarray(Image.open(io.BytesIO(p))) for p in pictures(html, "png")]
    assert len(maps) == 4 and np.array_equal(maps[0], maps[1])
    changed = (maps[2] != maps[0]).any(-1)
    assert changed[:8, 40:].all() and changed.sum() == 64  # one code's square


def test_an_episode_that_cannot_be_shown_is_named(tmp_path, capsys):
    root = write_clips(tmp_path / "clips")
    episodes = open_source(f"clips:{root}", DataConfig(), None, progress=False)
    (root / "1.mp4").write_bytes(b"gone since it was opened")
    html, problems = show.page(f"clips:{root}", episodes, 4, progress=False)
    assert len(problems) == 1 and "1.mp4 cannot be opened" in problems[0] and problems[0] in html
    assert len(pictures(html, "jpeg")) == 3 * 8
    assert cli.main(["data", "show", str(tmp_path / "none")]) == 1 and "rynnvla data show: " in capsys.readouterr().err
