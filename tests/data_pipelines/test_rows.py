"""Batches from the array of rows are those of single episodes, bit for bit; the array follows its files."""

import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data_pipelines import demo, rows, statistics
from data_pipelines.corpus import records
from data_pipelines.episode import DataError
from data_pipelines.loader import Loader
from data_pipelines.rows import open_rows
from data_pipelines.sources import open_source, open_sources
from data_pipelines.sources.egodex import COLUMNS
from rynnvla_jax.config import ActionVAEConfig, DataConfig, TrainConfig
from rynnvla_jax.storage import files
from tests.recordings import write_calvin, write_egodex, write_hdf5, write_libero_hdf5, write_rlds

CHUNK = 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RYNNVLA_CACHE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "index"))
    return folder / "rows"


def egodex(root, counts=(14, 9, 30)):
    for number, count in enumerate(counts):
        write_egodex(root, count, name=str(number))
    return f"egodex:{root}"


def corpus(root):
    """Records of steps in a world frame."""
    codes = {"grid": (1, 1), "vqgan": "abc", "image": '{"shortest_edge": 16, "fit": "square"}'}
    layout = records.CorpusLayout(columns=COLUMNS, world=True, **codes)
    episodes = open_source(egodex(root / "egodex"), DataConfig())
    content = [
        {
            "clip_id": e.name,
            "captions": list(e.texts),
            "caption_of": e.text_of,
            "fps": e.fps,
            "front_codes": np.zeros((len(e), 1, 1), np.uint16),
            "state": e.state,
            "action": e.action,
            "origin": e.origin,
            "world_to_camera": e.world_to_camera,
        }
        for e in episodes
    ]
    records.write_shard(root / "corpus", 0, 1, content, layout)
    records.finish(root / "corpus", 1, {}, layout)
    return f"records:{root / 'corpus'}"


def hdf5(root):
    for number in range(3):
        write_hdf5(root / f"{number}.hdf5", 12 + number)
    return f"hdf5:{root}"


def libero(root):
    write_libero_hdf5(root / "a.hdf5", (12, 14))
    return f"libero:{root}"


KINDS = {
    "libero": libero,
    "egodex": egodex,
    "records": corpus,
    "hdf5": hdf5,
    "calvin": lambda root: f"calvin:{write_calvin(root / 'calvin', ((0, 7, 'open'), (3, 12, 'lift')))}",
    "rlds": lambda root: f"rlds:{write_rlds(root / 'toy' / '1.0.0', (9, 6, 12))}",
    "lerobot": lambda root: f"lerobot:{demo.path('so100')}",
}


def make_config(source, width=6, **data):
    mixture = {"mixture": source} if isinstance(source, tuple) else {"source": source}
    return TrainConfig(
        stage="action_vae",
        batch_size=4,
        data=DataConfig(chunk=CHUNK, num_threads=0, **mixture, **data),
        action_vae_model=ActionVAEConfig(chunk=CHUNK, action_dim=width),
    )


def take(loader, step=0, count=12, skipped=()):
    batches = loader.batches(step, skipped)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def loaders(config, **options):
    """One that gathers rows, and one that reads episodes."""
    sources = open_sources(config, progress=False)
    both = (sources, [replace(source, files=None) for source in sources])
    found = [Loader(config, sources=part, progress=False, **options) for part in both]
    assert all(found[0]._rows) and not any(found[1]._rows)
    return found


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and [x.dtype for x in one.values()] == [x.dtype for x in other.values()]
        for key in one:
            assert one[key].tobytes() == other[key].tobytes() and one[key].shape == other[key].shape, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalization", ["mean_std", "min_max"])
def test_batches_and_statistics_are_those_of_single_examples(tmp_path, kind, normalization):
    source = KINDS[kind](tmp_path)
    width = open_source(source, DataConfig(), (), progress=False).action_width
    config = make_config(source, width, normalization=normalization)
    gathered, single = loaders(config)
    for name, value in vars(single.statistics).items():
        np.testing.assert_array_equal(getattr(gathered.statistics, name), value, err_msg=name)
    assert_same(take(gathered, count=30), take(single, count=30))


