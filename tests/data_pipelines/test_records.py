"""Corpora: what is written is read, by us and by TFDS; planned sequences; damage; tokenizing, interrupted and not."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.checks import image_key
from data_pipelines.corpus import packing, records
from data_pipelines.corpus.packing import pack
from data_pipelines.episode import DataError
from data_pipelines.loader import Loader
from data_pipelines.sources import open_source
from rynnvla_jax.actions import decode_chunk
from rynnvla_jax.cli import data as data_lib
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import (
    ConfigError,
    DataConfig,
    ImageConfig,
    SequenceConfig,
    TrainConfig,
    VLAConfig,
)
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer
from tests import ROOT

CONFIGS = ROOT / "configs"
IMAGE = ImageConfig(shortest_edge=32)
CHUNK, STRIDE = 4, 3
LAYOUT = records.CorpusLayout(
    grid=(2, 4), stride=STRIDE, columns=Columns.unstated("degrees", 6, 6, (5,)), vqgan="abc",
    image=image_key(DataConfig(image=IMAGE)),
)  # fmt: skip
STEPS = (20, 31, 5, 24, 27, 40, 22)  # the third is too short for three frames and a chunk


def record(i: int) -> records.Record:
    """Codes tell record and frame; the state's first number tells record and step."""
    n = STEPS[i]
    frames = -(-n // STRIDE)
    codes = np.zeros((frames, 2, 4), np.uint16)
    codes[:, 0, 0], codes[:, 0, 1] = i, np.arange(frames)
    state = np.random.default_rng(i).normal(size=(n, 6)).astype(np.float32)
    state[:, 0] = 100 * i + np.arange(n)
    return {
        "clip_id": f"clip{i}",
        "captions": [f"task {'abc'[i % 3]}" + " and again" * (i == 3)],
        "caption_of": np.zeros(n, np.int32),
        "fps": 30.0,
        "front_codes": codes,
        "state": state,
        "action": state + 0.5,
    }


@pytest.fixture
def corpus(tmp_path) -> Path:
    for shard, numbers in enumerate((range(3), range(3, 7))):
        records.write_shard(tmp_path, shard, 2, [record(i) for i in numbers], LAYOUT)
    records.finish(tmp_path, 2, {"made": "for a test"}, LAYOUT)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["task a and again", "task b", "task c"], num_codes=64), encoding="utf-8")
    return TextTokenizer(path)


def make_config(corpus, stage="trajectory", batch_size=2, clips=1, length=200, **data):
    sequence = SequenceConfig(length=length, num_frames=3, clips=clips, use_wrist_frame=False)
    return TrainConfig(
        stage=stage,
        batch_size=batch_size,
        data=DataConfig(source=f"records:{corpus}", chunk=CHUNK, image=IMAGE, **{"frame_codes": "ahead", **data}),
        sequence=sequence,
        vla=VLAConfig(state_dim=6),
    )


def take(loader, step, count):
    batches = loader.batches(step)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


@pytest.mark.parametrize("config", ["action_vae", "vqgan"])
def test_stages_without_sequences_need_no_plan(corpus, config, capsys):
    words = ["pack", "--config", f"{CONFIGS / config}.py:tiny", f"--config.data.source=records:{corpus}"]
    assert data_lib.main(words) == 0
    assert capsys.readouterr().out == f"stage {config} trains on no token sequences: needs no plan\n"


def test_a_corpus_is_read_by_us_and_by_tfds(corpus):
    source = open_source(f"records:{corpus}", DataConfig())
    theirs = tfds.builder_from_directory(corpus).as_data_source("train")
    assert len(source) == len(theirs) == 7 and source.lengths.tolist() == list(STEPS)
    assert (source.columns, source.frame_sizes) == (LAYOUT.columns, {(32, 64): "7 records"})
    assert source.seconds == pytest.approx(sum(STEPS) / 30)
    for i, episode in enumerate(source):
        expected = record(i)
        assert episode.name == expected["clip_id"] and episode.text(0) == expected["captions"][0]
        np.testing.assert_array_equal(episode.state, expected["state"])
        np.testing.assert_array_equal(episode.action, expected["action"])
        np.testing.assert_array_equal(episode.codes["front"], expected["front_codes"])
        np.testing.assert_array_equal(theirs[i]["front_codes"], expected["front_codes"])
        assert theirs[i]["clip_id"].decode() == episode.name


