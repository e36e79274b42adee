"""Data from and to buckets: the same as from and to a folder, by few requests, whatever the store answers meanwhile."""

import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.corpus import packing, records
from data_pipelines.corpus.codes import encode_all
from data_pipelines.episode import DataError
from data_pipelines.loader import Loader
from data_pipelines.sources import index, open_source
from data_pipelines.sources import records as records_source
from data_pipelines.sources.exclude import kind_and_path
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import DataConfig
from rynnvla_jax.inference import tokenize
from rynnvla_jax.storage import bucket_cache, buckets, files
from tests import ROOT, recordings, stores
from tests.data_pipelines.test_loader import IMAGE, fake_codes, make_source
from tests.data_pipelines.test_records import LAYOUT, STEPS, corpus, make_config, record, take, tokenizer  # noqa: F401
from tests.inference.test_tokenize import run

TOKENIZE = """
import sys, time
from rynnvla_jax.storage import files
from tests.inference.test_tokenize import FakeCodec, make_source, run
start = FakeCodec.start
FakeCodec.start = lambda self, frames: (time.sleep(0.05), start(self, frames))[1]
run(make_source(), files.place(sys.argv[1]), shard_bytes=1500)
"""
ENCODE = """
import sys, time
from data_pipelines.corpus.codes import encode_all
from rynnvla_jax.config import DataConfig
from tests.data_pipelines.test_loader import IMAGE, fake_codes, make_source
slow = lambda frames: (time.sleep(0.05), fake_codes(frames))[1]
encode_all(make_source(), slow, DataConfig(image=IMAGE), sys.argv[1], "abc", batch=7, progress=False)
"""
UPLOAD = """
import sys
from rynnvla_jax.storage import files
with files.replacing(files.place(sys.argv[1])) as partial:
    partial.write_bytes(bytes(range(256)) * 2**15)  # 8 MiB, which take several requests
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RYNNVLA_CACHE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(bucket_cache, "_held", {})
    return folder


def content(folder):
    """All files of a corpus but its lease, by relative name."""
    found = folder.files() if files.is_bucket(folder) else (p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in found}
    return {name: path.read_bytes() for name, path in names.items() if name != files.LEASE}


def same_episodes(one, other):
    assert one.lengths.tolist() == other.lengths.tolist()
    for a, b in zip(one, other, strict=True):
        assert (a.name, a.texts, a.columns, a.fps) == (b.name, b.texts, b.columns, b.fps)
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.action, b.action)
        for view in a.codes:
            np.testing.assert_array_equal(a.codes[view], b.codes[view])
        for view in a.views:
            np.testing.assert_array_equal(a.frames(view, [0, 3]), b.frames(view, [0, 3]))


def killed_when(code, argument, there):
    process = subprocess.Popen([sys.executable, "-c", code, argument], cwd=ROOT)
    while not there():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


# Corpora by range


@pytest.fixture
def remote(corpus, bucket):  # noqa: F811
    files.copy_folder(corpus, files.place(bucket), last="corpus.json")
    return bucket


def test_a_shuffled_record_costs_one_request_and_a_corpus_few(corpus, remote, store, cache):  # noqa: F811
    opened = []
    requests = store.counted(lambda: opened.append(open_source(f"records:{remote}", DataConfig())))
    assert len(requests) <= 10, requests
    (source,) = opened
    same_episodes(source, open_source(f"records:{corpus}", DataConfig()))
    assert source.source == f"records:{remote}" and str(source.corpus) == remote
    for number in np.random.default_rng(0).permutation(len(STEPS)):
        assert len(store.counted(lambda: source[int(number)])) == 1  # noqa: B023
    assert [p.name for p in cache.rglob("*") if p.is_file() and p.suffix not in (".lock", ".json")] == ["lengths.npy"]
    again = pickle.loads(pickle.dumps(source.read))  # as worker processes get it
    assert again(4).name == "clip4"


def test_batches_and_plans_are_those_of_a_folder(corpus, remote, store, tokenizer, monkeypatch):  # noqa: F811
    local = take(Loader(make_config(corpus, clips=2, length=400), tokenizer=tokenizer, progress=False), 0, 5)
    config = make_config(remote, clips=2, length=400)
    here = take(Loader(config, tokenizer=tokenizer, progress=False), 0, 5)
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(local, here, strict=True) for key in a)
    (plan,) = {path.parent for path in (files.place(remote) / "plans").files()}
    assert sorted(content(plan)) == ["ends.npy", "plan.json", "records.npy"]
    assert content(plan).items() == content(corpus / "plans" / plan.name).items()
    monkeypatch.setattr(packing, "make", None)  # the plan is read
    requests = store.counted(lambda: packing.prepare(files.place(remote), config, tokenizer, (32, 64), progress=False))
    assert len(requests) <= 8, requests
    (plan / "plan.json").unlink()  # a plan that a kill left without it is none
    with pytest.raises(TypeError):
        packing.prepare(files.place(remote), config, tokenizer, (32, 64), progress=False)


def test_a_plan_is_whole_with_its_last_file(corpus, tokenizer, monkeypatch):  # noqa: F811
    config = make_config(corpus)
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)
    monkeypatch.setattr(files, "write_json", write)
    assert [p.name for p in sorted((corpus / "plans").rglob("*.*"))] == ["ends.npy", "records.npy"]
    assert len(packing.prepare(corpus, config, tokenizer, (32, 64), progress=False)) == 6


@pytest.mark.parametrize(
    "refuse, cut, count",
    [(2, 0, 1), (0, 2, 1), pytest.param(5, 20, 60, marks=pytest.mark.slow)],
)
def test_faults_of_the_store_damage_no_example(corpus, remote, store, tokenizer, refuse, cut, count, capfd):  # noqa: F811
    """ArrayRecord's client waits seconds after each."""
    config = make_config(remote)
    local = take(Loader(make_config(corpus), tokenizer=tokenizer, progress=False), 0, count)
    loader = Loader(config, tokenizer=tokenizer, progress=False)
    store.refuse, store.cut = refuse, cut
    here = take(loader, 0, count)
    assert store.spoiled and loader.damaged == 0 and loader.drawn == 2 * count
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(local, here, strict=True) for key in a)
    assert "damaged" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_store_that_is_down_is_waited_for(remote, store):
    source = open_source(f"records:{remote}", DataConfig())
    store.down = True
    threading.Timer(1, lambda: setattr(store, "down", False)).start()
    assert source[3].name == "clip3"


