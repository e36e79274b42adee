"""`rynnvla data tokenize`: codes are those of the frames, interrupted or not, and stages train from what it writes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.checks import image_key
from data_pipelines.corpus import records
from data_pipelines.corpus.packing import prepare
from data_pipelines.episode import DataError, Episodes
from data_pipelines.loader import Loader
from data_pipelines.sources import open_source
from rynnvla_jax import config_file
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import DataConfig, ImageConfig
from rynnvla_jax.images import preprocess
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.inference.tokenize import split, tokenize
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from rynnvla_jax.vocabulary import TextTokenizer
from tests import tiny
from tests.data_pipelines.test_loader import IMAGE, LENGTHS, Broken, fake_codes, make_episodes, make_source


class FakeCodec:
    """`fake_codes` in batches of 7, which no segment's length is a multiple of; counts its calls."""

    batch, fingerprint = 7, "abc"

    def __init__(self, limit=10**9):
        self.calls, self.limit = 0, limit

    def start(self, frames):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        assert len(frames) <= self.batch
        return fake_codes(np.pad(frames, ((0, self.batch - len(frames)), (0, 0), (0, 0), (0, 0))))


def run(source, out, stride=1, limit=10**9, shard_bytes=600):
    codec = FakeCodec(limit)
    return tokenize(source, codec, IMAGE, stride, out, shard_bytes), codec


@pytest.mark.parametrize("stride", [1, 4])
def test_codes_are_those_of_the_frames(tmp_path, stride):
    source = make_source()
    run(source, tmp_path / "corpus", stride)
    corpus = open_source(f"records:{tmp_path / 'corpus'}", DataConfig())
    assert len(records.read_corpus(tmp_path / "corpus")[0]["shard_lengths"]) > 1
    assert corpus.lengths.tolist() == list(LENGTHS) and corpus.columns.robot == "degrees"
    for ours, theirs in zip(corpus, source, strict=True):
        assert (ours.name, ours.texts, ours.stride) == (theirs.name, theirs.texts, stride)
        np.testing.assert_array_equal(ours.action, theirs.action)
        for view in ("front", "wrist"):
            expected = fake_codes(theirs.frames(view, range(0, len(theirs), stride)))
            np.testing.assert_array_equal(ours.codes[view], expected)