def test_actions_that_are_all_absolute_need_no_state_of_their_width(tmp_path):
    layout = replace(LAYOUT, columns=Columns.unstated("degrees", 2, 6, range(6)))
    rows = {**record(0), "state": record(0)["state"][:, :2]}
    records.write_shard(tmp_path, 0, 1, [rows], layout)
    records.finish(tmp_path, 1, {}, layout)
    (episode,) = open_source(f"records:{tmp_path}", DataConfig())
    np.testing.assert_array_equal(episode.chunk(3, 4), rows["action"][3:7])


def test_a_plan_is_made_anew_when_the_corpus_is(corpus, tokenizer):
    """A corpus of the same size and other captions: the old plan would count wrong tokens."""
    before = packing.prepare(corpus, make_config(corpus), tokenizer, (32, 64), progress=False)
    changed = [{**record(i), "captions": ["task a and again"]} for i in range(3)]
    records.write_shard(corpus, 0, 2, changed, LAYOUT)
    records.finish(corpus, 2, {}, LAYOUT)
    after = packing.prepare(corpus, make_config(corpus), tokenizer, (32, 64), progress=False)
    assert after.tokens > before.tokens


def test_a_newer_major_schema_is_refused_and_a_newer_minor_is_not(corpus):
    file = corpus / "corpus.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    about["schema"] = [2, 99]
    about["layout"]["of the future"] = 1
    file.write_text(json.dumps(about), encoding="utf-8")
    assert len(open_source(f"records:{corpus}", DataConfig())) == 7
    about["schema"] = [3, 0]
    file.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus.json has schema 3.0, newer than 2.0; update"):
        open_source(f"records:{corpus}", DataConfig())


def test_records_that_do_not_fit_the_layout_are_refused(tmp_path):
    short = {**record(0), "front_codes": record(0)["front_codes"][1:]}
    nameless = {k: v for k, v in record(1).items() if k != "state"}
    for bad, message in ((short, "clip0: front has 6 frames"), (nameless, "clip1 lacks state")):
        with pytest.raises(DataError, match=message):
            records.write_shard(tmp_path, 0, 1, [bad], LAYOUT)
        assert records.shards_done(tmp_path, 1) == [False]
    with pytest.raises(DataError, match="1 of 1 shards are missing"):
        records.finish(tmp_path, 1, {}, LAYOUT)


@pytest.mark.parametrize("clips", [1, 3])
def test_rows_hold_whole_windows_of_the_right_records(corpus, tokenizer, clips):
    """Text, codes, states and chunks of a clip come from one window of one record, wherever it stands in the row."""
    length = 200 if clips == 1 else 260  # a clip has some 65 to 80 tokens
    loader = Loader(make_config(corpus, clips=clips, length=length), tokenizer=tokenizer, progress=False)
    vocabulary, code_of = tokenizer.vocabulary, tokenizer.vocabulary.token_to_code()
    seen = Counter()
    for batch in take(loader, 0, 12):
        for row in range(2):
            tokens, mean, std = batch["tokens"][row], loader.statistics.mean_state[0], loader.statistics.std_state[0]
            for t in range(3 * clips):
                at = batch["state_positions"][row, t]
                if at < 0:
                    assert clips == 3 and not batch["state"][row, t].any()
                    continue
                number, step = divmod(round(float(batch["state"][row, t, 0] * std + mean)), 100)
                frame = tokens[max(0, at - 14) : at]  # begin, two sizes, 2 lines of 4 codes and an end, frame end
                codes = [code_of[x] for x in frame if x in vocabulary.code_to_token]
                assert (codes[0], codes[1]) == (number, step // STRIDE) and step % STRIDE == 0
                expected = record(number)
                decoded = decode_chunk(batch["actions"][row, t], expected["state"][step], loader.statistics)
                np.testing.assert_allclose(decoded, expected["action"][step : step + CHUNK], atol=1e-3)
                if t % 3 == 0:
                    seen[number] += 1
                    ids = tokenizer.encode(expected["captions"][0])
                    start = at - 14 - len(ids) - 1 + 1
                    np.testing.assert_array_equal(tokens[start : start + len(ids)], ids)
            if clips == 3:
                used = batch["segments"][row] > 0
                assert (batch["tokens"][row][~used] == 0).all() and used.sum() <= length
    assert set(seen) == {0, 1, 3, 4, 5, 6}  # never the short one
    line = loader.describe()[0]
    assert "1 shorter than 11 steps" in line and "% padding" in line


def test_planned_batches_are_a_function_of_seed_and_step(corpus, tokenizer):
    def loader(rows=None, seed=0):
        config = replace(make_config(corpus, "video", clips=2, length=180), seed=seed)
        return Loader(config, tokenizer=tokenizer, rows=rows, progress=False)

    alone = take(loader(), 0, 9)
    for key in alone[0]:
        np.testing.assert_array_equal(take(loader(), 6, 1)[0][key], alone[6][key])
        parts = [take(loader(np.array([i])), 4, 1)[0][key] for i in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), alone[4][key])
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(alone, take(loader(seed=1), 0, 9), strict=True))