def test_mixtures_resuming_skipping_and_processes(tmp_path):
    one, other = egodex(tmp_path / "one"), egodex(tmp_path / "other", (25,))
    config = make_config(((one, 1.0), (other, 2.5)))
    for options in ({}, {"rows": np.array([1, 3])}):
        gathered, single = loaders(config, **options)
        assert_same(take(gathered, count=40), take(single, count=40))
        assert_same(take(gathered, 7, 9, (8, 11)), take(single, 7, 9, (8, 11)))


def test_threads_and_worker_processes(tmp_path):
    config = make_config(egodex(tmp_path))
    alone = take(loaders(config)[0])
    for options in ({"num_threads": 2}, {"num_workers": 2}):
        assert_same(alone, take(loaders(replace(config, data=replace(config.data, **options)))[0]))


def test_all_chunks_at_once_are_the_chunks(tmp_path):
    """Against the formula of one chunk, written out: relative to the origin, then rotated into the camera's frame."""
    episode = open_source(egodex(tmp_path), DataConfig(), ())[2]
    every = np.arange(len(episode))
    found = episode.chunks(every, CHUNK)
    for start in every:
        moves = episode.action[start : start + CHUNK] - episode.origin[start : start + CHUNK]
        points = moves.reshape(len(moves), -1, 3)
        expected = np.einsum("ij,kpj->kpi", episode.world_to_camera[start], points).reshape(moves.shape)
        chunk = episode.chunk(int(start), CHUNK)
        assert chunk.dtype == np.float32 and chunk.tobytes() == expected.astype(np.float32).tobytes()
        assert found[start, : len(chunk)].tobytes() == chunk.tobytes()


def test_statistics_count_the_shortened_chunks_of_the_end(tmp_path, monkeypatch):
    config = make_config(egodex(tmp_path))
    (source,) = open_sources(config, progress=False)
    monkeypatch.setattr(statistics, "_PERCENTILE_ROWS", 40)  # so that every fifth start is sampled
    found = statistics.compute([source], CHUNK, False, rows=[open_rows(source, config.data, False)])
    every = [(e, start) for e in source for start in range(len(e))]
    chunks = [e.chunk(start, CHUNK) for e, start in every]
    stride = -(-len(every) * CHUNK // 40)
    np.testing.assert_allclose(found.rel_mean_action, np.concatenate(chunks).mean(0, np.float64), rtol=1e-5, atol=1e-8)
    low, _ = np.percentile(np.concatenate(chunks[::stride]), found.percentiles, axis=0)
    np.testing.assert_array_equal(found.rel_min_action, low)


# The array and its files


def prepared(tmp_path):
    config = make_config(egodex(tmp_path / "data")).data
    return config, lambda: open_source(config.source, config, (), progress=False)


def counted(source):
    seen = []

    def read(number):
        seen.append(number)
        return source.read(number)

    return replace(source, read=read), seen


def test_an_array_is_made_once_and_anew_for_other_files(tmp_path, cache, capfd):
    config, opened = prepared(tmp_path)
    first = open_rows(opened(), config, False)
    source, seen = counted(opened())
    assert open_rows(source, config, False).path == first.path and seen == [0, 0, 2]  # compared, not read as a whole
    file, _ = write_egodex(tmp_path / "data", 14, name="0")  # the same content, but who knows
    os.utime(file, ns=(1, 1))
    again = open_rows(opened(), config, False)
    assert again.path != first.path and list(cache.rglob("*.npy")) == [again.path]
    assert "rows" not in capfd.readouterr().err


def test_arrays_that_are_not_used_make_room(tmp_path, cache):
    config, opened = prepared(tmp_path)
    paths = []
    for number, days in enumerate((40, 40, 20, 0)):
        paths.append(open_rows(replace(opened(), source=f"egodex:{number}"), config, False).path)
        os.utime(paths[-1], (time.time() - 86400 * days,) * 2)
        if number == 1:
            open_rows(replace(opened(), source="egodex:1"), config, False)  # used again
    assert sorted(cache.rglob("*.npy")) == sorted(paths[1:])


def test_another_way_of_reading_is_noticed(tmp_path):
    """Files, sizes and times are the same, but the values that are read are not."""
    config, opened = prepared(tmp_path)
    open_rows(opened(), config, False)
    source = opened()
    half = replace(source, read=lambda i: replace(source.read(i), action=source.read(i).action / 2))
    np.testing.assert_array_equal(open_rows(half, config, False).episode(1).action, source[1].action / 2)


def test_settings_that_choose_rows_have_their_own_array(tmp_path):
    config, opened = prepared(tmp_path)
    path = open_rows(opened(), config, False).path
    files.write_json(tmp_path / "exclude.json", {"episodes": {config.source: ["part1/lift/1"]}})
    fewer = replace(config, exclude=str(tmp_path / "exclude.json"))
    other = open_rows(open_source(config.source, fewer, (), progress=False), fewer, False)
    assert other.path.parent != path.parent and other.lengths.tolist() == [13, 29]
    for indifferent in ({"chunk": 3}, {"num_workers": 2}, {"normalization": "min_max"}):
        assert open_rows(opened(), replace(config, **indifferent), False).path == path


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"no array", lambda b: b"", lambda b: b[:128]])
def test_a_damaged_array_is_made_again(tmp_path, capfd, damage):
    config, opened = prepared(tmp_path)
    found = open_rows(opened(), config, False)
    whole = found.path.read_bytes()
    found.path.write_bytes(damage(whole))
    assert open_rows(opened(), config, False).path.read_bytes() == whole
    assert "it is made again" in capfd.readouterr().err