def test_an_interrupted_corpus_is_continued_to_the_same_bytes(tmp_path):
    source = make_source()
    _, whole = run(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "broken", limit=whole.calls // 2)
    with pytest.raises(DataError, match="corpus.json is missing: this is not a corpus, or it is not finished"):
        open_source(f"records:{tmp_path / 'broken'}", DataConfig())
    _, rest = run(source, tmp_path / "broken")
    assert 0 < rest.calls < whole.calls
    names = sorted(p.name for p in (tmp_path / "whole").glob("corpus-train*"))
    assert names == sorted(p.name for p in (tmp_path / "broken").glob("corpus-train*"))
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert run(source, tmp_path / "broken")[1].calls == 0
    with pytest.raises(DataError, match=r"was started with layout\.stride 1, not \d+; choose another --out"):
        run(source, tmp_path / "broken", stride=2)


def test_an_episode_that_cannot_be_read_is_left_out_and_counted(tmp_path):
    episodes = make_episodes()
    episodes[1] = replace(episodes[1], views={**episodes[1].views, "wrist": Broken(0, bad=17)})
    done, _ = run(Episodes.of(episodes, "painted:frames"), tmp_path)
    assert done["left_out"] == 1
    corpus = open_source(f"records:{tmp_path}", DataConfig())
    assert [e.name for e in corpus] == ["episode_0", "episode_2", "episode_3"]
    (file,) = [p for p in (tmp_path / "left_out").glob("*.json")]
    assert "frame 17 is damaged" in json.loads(file.read_text(encoding="utf-8"))["episode 1"]
    np.testing.assert_array_equal(corpus[1].codes["front"], fake_codes(episodes[2].frames("front", range(9))))


def test_what_a_killed_run_left_out_counts_no_more_when_it_can_be_read(tmp_path, monkeypatch):
    episodes = make_episodes()
    damaged = replace(episodes[1], views={**episodes[1].views, "wrist": Broken(0, bad=17)})
    rename = os.replace

    def kill(aside, final):
        if "corpus-train" in str(final):
            raise KeyboardInterrupt
        rename(aside, final)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        run(Episodes.of([episodes[0], damaged, *episodes[2:]], "painted:frames"), tmp_path, shard_bytes=10**9)
    monkeypatch.undo()
    assert list((tmp_path / "left_out").iterdir())
    done, _ = run(Episodes.of(episodes, "painted:frames"), tmp_path, shard_bytes=10**9)
    assert done["left_out"] == 0 and records.read_corpus(tmp_path)[0]["records"] == len(episodes)


def test_shards_are_contiguous_and_of_a_size():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    layout = records.CorpusLayout(grid=(24, 24))
    parts = split(lengths, layout, 2**20, 3)
    assert [n for part in parts for n in part] == list(range(1000))
    sizes = [int(lengths[list(part)].sum()) * (24 * 24 * 2 + 4) for part in parts]
    assert max(sizes) < 1.15 * 2**20 and min(sizes) > 0.85 * sizes[0]
    assert len(split(lengths, layout, 2**40, 3)) == 3  # each of three processes has one


@pytest.fixture(scope="module")
def corpora(assets, tmp_path_factory):
    """Tiny assets, and the demo data tokenized by the command."""
    path = tmp_path_factory.mktemp("corpora")
    shutil.copytree(Path(assets["vqgan"]).parent, path, dirs_exist_ok=True)
    for source, name in ((tiny.EGODEX, "egodex"), (tiny.SO100, "so100")):
        words = ["data", "tokenize", "--source", source, "--vqgan", path / "vqgan", "--out", path / name, "--batch", 40]
        words += ["--config.data.image.shortest_edge=64", "--config.data.image.fit=square", "--views", "front"]
        assert cli.main([str(w) for w in words]) == 0
    return path


def config(corpora, stage, source, **overrides):
    return tiny.typed(
        tiny.config(
            stage,
            "",
            **{
                "data.mixture": source,
                "data.frame_codes": "ahead",
                "data.image.fit": "square",
                "sequence.use_wrist_frame": False,
                "tokenizer": str(corpora / "tokenizer.json"),
                "vqgan": str(corpora / "vqgan"),
                **overrides,
            },
        )
    )


@pytest.mark.parametrize(
    "more, said",
    [
        (["--views", "top"], "--views is 'top'; give some of front,wrist"),
        (["--views", "wrist"], "front must be among them"),
        (["--views", "front,wrist", "--source", tiny.EGODEX], "no wrist camera; leave wrist out of --views"),
        (["--views", "front, wrist", "--stride", "0"], "must be at least 1"),
        (["--views", "front, wrist", "--out", "FILE"], "Not a directory: "),
        (["--out", "FILE/below"], "Not a directory: "),
    ],
)
def test_what_cannot_be_is_one_line(corpora, tmp_path, more, said, capsys):
    (tmp_path / "file").touch()
    words = ["data", "tokenize", "--source", tiny.SO100, "--vqgan", corpora / "vqgan", "--out", tmp_path / "new"]
    words += ["--config.data.image.shortest_edge=64", *(word.replace("FILE", f"{tmp_path}/file") for word in more)]
    assert cli.main([str(w) for w in words])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("rynnvla data tokenize: ")]
    assert said in line


def test_the_printed_keys_train_from_the_corpus(corpora, tmp_path, capsys):
    """The tokenizer comes from a command, too: no public file is needed."""
    words = ["data", "tokenizer", tiny.EGODEX, f"records:{corpora / 'so100'}", "--vqgan", corpora / "vqgan"]
    words += ["--out", tmp_path / "tokenizer.json"]
    assert cli.main([str(w) for w in words]) == 0
    said = capsys.readouterr().out
    assert f"--config.tokenizer={tmp_path}/tokenizer.json" in said
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary.num_codes == TextTokenizer(corpora / "tokenizer.json").vocabulary.num_codes
    for name in (tiny.EGODEX, tiny.SO100):  # the corpus's captions are those of its data set
        for text in open_source(name, DataConfig(), ()).texts:  # every word has become one token
            assert len(tokenizer.encode(text)) <= 1 + len(re.findall(r"\w+|[^\w\s]", text))
    assert cli.main([str(w) for w in words]) == 1 and "exists" in capsys.readouterr().err

    words = ["data", "tokenize", "--source", tiny.EGODEX, "--vqgan", corpora / "vqgan", "--out", corpora / "egodex"]
    words += ["--config.data.image.shortest_edge=64", "--config.data.image.fit=square", "--views", "front"]
    assert cli.main([str(w) for w in words]) == 0  # it is there: only the summary is printed again
    keys = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--config.data.image.fit=square" in keys and "--config.sequence.use_wrist_frame=False" in keys
    keys += [f"--config.tokenizer={tmp_path}/tokenizer.json", "--config.sequence.length=320", "--config.batch_size=2"]
    built = config_file.load("configs/video.py:7b", keys).build()
    loader = Loader(built, tokenizer=tokenizer, progress=False)
    assert loader.frame_size == (64, 64) and loader.num_examples == 4