def test_worker_processes_read_the_same_batches(corpus, tokenizer):
    threads = take(Loader(make_config(corpus, clips=2), tokenizer=tokenizer, progress=False), 3, 4)
    workers = take(Loader(make_config(corpus, clips=2, num_workers=2), tokenizer=tokenizer, progress=False), 3, 4)
    for a, b in zip(threads, workers, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_plan_is_kept_and_belongs_to_its_settings(corpus, tokenizer, monkeypatch):
    config = make_config(corpus)
    plan = packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    assert plan.records.tolist() == [0, 1, 3, 4, 5, 6] and plan.left_out == {"shorter than 11 steps": 1}
    monkeypatch.setattr(packing, "make", None)  # the same settings read the plan
    again = packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    assert again.records.tolist() == plan.records.tolist() and again.describe() == plan.describe()
    monkeypatch.undo()
    tight = packing.prepare(corpus, make_config(corpus, length=60), tokenizer, (32, 64), progress=False)
    assert 3 not in tight.records and tight.left_out["longer than 60 tokens"] >= 1
    with pytest.raises(DataError, match="no record fits stage trajectory.*sequence.length"):
        packing.prepare(corpus, make_config(corpus, length=20), tokenizer, (32, 64), progress=False)


def test_a_plan_that_packs_nothing_is_refused_with_settings_that_pack(corpus, tokenizer, monkeypatch, capsys):
    config = make_config(corpus, clips=2, length=100)  # a clip has some 65 to 80 tokens
    with pytest.raises(ConfigError, match=r"sequence.clips=2 packs nothing.* they have \d+ to \d+ tokens") as refused:
        packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    first, other = re.findall(r"sequence.length=(\d+) sequence.clips=(\d) \((.*?) % padding\)", str(refused.value))
    assert (first[1], other[1]) == ("2", "1")
    for length, clips, padding in (first, other):  # the remedy
        plan = packing.prepare(
            corpus, make_config(corpus, clips=int(clips), length=int(length)), tokenizer, (32, 64), progress=False
        )
        assert (
            f"{padding} % padding" in plan.describe()
            and plan.packs == (clips == "2")
            and "better" not in plan.describe()
        )
    both = replace(config, data=replace(config.data, source="", mixture=((f"records:{corpus}", 1.0), ("clips:x", 1.0))))
    plan = packing.prepare(corpus, both, tokenizer, (32, 64), progress=False)  # other sources may pack
    assert "warning: " in capsys.readouterr().err
    assert f"no two records in one sequence (better: sequence.length={first[0]}" in plan.describe()
    again = packing.prepare(corpus, both, tokenizer, (32, 64), progress=False)
    assert again.describe() == plan.describe() and again.proposals == plan.proposals
    with pytest.raises(DataError, match=f"increase sequence.length to {other[0]}"):
        packing.prepare(corpus, make_config(corpus, length=20), tokenizer, (32, 64), progress=False)


def test_the_pack_command_shows_lengths_that_pack(corpus, tokenizer, capsys):
    words = ["pack", "--config", f"{CONFIGS / 'video'}.py:tiny", f"--config.data.source=records:{corpus}"]
    words += [f"--config.tokenizer={tokenizer.path}", "--config.data.frame_codes=ahead", "--config.sequence.clips=2"]
    words += ["--config.data.image.shortest_edge=32", "--config.sequence.frame_interval=1"]
    assert data_lib.main([*words, "--config.sequence.length=80"]) == 1
    error = capsys.readouterr().err
    assert "sequence.clips=2 packs nothing" in error and error.count("\n") == 1
    length = re.search(r"sequence.length=(\d+) sequence.clips=2", error)[1]
    assert data_lib.main([*words, f"--config.sequence.length={length}"]) == 0
    first, *possible = capsys.readouterr().out.splitlines()
    assert first.startswith(f"records:{corpus}: ") and f"sequences of {length} tokens hold" in first
    assert [re.sub(r"=\d+ ", " ", line, count=1).split(" (")[0] for line in possible] == [
        f"  possible   sequence.length sequence.clips={n}" for n in (1, 2, 3, 4)
    ]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_a_proposed_length_has_the_padding_that_it_promises(lengths, clips):
    lengths = np.array(lengths)
    found = packing.propose(lengths, clips)
    assert {1, 2, 3, 4, clips} == {p.clips for p in found}
    for proposal in found:
        _, ends = pack(lengths, proposal.length, proposal.clips)  # asserts by itself that every record fits
        assert proposal.length % 128 == 0 and lengths.max() <= proposal.length
        assert proposal.padding == pytest.approx(1 - lengths.sum() / (len(ends) * proposal.length))
        assert proposal.clips == 1 or len(lengths) == 1 or len(ends) < len(lengths)


def test_the_documented_length_packs_square_frames():
    """Four square frames of 384 pixels and captions of 5 to 40 tokens, as docs/data.md trains them."""
    lengths = np.repeat(np.arange(2436, 2577, 4), 3)
    command = re.search(
        r"video.py:7b .*?sequence.clips=2.*?\n```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    length = int(re.search(r"sequence.length=(\d+)", command)[1])
    assert packing.propose(lengths, 2)[1].length == length
    _, ends = pack(lengths, length, 2)
    assert len(ends) == len(lengths) / 2


def test_excluded_records_are_left_out(corpus, tokenizer, tmp_path):
    file = tmp_path / "exclude.json"
    file.write_text(json.dumps({"episodes": {f"records:{corpus}": ["clip5", "clip0"]}}), encoding="utf-8")
    config = make_config(corpus, exclude=str(file))
    source = open_source(config.data.source, config.data)
    assert [e.name for e in source] == ["clip1", "clip2", "clip3", "clip4", "clip6"]
    assert source.lengths.tolist() == [STEPS[i] for i in (1, 2, 3, 4, 6)]
    assert source.seconds == pytest.approx(source.lengths.sum() / 30)
    assert source.frame_sizes == {(32, 64): "5 records"}
    plan = packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    assert [source[i].name for i in plan.records] == ["clip1", "clip3", "clip4", "clip6"]
    file.write_text(json.dumps({"episodes": {f"records:{corpus}": ["clip9"]}}), encoding="utf-8")
    with pytest.raises(DataError, match="clip9"):
        open_source(config.data.source, config.data)


@pytest.mark.parametrize("stage", ["trajectory", "action_vae"])
def test_a_damaged_record_that_is_excluded_is_never_read(corpus, tokenizer, tmp_path, stage):
    whole = Loader(make_config(corpus, stage), tokenizer=tokenizer, progress=False)
    damage(corpus)
    with pytest.raises(DataError, match="record 2 cannot be read"):
        Loader(make_config(corpus, stage), tokenizer=tokenizer, progress=False)
    file = tmp_path / "exclude.json"
    file.write_text(
        json.dumps({"episodes": {f"records:{corpus}": [f"clip{i}" for i in range(3, 7)]}}), encoding="utf-8"
    )
    loader = Loader(make_config(corpus, stage, exclude=str(file)), tokenizer=tokenizer, progress=False)
    assert loader.statistics.mean_state[0] < 100 < whole.statistics.mean_state[0]  # of clips 0 to 2 alone
    assert loader.num_examples == {"trajectory": 2, "action_vae": sum(n - CHUNK for n in STEPS[:3])}[stage]
    take(loader, 0, 6)
    assert loader.damaged == 0


def damage(corpus):
    """Zeros in the middle of the second shard, which holds the last four records."""
    path = corpus / records.shard_name(1, 2)
    data = bytearray(path.read_bytes())
    used = len(bytes(data[: 2**15]).rstrip(b"\0"))
    data[used // 2 : used // 2 + 30] = bytes(30)
    path.write_bytes(data)


def test_files_that_did_not_come_along_are_named(corpus, tokenizer):
    config = make_config(corpus)
    content = (corpus / "lengths.npy").read_bytes()
    for change in (
        lambda: (corpus / "lengths.npy").write_bytes(content[:-4]),
        lambda: (corpus / "lengths.npy").write_bytes(b""),
        (corpus / "lengths.npy").unlink,
    ):
        change()
        with pytest.raises(DataError, match=r"lengths.npy cannot be read .*; copy the corpus again"):
            open_source(config.data.source, config.data)
    (corpus / "lengths.npy").write_bytes(content)
    (corpus / "manifest" / "00001-of-00002.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"00001-of-00002.parquet cannot be read"):
        packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    shutil.rmtree(corpus / "manifest")
    with pytest.raises(DataError, match=r"00000-of-00002.parquet does not exist; copy the data set again"):
        packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)


def test_a_changed_bit_of_lengths_or_of_a_plan_is_found(corpus, tokenizer):
    """A corpus or a plan of an older version has no sums, and is read."""
    config = make_config(corpus)

    def prepare():
        open_source(config.data.source, config.data)
        return packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)

    prepare()
    (plan,) = (corpus / "plans").iterdir()
    for file, table, said in (
        (corpus / "lengths.npy", corpus / "corpus.json", "lengths.npy is not the file that was written"),
        (plan / "records.npy", plan / "plan.json", r"is damaged \(records.npy is not the file .*; delete this folder"),
        (plan / "ends.npy", plan / "plan.json", r"is damaged \(ends.npy is not the file .*; delete this folder"),
    ):
        sound = file.read_bytes(), table.read_bytes()
        array = np.load(file)
        array[0] ^= 1 << (1 if "lengths" in file.name else 0)
        if file.name != "ends.npy":
            np.save(file, array)
        else:
            file.write_bytes(sound[0].replace(b"}  ", b"} \n", 1))  # a bit of the header, that changes nothing
        with pytest.raises(DataError, match=said):
            prepare()
        values = json.loads(sound[1])
        del values["sha256"]
        table.write_text(json.dumps(values), encoding="utf-8")
        prepare()
        file.write_bytes(sound[0])
        table.write_bytes(sound[1])
        prepare()


def test_a_tokenized_corpus_asks_for_the_settings_it_was_made_with(corpus, tokenizer):
    with pytest.raises(ConfigError, match="data.frame_codes='ahead'"):
        Loader(make_config(corpus, frame_codes="step"), tokenizer=tokenizer, progress=False)
    config = make_config(corpus)
    other = replace(config, data=replace(config.data, image=ImageConfig(shortest_edge=64)))
    with pytest.raises(ConfigError, match="was tokenized with data.image.*32.*64"):
        Loader(other, tokenizer=tokenizer, progress=False)
    with pytest.raises(ConfigError, match="holds VQ codes instead of frames; train a VQGAN on videos"):
        Loader(make_config(corpus, "vqgan"), progress=False)


def test_a_damaged_record_is_named_counted_and_replaced(corpus, tokenizer, capfd):
    good = Loader(make_config(corpus, "video"), tokenizer=tokenizer, progress=False)
    statistics = take(good, 0, 12)
    damage(corpus)
    loader = Loader(make_config(corpus, "video"), tokenizer=tokenizer, progress=False)
    batches = take(loader, 0, 12)
    err = capfd.readouterr().err
    assert err.count("skipped a damaged example and used another") >= 1 and records.shard_name(1, 2) in err
    assert loader.damaged >= 1
    changed = [not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, statistics, strict=True)]
    assert any(changed) and not all(changed)
    again = take(Loader(make_config(corpus, "video"), tokenizer=tokenizer, progress=False), 0, 12)
    for a, b in zip(batches, again, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 60), st.integers(1, 6))
def test_packing_keeps_every_clip_and_every_limit(lengths, capacity, clips):
    lengths = np.array(lengths)
    order, ends = pack(lengths, capacity, clips)
    bins = np.split(order, ends[:-1])
    assert sorted(order.tolist()) == list(range(len(lengths))) and ends[-1] == len(lengths)
    assert all(0 < len(b) <= clips and lengths[b].sum() <= capacity for b in bins)
    # two bins that would fit into one are never both left open
    open_bins = sorted((int(lengths[b].sum()), len(b)) for b in bins)
    if len(open_bins) > 1:
        (a, n), (b, m) = open_bins[:2]
        assert a + b > capacity or n + m > clips
