"""Chunks, statistics, normalisation and decoding against the public code."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines import statistics
from data_pipelines.episode import Episode, Episodes
from rynnvla_jax.actions import (
    Statistics,
    decode_chunk,
    normalize_actions,
    normalize_state,
    pad_chunk,
    relative_chunk,
    unnormalize_actions,
)
from rynnvla_jax.columns import Columns
from rynnvla_jax.stage import start_counts
from tests import GOLDEN

GOLDEN = load_file(GOLDEN / "relative_actions.safetensors")
CHUNK, FRAMES = 10, 4
KEYS = ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state")
COLUMNS = Columns.unstated("radians", 6, 6, (5,))
STATISTICS = Statistics(**{k: GOLDEN[f"{k}_f64"] for k in KEYS}, columns=COLUMNS)


@pytest.mark.parametrize("episode", [0, 1])
def test_raw_chunks(episode):
    action, state = GOLDEN[f"ep{episode}.action"], GOLDEN[f"ep{episode}.state"]
    for start, (rows, length) in enumerate(
        zip(GOLDEN[f"ep{episode}.raw_chunks"], GOLDEN[f"ep{episode}.raw_chunk_len"], strict=True)
    ):
        out = relative_chunk(action, state, start, CHUNK, COLUMNS)
        assert out.dtype == np.float32 and len(out) == length
        np.testing.assert_allclose(out, rows[:length], atol=1e-5)


def examples(frames):
    counts = [start_counts(len(GOLDEN[f"ep{e}.action"]), frames, CHUNK + 1) for e in (0, 1)]
    return [(e, s) for e, count in enumerate(counts) for s in range(count)]


def chunk_at(episode, start):
    return relative_chunk(GOLDEN[f"ep{episode}.action"], GOLDEN[f"ep{episode}.state"], start, CHUNK, COLUMNS)


def test_action_vae_examples():
    found = examples(0)
    assert found == list(zip(GOLDEN["vae.episode"].tolist(), GOLDEN["vae.start"].tolist(), strict=True))
    for (episode, start), actions, is_pad in zip(found, GOLDEN["vae.actions"], GOLDEN["vae.is_pad"], strict=True):
        rows, pad = pad_chunk(normalize_actions(chunk_at(episode, start), STATISTICS), CHUNK)
        np.testing.assert_allclose(rows, actions, atol=1e-5)
        np.testing.assert_array_equal(pad, is_pad)


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_vla_examples(mode):
    found = examples(FRAMES)
    assert found == list(zip(GOLDEN["vla.episode"].tolist(), GOLDEN["vla.start"].tolist(), strict=True))
    for i, (episode, start) in enumerate(found):
        rows = np.stack([normalize_actions(chunk_at(episode, start + t), STATISTICS, mode) for t in range(FRAMES)])
        np.testing.assert_allclose(rows, GOLDEN[f"vla.{mode}.actions"][i], atol=1e-5)
        state = normalize_state(GOLDEN[f"ep{episode}.state"][start : start + FRAMES], STATISTICS)
        np.testing.assert_allclose(state, GOLDEN[f"vla.{mode}.state"][i], atol=1e-5)


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_decode(mode):
    for i, (episode, start) in enumerate(GOLDEN["decode.index"]):
        state = GOLDEN[f"ep{episode}.state"][start]
        out = decode_chunk(GOLDEN[f"decode.{mode}.normalised_in"][i], state, STATISTICS, mode)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, GOLDEN[f"decode.{mode}.absolute_out"][i], atol=1e-5)


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
@pytest.mark.parametrize("absolute", [(5,), (), (0, 3)])
def test_decoding_inverts_encoding(mode, absolute):
    statistics = replace(STATISTICS, columns=Columns.unstated("", 6, 6, absolute))
    action, state = GOLDEN["ep0.action"], GOLDEN["ep0.state"]
    for start in (0, 17, 35):
        rows = relative_chunk(action, state, start, CHUNK, statistics.columns)
        out = decode_chunk(normalize_actions(rows, statistics, mode), state[start], statistics, mode)
        np.testing.assert_allclose(out, action[start : start + CHUNK], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(
            unnormalize_actions(normalize_actions(rows, statistics, mode), statistics, mode), rows, atol=1e-5
        )


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_constant_columns_stay_finite_and_constant(mode):
    zero, value = np.zeros(6), np.full(6, 0.25)
    still = replace(
        STATISTICS,
        rel_mean_action=value,
        rel_std_action=zero,
        rel_min_action=value,
        rel_max_action=value,
        std_state=zero,
    )
    rows = np.full((3, 6), 0.25, np.float32)
    there = normalize_actions(rows, still, mode)
    assert np.isfinite(there).all() and np.isfinite(normalize_state(rows, still)).all()
    noise = np.random.default_rng(0).normal(size=there.shape)  # what a decoder adds must not become motion
    np.testing.assert_allclose(unnormalize_actions(there + noise, still, mode), rows, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
def test_seven_columns_of_which_two_are_absolute(mode):
    """Each number written out as the paper describes it; 5th and 95th percentile."""
    rng = np.random.default_rng(1)
    action, state = rng.normal(size=(9, 7)).cumsum(0), rng.normal(size=(9, 7))
    episode = Episode("e", ("",), np.zeros(9, np.int32), 30.0, state, action, Columns.unstated("", 7, 7, (4, 6)))
    rows = []
    for start in range(9):
        for k in range(min(4, 9 - start)):
            row = [action[start + k][j] - (action[start + k - 1] if k else state[start])[j] for j in range(7)]
            row[4], row[6] = action[start + k][4], action[start + k][6]
            rows.append(row)
    found = statistics.compute([Episodes.of([episode], "here")], 4, progress=False, percentiles=(5.0, 95.0))
    assert found.percentiles == (5.0, 95.0) and found.columns == episode.columns
    low, high = np.percentile(rows, [5, 95], axis=0)
    np.testing.assert_allclose([found.rel_min_action, found.rel_max_action], [low, high], rtol=1e-5, atol=1e-6)
    chunk = relative_chunk(action, state, 2, 4, episode.columns)
    expected = (np.array(rows[8:12]) - np.mean(rows, 0)) / np.std(rows, 0)
    if mode == "min_max":
        expected = 2 * (np.array(rows[8:12]) - low) / (high - low) - 1
    np.testing.assert_allclose(normalize_actions(chunk, found, mode), expected, atol=1e-5)
    np.testing.assert_allclose(decode_chunk(expected, state[2], found, mode), action[2:6], atol=1e-5)


def test_padding_is_marked():
    rows, is_pad = pad_chunk(np.ones((2, 6), np.float32), 4)
    assert rows.sum() == 12 and is_pad.tolist() == [False, False, True, True]
    assert start_counts(5, 0, 21) == 0


def test_statistics_file_round_trip(tmp_path):
    path = tmp_path / "statistics.json"
    STATISTICS.to_json(path)
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {*KEYS, "columns", "percentile_range"}
    back = Statistics.from_json(path)
    assert back.percentiles == (1.0, 99.0)
    assert back.columns == STATISTICS.columns
    for key in KEYS:
        np.testing.assert_array_equal(getattr(back, key), getattr(STATISTICS, key))


@pytest.mark.parametrize("key", [*KEYS, "columns"])
def test_missing_keys_are_named(tmp_path, key):
    path = tmp_path / "statistics.json"
    STATISTICS.to_json(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[key]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"statistics.json lack {key}[;,]"):
        Statistics.from_json(path)


def test_broken_statistics_are_named(tmp_path):
    path = tmp_path / "statistics.json"
    STATISTICS.to_json(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    for change, message in (
        ({"std_state": [1.0]}, "std_state"),
        (
            {"columns": {"state": [{}] * 6, "action": [{"pair": 6}] * 6}},
            "columns.action: column 0 .* state column 6 of 6",
        ),
        ({"columns": {"state": [{}] * 6}}, "columns describes 0 columns of action but rel_min_action has 6"),
        ({"columns": {"state": [{"kind": "claw"}]}}, "kind of a column is 'claw'; choose one of joint, "),
        ({"rel_std_action": [float("nan")] * 6}, "rel_std_action"),
    ):
        path.write_text(json.dumps(values | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Statistics.from_json(path)
    path.write_text("5", encoding="utf-8")
    with pytest.raises(ValueError, match="are not a JSON object"):
        Statistics.from_json(path)
    with pytest.raises(ValueError, match="do not exist"):
        Statistics.from_json(tmp_path / "none.json")


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="mean_std"):
        normalize_actions(np.zeros((1, 6)), STATISTICS, "z")