def test_a_corpus_gives_the_tokens_of_the_encoder_in_the_step(corpora):
    """Row by row, the corpus's tokens are those of the same window encoded by the JAX model directly."""
    c = config(corpora, "video", ((f"records:{corpora / 'egodex'}", 1.0),))
    tokenizer = TextTokenizer(corpora / "tokenizer.json")
    source = open_source(tiny.EGODEX, DataConfig())
    codec, image = FrameCodec.load(corpora / "vqgan"), ImageConfig(shortest_edge=64, fit="square")
    corpus = open_source(f"records:{corpora / 'egodex'}", DataConfig())
    layout = records.read_corpus(corpora / "egodex")[1]
    assert layout.vqgan == codec.fingerprint and layout.image == image_key(DataConfig(image=image))
    for i in (0, len(source) - 1):
        frames = np.stack([preprocess(f, image) for f in source[i].frames("front", range(5, 13))])
        np.testing.assert_array_equal(codec.encode(frames), corpus[i].codes["front"][5:13])
    assert (
        "4 sequences of 192 tokens hold 4 records"
        in prepare(corpora / "egodex", c, tokenizer, (64, 64), progress=False).describe()
    )


def test_stage_1_trains_from_a_mixture_of_corpora_and_resumes(corpora, tmp_path, capfd):
    mixture = ((f"records:{corpora / 'egodex'}", 0.7), (f"records:{corpora / 'so100'}", 0.3))
    c = config(corpora, "video", mixture, batch_size=8)
    train(c, tmp_path / "whole")
    said = capfd.readouterr().err
    assert "70.0 %, records:" in said and "30.0 %, records:" in said and "6 sequences" in said and "4 sequences" in said
    train(replace(c, total_steps=3), tmp_path / "parts")
    train(c, tmp_path / "parts")
    assert metrics.read(tmp_path / "parts") == metrics.read(tmp_path / "whole")


def test_stage_2_trains_from_a_packed_corpus(corpora, tmp_path):
    c = config(
        corpora,
        "trajectory",
        ((f"records:{corpora / 'egodex'}", 1.0),),
        **{"sequence.clips": 2, "sequence.length": 240, "action_vae": str(corpora / "vae_hand"), "batch_size": 8},
        total_steps=2,
    )
    loader = Loader(c, tokenizer=TextTokenizer(corpora / "tokenizer.json"), progress=False)
    assert loader.num_examples == 2  # four clips, two a sequence
    logged = train(c, tmp_path)
    assert np.isfinite(logged["action_l1"]) and np.isfinite(logged["cross_entropy"])


def test_codes_of_another_vqgan_are_refused(corpora, tmp_path):
    c = config(corpora, "video", ((f"records:{corpora / 'egodex'}", 1.0),))
    other = tmp_path / "corpus"
    shutil.copytree(corpora / "egodex", other)
    about = json.loads((other / "corpus.json").read_text(encoding="utf-8"))
    about["layout"]["vqgan"] = "0" * 64
    (other / "corpus.json").write_text(json.dumps(about), encoding="utf-8")
    wrong = replace(c, data=replace(c.data, mixture=((f"records:{other}", 1.0),)))
    with pytest.raises(ValueError, match="tokenized by a different VQGAN .weights 000000000000"):
        train(wrong, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_share_the_shards_out(corpora, tmp_path):
    words = [
        sys.executable,
        "-m",
        "rynnvla_jax.cli",
        "launch",
        "local",
        "--processes",
        "2",
        "--",
        "data",
        "tokenize",
    ]
    words += ["--source", tiny.EGODEX, "--vqgan", corpora / "vqgan", "--out", tmp_path / "two"]
    words += ["--config.data.image.shortest_edge=64", "--config.data.image.fit=square"]
    subprocess.run([str(w) for w in words], check=True, env={**os.environ, "XLA_FLAGS": ""})
    two, one = (open_source(f"records:{p}", DataConfig()) for p in (tmp_path / "two", corpora / "egodex"))
    assert len(records.read_corpus(tmp_path / "two")[0]["shard_lengths"]) == 2
    assert [e.name for e in two] == [e.name for e in one]
    for a, b in zip(two, one, strict=True):
        np.testing.assert_array_equal(a.codes["front"], b.codes["front"])