class Gone:
    """As ArrayRecord's reader when its client has given up."""

    def __getitem__(self, number):
        raise RuntimeError("UNAVAILABLE")


@pytest.fixture
def reader(remote, monkeypatch):
    """A reader whose first sources fail, and the list of (whether the bucket answers) that it will find."""
    read = open_source(f"records:{remote}", DataConfig()).read
    real, answers, left = read._open, [], [0]

    def make():
        left[0] -= 1
        return Gone() if left[0] >= 0 else real()

    def check(path, write=False):
        if not answers.pop(0):
            raise buckets.BucketError(f"{path}: no answer")

    def failing(count):
        left[0] = count
        read._source = make()

    monkeypatch.setattr(read, "_open", make)
    monkeypatch.setattr(buckets, "check", check)
    monkeypatch.setattr(records_source, "_PAUSE", 0.01)
    return read, answers, failing


def test_a_long_outage_is_no_damage(reader, capfd):
    read, answers, failing = reader
    failing(6)
    answers += [False] * 6
    assert read(2).name == "clip2" and not answers
    assert capfd.readouterr().err.count("does not answer (UNAVAILABLE); waiting") == 1


def test_patience_ends_and_damage_is_damage(reader, monkeypatch):
    read, answers, failing = reader
    failing(3)
    answers += [True] * 3  # the bucket answers, and the record cannot be read
    with pytest.raises(DataError, match=r"record 2 cannot be read \(UNAVAILABLE\); copy the shard"):
        read(2)
    failing(9)
    answers += [False] * 9
    monkeypatch.setattr(records_source, "PATIENCE", 0)
    with pytest.raises(buckets.BucketError, match="no answer"):
        read(2)


