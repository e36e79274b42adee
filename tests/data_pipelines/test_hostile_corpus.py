"""Corpora, plans and stores of VQ codes with damaged files: refused in one line."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.corpus import codes, packing, records
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.run import validate
from data_pipelines.sources import open_source
from rynnvla_jax.config import DataConfig, ImageConfig
from tests import recordings
from tests.data_pipelines.test_records import LAYOUT, make_config, record, tokenizer  # noqa: F401 - a fixture
from tests.hostile import VALUES, attempt, changed, damaged, examples, json_files


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "sound"
    for shard, numbers in enumerate((range(3), range(3, 7))):
        records.write_shard(root, shard, 2, [record(i) for i in numbers], LAYOUT)
    records.finish(root, 2, {"made": "for a test"}, LAYOUT)
    return root


@pytest.fixture
def corpus(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "corpus")


def read(root):
    episodes = open_source(f"records:{root}", DataConfig(), None, progress=False)
    for number in range(min(len(episodes), 4)):
        episode = episodes[number]
        assert np.isfinite(episode.chunk(0, 3)).all() and episode.text(0).strip()
    return episodes


def check(root):
    findings = Findings()
    validate(f"records:{root}", findings, progress=False)
    return findings


def refused(root, tokens):
    found = attempt(read, root)
    attempt(check, root)
    shutil.rmtree(root / "plans", ignore_errors=True)
    attempt(packing.prepare, root, make_config(root), tokens, (32, 64), False)
    return found is None


def try_contents(root, file, contents, number, tokens):
    sound = file.read_bytes()

    @examples(number)
    @given(contents)
    def try_it(content):
        file.write_bytes(content)
        refused(root, tokens)

    try_it()
    file.write_bytes(sound)
    assert not refused(root, tokens)


def test_corpus_json(corpus, tokenizer):  # noqa: F811
    file = corpus / "corpus.json"
    try_contents(corpus, file, json_files(json.loads(file.read_bytes())), 40, tokenizer)


def test_each_key_of_corpus_json_with_each_value(corpus):
    file = corpus / "corpus.json"
    values = json.loads(file.read_bytes())
    for key in (*values, *(f"layout.{k}" for k in values["layout"])):
        for value in VALUES:
            group, _, name = key.rpartition(".")
            new = values | ({group: values[group] | {name: value}} if group else {name: value})
            file.write_text(json.dumps(new), encoding="utf-8")
            attempt(read, corpus)


@pytest.mark.parametrize("name", ["lengths.npy", "manifest/00000-of-00002.parquet"])
def test_bytes(name, corpus, tokenizer):  # noqa: F811
    file = corpus / name
    sound = file.read_bytes()
    try_contents(corpus, file, st.one_of(damaged(sound), damaged(sound, 100)), 15, tokenizer)


def test_bytes_of_a_shard(corpus, tokenizer):  # noqa: F811
    file = corpus / records.shard_name(0, 2)
    sound = file.read_bytes()
    try_contents(corpus, file, damaged(sound, len(sound[: 2**16].rstrip(b"\0"))), 15, tokenizer)


def test_rows_of_the_manifest(corpus, tokenizer):  # noqa: F811
    file = corpus / "manifest" / "00000-of-00002.parquet"
    rows = pq.read_table(file).to_pylist()

    @examples(25)
    @given(changed(rows))
    def try_it(value):
        try:
            pq.write_table(pa.Table.from_pylist(value), file)
        except Exception:  # no table can hold this
            return
        refused(corpus, tokenizer)

    try_it()


@pytest.mark.parametrize("name", ["plan.json", "records.npy", "ends.npy"])
def test_a_plan(name, corpus, tokenizer):  # noqa: F811
    def prepare():
        plan = packing.prepare(corpus, make_config(corpus), tokenizer, (32, 64), False)
        return np.concatenate([plan[i] for i in range(len(plan))])

    assert len(prepare())
    (folder,) = (corpus / "plans").iterdir()
    file = folder / name
    sound = file.read_bytes()

    @examples(25)
    @given(json_files(json.loads(sound)) if name == "plan.json" else damaged(sound))
    def try_it(content):
        file.write_bytes(content)
        found = attempt(prepare)
        assert found is None or ((found >= 0) & (found < 7)).all()

    try_it()


def test_a_damaged_plan_is_named(corpus, tokenizer):  # noqa: F811
    packing.prepare(corpus, make_config(corpus), tokenizer, (32, 64), False)
    (folder,) = (corpus / "plans").iterdir()
    (folder / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"the plan .* is damaged .*; delete this folder and start again"):
        packing.prepare(corpus, make_config(corpus), tokenizer, (32, 64), False)


# --- VQ codes --------------------------------------------------------------------------------------------------------


def test_a_store_of_codes(tmp_path):
    recordings.write_hdf5(tmp_path / "set" / "0.hdf5", 6, wrist=False)
    config = DataConfig(source=f"hdf5:{tmp_path}/set", image=ImageConfig(shortest_edge=32))
    source = open_source(config.source, config, ("front",), progress=False)

    def encode(frames):
        return np.zeros((len(frames), frames.shape[1] // 16, frames.shape[2] // 16), np.uint16)

    directory = tmp_path / "codes"
    codes.encode_all(source, encode, config, directory, "abc", progress=False)

    def read_codes():
        return np.array(codes.CodeStore(directory, source.source, config, "abc")(source[0], "front"))

    expected = read_codes().shape
    manifest, array = directory / "manifest.json", directory / "0.hdf5" / "front.npy"
    sound = manifest.read_bytes(), array.read_bytes()

    @examples(25)
    @given(json_files(json.loads(sound[0])))
    def manifests(content):
        manifest.write_bytes(content)
        attempt(read_codes)

    @examples(25)
    @given(st.one_of(damaged(sound[1]), damaged(sound[1], 100)))
    def arrays(content):
        array.write_bytes(content)
        found = attempt(read_codes)
        assert found is None or found.shape == expected

    manifests()
    manifest.write_bytes(sound[0])
    arrays()