def test_processes_that_start_together_make_it_once(tmp_path):
    config, opened = prepared(tmp_path)
    sources, seen = zip(*(counted(opened()) for _ in range(4)), strict=True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: open_rows(source, config, False), sources))
    assert len({f.path for f in found}) == 1
    assert sorted(map(len, seen)) == [3, 3, 3, 4]  # first, and all of one; first, and both that are compared


def test_what_a_killed_process_left_is_removed(tmp_path, cache, monkeypatch):
    config, opened = prepared(tmp_path)

    def killed(partial, path):
        shutil.copyfile(partial, partial.with_name(partial.name.replace(partial.name[-16:-8], "01234567")))
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.files, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        open_rows(opened(), config, False)
    assert [p.suffix for p in cache.rglob(".*")] == [".partial"]
    monkeypatch.undo()
    monkeypatch.setenv("RYNNVLA_CACHE", str(cache.parent))
    open_rows(opened(), config, False)
    assert {p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".npy"} == {"build.lock"}


def full_before(monkeypatch):
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))


def full_meanwhile(monkeypatch):
    def put(partial, path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(rows.files, "put", put)


@pytest.mark.parametrize("full", [full_before, full_meanwhile])
def test_a_full_disk_is_said_and_training_goes_on(tmp_path, cache, monkeypatch, capfd, full):
    config = make_config(egodex(tmp_path))
    expected = take(loaders(config)[1])
    shutil.rmtree(cache)
    full(monkeypatch)
    loader = Loader(config, progress=False)
    (line,) = capfd.readouterr().err.splitlines()
    assert config.data.source in line and str(cache) in line and "set RYNNVLA_CACHE" in line
    assert "o space left" in line or "do not fit" in line
    assert_same(take(loader), expected)
    assert not [p for p in cache.rglob("*") if p.is_file() and p.name != "build.lock"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "file"))
    config, opened = prepared(tmp_path)
    assert open_rows(opened(), config, False) is None
    assert "Not a directory" in capfd.readouterr().err


def test_a_damaged_episode_leaves_the_recordings_to_be_read(tmp_path, capfd):
    config, opened = prepared(tmp_path)
    source = opened()

    def read(number):
        if number == 1:
            raise DataError("part1/lift/1.hdf5 cannot be read; copy it again")
        return source.read(number)

    assert open_rows(replace(source, read=read), config, False) is None
    assert "part1/lift/1.hdf5 cannot be read" in capfd.readouterr().err


def test_memory_does_not_hold_the_array(tmp_path):
    """What is pickled for a worker process is small, and what it reads is mapped."""
    config, opened = prepared(tmp_path)
    found = open_rows(opened(), config, False)
    found.chunks(np.array([0]), np.array([0]), 2)
    data = pickle.dumps(found)
    assert len(data) < 3000
    again = pickle.loads(data)
    assert again._table.base is not None and not again._table.flags.owndata and not again._table.flags.writeable
    np.testing.assert_array_equal(again.episode(2).world_to_camera, opened()[2].world_to_camera)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_knows_its_rate(tmp_path, kind):
    """Here because all kinds are made here."""
    source = open_source(KINDS[kind](tmp_path), DataConfig(), (), progress=False)
    assert source.rates == ({"rlds": 10.0, "libero": 20.0}.get(kind, 30.0),)