# Other kinds by copies


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{kind: folder}"""
    root = tmp_path_factory.mktemp("sets")
    recordings.write_egodex(root / "egodex")
    recordings.write_calvin(root / "calvin")
    recordings.write_rlds(root / "rlds")
    recordings.write_hdf5(root / "hdf5" / "0.hdf5")
    recordings.write_libero_hdf5(root / "libero" / "a.hdf5")
    recordings.write_clips(root / "clips", {"a/0.mp4": "one", "a/1.mp4": "two"})
    return {path.name: path for path in root.iterdir()} | {"lerobot": demo.path("so100")}


KINDS = ("lerobot", "egodex", "calvin", "rlds", "hdf5", "libero", "clips")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_from_a_bucket(sets, kind, bucket, store, cache, monkeypatch):
    files.copy_folder(sets[kind], files.place(bucket))
    config = DataConfig()
    source = open_source(f"{kind}:{bucket}", config, progress=False)
    same_episodes(source, open_source(f"{kind}:{sets[kind]}", config, progress=False))
    assert source.source == f"{kind}:{bucket}" and str(cache) not in str(source.frame_sizes)
    monkeypatch.setattr(index, "_look", lambda root, name, known, read: LOOK(root, name, known, None))  # none is read
    requests = store.counted(lambda: open_source(f"{kind}:{bucket}/", config, progress=False))
    assert len(requests) <= 6, requests


LOOK = index._look


def test_excluded_episodes_are_named_as_the_user_does(sets, bucket, tmp_path, capsys):
    files.copy_folder(sets["clips"], files.place(bucket))
    exclude = files.place(bucket) / "exclude.json"
    files.write_json(exclude, {"episodes": {f"clips:{bucket}/": ["a/0.mp4"]}})
    source = open_source(f"clips:{bucket}", DataConfig(exclude=str(exclude)), progress=False)
    assert [e.name for e in source] == ["a/1.mp4"]
    assert capsys.readouterr().err == f"clips:{bucket}: 1 of 2 episodes left out by {exclude}\n"
    copy = bucket_cache.copy(files.place(bucket))
    assert kind_and_path(f"clips:{copy}") == kind_and_path(f"clips:{bucket}") == ("clips", str(files.place(bucket)))


def test_a_file_of_an_hdf5_list_lies_beside_it(sets, bucket):
    path = files.place(bucket)
    files.copy_folder(sets["hdf5"], path)
    files.write_json(path / "tasks.json", {"task_data": {"a": ["0.hdf5"]}})
    source = open_source(f"hdf5:{bucket}/tasks.json", DataConfig(), progress=False)
    same_episodes(source, open_source(f"hdf5:{sets['hdf5']}", DataConfig(), progress=False))
    assert source.source == f"hdf5:{bucket}/tasks.json"


def test_what_is_wrong_is_said_of_the_object(sets, bucket, cache, capsys):
    path = files.place(bucket)
    files.copy_folder(sets["clips"], path)
    (path / "a/0.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=f"{bucket}/a/0.mp4"):
        open_source(f"clips:{bucket}", DataConfig(), progress=False)
    assert cli.main(["data", "validate", bucket, f"--fix={bucket}/bad.json"]) == 1
    said = capsys.readouterr()
    assert f"{bucket}/a/0.mp4" in said.out and str(cache) not in said.out + said.err
    assert files.read_json(path / "bad.json") == {"episodes": {f"clips:{bucket}": ["a/0.mp4"]}}
    words = ["data", "show", f"clips:{bucket}", f"--out={bucket}/page.html", f"--config.data.exclude={path}/bad.json"]
    assert cli.main(words) == 0 and b"a/1.mp4" in (path / "page.html").read_bytes()
    assert cli.main(["data", "stats", bucket, f"--config.data.exclude={path}/bad.json"]) == 0
    assert f"clips:{bucket}\n  1 episodes" in capsys.readouterr().out


def test_a_corpus_in_a_bucket_is_validated(remote, capsys):
    assert cli.main(["data", "validate", remote]) == 0
    assert f"records:{remote}: 0 errors" in capsys.readouterr().out
    (files.place(remote) / "manifest" / "00001-of-00002.parquet").unlink()
    assert cli.main(["data", "validate", remote]) == 1
    assert f"{remote}/manifest/00001-of-00002.parquet does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["stats", "lerobot:gs://no-such-bucket/data"],
    ["show", "gs://no-such-bucket/data"],
    ["validate", "records:gs://no-such-bucket/data"],
    ["curate", "--videos=x", "--captions=y", "--out=gs://no-such-bucket/data"],
    ["tokenize", "--source=lerobot:x", "--vqgan=y", "--out=gs://no-such-bucket/data"],
], ids=lambda words: words[0])  # fmt: skip
def test_a_bucket_that_is_not_there_is_one_line(store, words, capsys):
    assert cli.main(["data", *words]) in (1, 2)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"rynnvla data {words[0]}: gs://no-such-bucket/data: the bucket no-such-bucket does not")


def test_no_permission_and_no_client_are_one_line(store, bucket, capsys, monkeypatch):
    from google.api_core import exceptions

    def forbid(*_):
        raise exceptions.Forbidden("objects.list")

    monkeypatch.setattr(buckets, "_check_gs", forbid)
    assert cli.main(["data", "stats", f"egodex:{bucket}"]) == 1
    assert "this account may not use the bucket" in capsys.readouterr().err
    assert cli.main(["data", "stats", "egodex:ftp://bucket/x"]) == 1
    assert "paths in a bucket begin with gs:// or s3://" in capsys.readouterr().err


def test_a_data_set_that_is_too_large_is_one_line(sets, bucket, capsys, monkeypatch):
    files.copy_folder(sets["calvin"], files.place(bucket))
    monkeypatch.setenv("RYNNVLA_CACHE_GB", "1e-6")
    assert cli.main(["data", "stats", f"calvin:{bucket}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rynnvla data stats: {bucket} has ") and line.endswith("to a folder of a larger disk")


# Writing


def test_a_corpus_tokenized_into_a_bucket_has_the_same_bytes(bucket, tmp_path):
    source, out = make_source(), files.place(bucket)
    _, whole = run(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(source, out, limit=whole.calls - 2)
    assert not (out / "corpus.json").exists() and 0 < sum(records.shards_done(out, 4)) < 4
    _, codec = run(source, out)
    assert codec.calls < whole.calls and content(out) == content(tmp_path / "whole")
    _, codec = run(source, out)
    assert not codec.calls and not (out / files.LEASE).exists()


@pytest.mark.slow
def test_tokenizing_survives_a_kill(bucket, tmp_path, monkeypatch):
    out = files.place(bucket)
    run(make_source(), tmp_path, shard_bytes=1500)
    killed_when(TOKENIZE, bucket, lambda: any(".array_record-" in name for name in files.listing(out)))
    assert not (out / "corpus.json").exists()
    monkeypatch.setattr(tokenize.lease, "RENEW_SECONDS", 0.2)
    run(make_source(), out, shard_bytes=1500)
    assert content(out) == content(tmp_path)


@pytest.mark.slow
def test_the_command_reads_and_writes_buckets(assets, bucket, tmp_path, capsys):
    files.copy_folder(demo.path("so100"), files.place(bucket) / "so100")
    model_dir.copy_model(Path(assets["vqgan"]), files.place(bucket) / "vqgan")
    more = ["--stride=4", "--config.data.image.shortest_edge=64"]
    words = ["data", "tokenize", f"--in=lerobot:{bucket}/so100", f"--vqgan={bucket}/vqgan", f"--out={bucket}/out"]
    assert cli.main([*words, *more]) == 0
    words = ["data", "tokenize", f"--in=lerobot:{demo.path('so100')}", f"--vqgan={assets['vqgan']}"]
    assert cli.main([*words, f"--out={tmp_path}/out", *more]) == 0
    names = ("tokenize.json", "corpus.json")  # these name the source
    one, other = content(files.place(bucket) / "out"), content(tmp_path / "out")
    assert one.keys() == other.keys() and all(one[n] == other[n] for n in one if n not in names)
    assert files.read_json(files.place(bucket) / "out/corpus.json")["about"]["source"] == f"lerobot:{bucket}/so100"


@pytest.mark.slow
def test_an_upload_that_is_killed_leaves_no_object(bucket, store):
    path, seen = files.place(bucket) / "shard", len(store.requests)
    store.delay = 0.3
    killed_when(UPLOAD, str(path), lambda: any("uploadType=resumable" in r.path for r in store.requests[seen:]))
    store.delay = 0
    assert not path.exists()
    subprocess.run([sys.executable, "-c", UPLOAD, str(path)], cwd=ROOT, check=True)
    assert path.read_bytes() == bytes(range(256)) * 2**15


CODES = {"config": DataConfig(image=IMAGE), "fingerprint": "abc", "batch": 7, "progress": False}


@pytest.mark.slow
def test_encoding_survives_a_kill(bucket, tmp_path):
    out = files.place(bucket)
    encode_all(make_source(), fake_codes, directory=tmp_path, **CODES)
    killed_when(ENCODE, bucket, lambda: any(name.endswith(".npy") for name in out.versions()))
    begun = content(out)
    encode_all(make_source(), fake_codes, directory=out, **CODES)
    assert 0 < len(begun) < len(content(out)) and content(out) == content(tmp_path)


def test_codes_in_a_bucket(bucket, store, tmp_path):
    source, out, calls = make_source(), files.place(bucket), []
    encode_all(source, fake_codes, directory=tmp_path, **CODES)
    encode_all(source, fake_codes, directory=out, **CODES)
    assert content(out) == content(tmp_path)
    store_of = encode_all(source, lambda frames: calls.append(1), directory=out, **CODES)
    assert not calls
    for episode in source:
        for view in episode.views:
            expected = fake_codes(episode.frames(view, range(len(episode))))
            requests = store.counted(lambda: np.testing.assert_array_equal(store_of(episode, view), expected))  # noqa: B023
            assert not requests
    damaged = out / "episode_3" / "front.npy"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=f"^{damaged} is not the file that was written .*; delete it and start"):
        encode_all(source, fake_codes, directory=out, **CODES)
    damaged.unlink()
    encode_all(source, fake_codes, directory=out, **CODES)
    assert content(out) == content(tmp_path)


# s3://


def test_corpora_and_data_sets_in_s3(_s3, corpus, sets, tmp_path, tokenizer):  # noqa: F811
    place = files.place(f"s3://{stores.BUCKET}/corpus")
    files.copy_folder(corpus, place, last="corpus.json")
    source = open_source(f"records:{place}", DataConfig(), progress=False)
    same_episodes(source, open_source(f"records:{corpus}", DataConfig()))
    assert source.source == f"records:{place}" and str(source.corpus) == str(place)
    packing.prepare(source.corpus, make_config(place), tokenizer, (32, 64), progress=False)
    assert [p.name for p in (place / "plans").files()][-1] == "records.npy"
    other = files.place(f"s3://{stores.BUCKET}/egodex")
    files.copy_folder(sets["egodex"], other)
    opened = open_source(f"egodex:{other}", DataConfig(), progress=False)
    same_episodes(opened, open_source(f"egodex:{sets['egodex']}", DataConfig(), progress=False))
    out = files.place(f"s3://{stores.BUCKET}/tokenized")
    run(make_source(), out)
    run(make_source(), tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
