"""Which episodes are held out depends on their names alone; nothing that is trained on, counted or packed has them."""

import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import held_out
from data_pipelines.corpus import records
from data_pipelines.episode import DataError, Episodes
from data_pipelines.loader import Loader
from data_pipelines.sources import open_source
from rynnvla_jax.config import ConfigError, DataConfig, EvaluationConfig, from_dict
from tests.data_pipelines import test_loader as loaders
from tests.data_pipelines import test_records as corpora
from tests.data_pipelines import test_rows as rows

corpus, corpus_tokenizer, task_tokenizer = corpora.corpus, corpora.tokenizer, loaders.tokenizer  # fixtures
take = corpora.take


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "index"))


def chosen(names, share=0.2, seed=0):
    return {name for name in names if held_out.position("lerobot", name, seed) < share * 2**64}


@given(
    names=st.sets(st.text(), max_size=30),
    more=st.sets(st.text(), max_size=30),
    shares=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
)
def test_added_episodes_move_none_across_and_a_larger_share_only_adds(names, more, shares):
    few, many = sorted(shares)
    assert chosen(names | more, many) & names == chosen(names, many) >= chosen(names, few)


@pytest.mark.parametrize("pattern", ["episode_{:06d}", "lift cup/{}.hdf5", "demo/{} again.mp4", "{}"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_neighbouring_episodes_give_their_share(pattern, step):
    """Of one instruction that was recorded in a row, or in turn with others. Chance alone would often give 2 or 9."""
    for seed in range(20):
        for first in (0, 50, 1234):
            names = [pattern.format(first + i * step) for i in range(50)]
            count = len(chosen(names, 0.1, seed))
            assert abs(count - 5) <= (2 if step == 1 else 4), (seed, first)
    names = [pattern.format(i) for i in range(1000)]
    assert abs(len(chosen(names, 0.1)) - 100) < 4
    assert chosen(names, 0.1, seed=1) != chosen(names, 0.1)


def test_a_name_without_a_number_is_drawn_by_its_text():
    names = ["".join(c) for c in zip(*[iter("the quick brown fox jumps over the lazy dog" * 40)] * 4, strict=False)]
    assert 0.1 < len(chosen(set(names), 0.3)) / len(set(names)) < 0.5


@pytest.mark.parametrize("kind", rows.KINDS)
def test_parts_of_every_kind_of_source(tmp_path, kind):
    """What is known of a part without reading it is what its episodes say."""
    source = open_source(rows.KINDS[kind](tmp_path), DataConfig(), (), progress=False)
    episodes = list(source)
    told = list(source.summaries())
    assert [t.name for t in told] == [e.name for e in episodes]
    assert [t.fps for t in told] == pytest.approx([e.fps for e in episodes])
    if kind != "records":
        assert [set(t.texts) for t in told] == [set(e.texts) for e in episodes]
    share = EvaluationConfig(share=0.5)
    for seed in range(20):
        try:
            (parts,) = held_out.split([source], replace(share, seed=seed))
            break
        except DataError:
            continue
    names = []
    for part in (parts.train, parts.held_out):
        part = pickle.loads(pickle.dumps(part))  # as it goes to worker processes
        here = list(part)
        names += [e.name for e in here]
        np.testing.assert_array_equal(part.lengths, [len(e) for e in here])
        assert part.seconds == pytest.approx(sum(len(e) / e.fps for e in here))
        assert set(part.texts) == (set() if kind == "records" else {text for e in here for text in e.texts})
        assert part.source == source.source
    assert sorted(names) == sorted(e.name for e in episodes)


def complement(source, config):
    """The training part, made of its episodes alone."""
    (parts,) = held_out.split([source], config.evaluation)
    return Episodes.of([source[int(i)] for i in parts.train.kept], source.source)


@pytest.mark.parametrize("stage", ["robot", "action_vae", "video", "vqgan"])
def test_a_run_is_that_of_the_other_episodes_alone(stage, task_tokenizer):
    tokens = stage in ("robot", "video")
    c = loaders.make_config(stage, image=replace(loaders.IMAGE, jitter=0.2))
    c = replace(c, evaluation=EvaluationConfig(share=0.4, seed=3))
    source = loaders.make_source((30, 41, 9, 25, 33, 28, 40))
    vocabulary = task_tokenizer if tokens else None
    whole = Loader(c, tokenizer=vocabulary, sources=[source], progress=False)
    alone = Loader(
        replace(c, evaluation=EvaluationConfig()),
        tokenizer=vocabulary,
        sources=[complement(source, c)],
        progress=False,
    )
    assert len(whole.splits[0].held_out) > 0 and len(whole.sources[0]) + len(whole.splits[0].held_out) == 7
    for one, other in zip(take(whole, 0, 6), take(alone, 0, 6), strict=True):
        loaders.assert_same(one, other)
    if whole.statistics:
        for name, value in vars(alone.statistics).items():
            np.testing.assert_array_equal(getattr(whole.statistics, name), value, err_msg=name)


def test_a_mixture_of_gathered_rows(tmp_path):
    """One array of rows serves whole source and parts; so do worker processes."""
    one, other = rows.egodex(tmp_path / "one", (14, 9, 30, 20)), rows.egodex(tmp_path / "other", (25, 12, 13))
    c = replace(rows.make_config(((one, 1.0), (other, 2.5))), evaluation=EvaluationConfig(share=0.4, seed=1))
    gathered = Loader(c, progress=False)
    assert all(gathered._rows) and len(list((tmp_path / "cache" / "rows").rglob("*.npy"))) == 2
    alone = [complement(source, c) for source in gathered.opened]
    single = Loader(replace(c, evaluation=EvaluationConfig()), sources=alone, progress=False)
    for a, b in zip(take(gathered, 0, 20), take(single, 0, 20), strict=True):
        loaders.assert_same(a, b)
    for name, value in vars(single.statistics).items():
        np.testing.assert_array_equal(getattr(gathered.statistics, name), value, err_msg=name)


@pytest.mark.parametrize("clips", [1, 3])
def test_plans_of_a_corpus_hold_the_trained_records_alone(corpus, corpus_tokenizer, clips):
    config = corpora.make_config(corpus, clips=clips, length=260)
    whole = Loader(config, tokenizer=corpus_tokenizer, progress=False)
    seen = {}
    for seed in range(30):
        c = replace(config, evaluation=EvaluationConfig(share=0.4, seed=seed))
        try:
            loader = Loader(c, tokenizer=corpus_tokenizer, progress=False)
        except DataError:
            continue
        names = {loader.sources[0][int(i)].name for i in loader._examples[0].plan.records}
        out = {e.name for e in loader.splits[0].held_out}
        assert names == {f"clip{i}" for i in (0, 1, 3, 4, 5, 6)} - out
        assert 0 < len(out) < 7 and len(loader.sources[0]) + len(out) == 7
        for batch in take(loader, 0, 3):
            state = batch["state"][batch["state_positions"] >= 0][:, 0]
            mean, std = loader.statistics.mean_state[0], loader.statistics.std_state[0]
            assert {f"clip{round(float(x)) // 100}" for x in state * std + mean} <= names
        seen[seed] = out
        if len(seen) == 3:
            break
    again = Loader(config, tokenizer=corpus_tokenizer, progress=False)
    np.testing.assert_array_equal(again._examples[0].plan.records, whole._examples[0].plan.records)


def test_a_tokenized_corpus_holds_out_what_its_origin_does(corpus):
    source = open_source(f"records:{corpus}", DataConfig(), (), progress=False)
    assert held_out.kind_of(source) == "records"
    records.finish(corpus, 2, {"source": "lerobot:/data/a"}, corpora.LAYOUT)
    assert held_out.kind_of(open_source(f"records:{corpus}", DataConfig(), (), progress=False)) == "lerobot"


def test_shares_that_leave_nothing_are_refused_with_one_that_does():
    source = loaders.make_source((30, 41, 30, 25))
    few, most = (EvaluationConfig(share=share, seed=5) for share in (1e-6, 0.999999))
    for config, message in ((few, "holds out none of 4 episodes"), (most, "leaves none of its 4 episodes to train on")):
        with pytest.raises(DataError, match=f"painted:frames: evaluation.share .* {message}") as error:
            held_out.split([source], config)
        share = float(re.search(r"set it to ([0-9.]+)", str(error.value))[1])
        (parts,) = held_out.split([source], replace(config, share=share))
        assert len(parts.train) and len(parts.held_out)
    with pytest.raises(DataError, match="holds out none of 1 episodes; name other data in evaluation.sources"):
        held_out.split([loaders.make_source((30,))], few)


def test_what_is_held_out_is_told_by_instruction():
    source = loaders.make_source((30,) * 6)
    counts = Counter()
    for seed in range(30):
        try:
            (parts,) = held_out.split([source], EvaluationConfig(share=0.3, seed=seed))
        except DataError:
            continue
        out = [e.texts[0] for e in parts.held_out]
        assert parts.said.startswith(f"painted:frames: {len(out)} of 6 episodes, of {len(set(out))} of 3 instructions")
        missing = sorted({"task a", "task b", "task c"} - set(out))
        whole = sorted(t for t in set(out) if out.count(t) == 2)
        assert ("; none of" in parts.said) == bool(missing) and all(f"'{text}'" in parts.said for text in missing)
        assert ("; not trained on:" in parts.said) == bool(whole) and all(f"'{text}'" in parts.said for text in whole)
        counts[bool(missing), bool(whole)] += 1
    assert len(counts) > 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"share": 1.0}, "evaluation.share is 1.0; it must be from 0 to below 1"),
        ({"share": -0.1}, "evaluation.share is -0.1"),
        ({"every_steps": -1}, "evaluation.every_steps is -1; it must be at least 0"),
        ({"examples": 0}, "evaluation.examples is 0; it must be at least 1"),
        ({"seed": -1}, "evaluation.seed is -1"),
        (
            {"share": 0.1, "sources": ["lerobot:a"]},
            "evaluation.share 0.1 and evaluation.sources are both set; leave one",
        ),
        ({"shar": 0.1}, "unknown key config.shar.* Did you mean config.share"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(EvaluationConfig, values)
