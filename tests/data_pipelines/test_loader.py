"""Order is a function of (seed, step) alone; shapes and meaning of every stage's batch; errors before training."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.corpus.codes import CodeStore, encode_all
from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.loader import Loader
from data_pipelines.sources import open_source
from rynnvla_jax.actions import decode_chunk, normalize_state
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import (
    ActionVAEConfig,
    ConfigError,
    DataConfig,
    ImageConfig,
    SequenceConfig,
    TrainConfig,
    VLAConfig,
    from_dict,
    to_dict,
)
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer

LENGTHS = (30, 41, 9, 25)  # one too short for a chunk and its frames
COLUMNS = Columns.unstated("degrees", 6, 6, (5,))
CHUNK, FRAMES = 8, 2
IMAGE = ImageConfig(shortest_edge=32)


@dataclass(frozen=True)
class Painted:
    """Frames whose brightness is the step, so that a pixel tells where it comes from."""

    offset: int
    height: int = 32
    width: int = 64

    def frames(self, indices):
        values = (self.offset + np.asarray(indices)).astype(np.uint8)
        return np.broadcast_to(values[:, None, None, None], (len(values), self.height, self.width, 3)).copy()


def make_episodes(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    episodes, first = [], 0
    for i, n in enumerate(lengths):
        state = generator.normal(size=(n, 6)).astype(np.float32)
        state[:, 0] = first + np.arange(n)  # the step's number in the whole set
        episodes.append(
            Episode(
                name=f"episode_{i}",
                texts=(f"task {'abc'[i % 3]}",),
                text_of=np.zeros(n, np.int32),
                fps=30.0,
                state=state,
                action=state + 0.5,
                columns=COLUMNS,
                views={"front": Painted(first), "wrist": Painted(100 + first)},
            )
        )
        first += n
    return episodes


def make_source(lengths=LENGTHS):
    return Episodes.of(make_episodes(lengths), "painted:frames")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["task a", "task b", "task c"], num_codes=32), encoding="utf-8")
    return TextTokenizer(path)


def make_config(stage="robot", batch_size=4, seed=0, image=IMAGE, wrist=True, length=256, **data):
    return TrainConfig(
        stage=stage,
        seed=seed,
        batch_size=batch_size,
        data=DataConfig(chunk=CHUNK, image=image, **data),
        sequence=SequenceConfig(length=length, num_frames=FRAMES, use_wrist_frame=wrist),
    )


def make_loader(config, tokenizer, **kwargs):
    return Loader(config, tokenizer=tokenizer, sources=[make_source()], progress=False, **kwargs)


def take(loader, step, count):
    batches = loader.batches(step)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def numbers(batch, loader):
    """The first step's number in the whole set, read back from the normalised state."""
    statistics = loader.statistics
    return np.rint(batch["state"][:, 0, 0] * statistics.std_state[0] + statistics.mean_state[0]).astype(int)


def rows(batch):
    """Every row as bytes, over all keys."""
    return sorted(b"".join(batch[k][i].tobytes() for k in sorted(batch)) for i in range(len(batch["tokens"])))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(tokenizer, processes):
    config = make_config(image=replace(IMAGE, jitter=0.3))
    alone = take(make_loader(config, tokenizer), 0, 5)
    every = np.arange(config.batch_size)
    loaders = [make_loader(config, tokenizer, rows=every[i::processes]) for i in range(processes)]
    parts = [take(loader, 0, 5) for loader in loaders]
    for step, whole in enumerate(alone):
        together = {k: np.concatenate([part[step][k] for part in parts]) for k in whole}
        assert len(parts[0][step]["tokens"]) == 4 // processes
        assert rows(together) == rows(whole)
        for i in range(processes):
            assert_same(parts[i][step], {k: v[i::processes] for k, v in whole.items()})


def test_batches_that_are_left_out_leave_no_gap(tokenizer):
    config = make_config(image=replace(IMAGE, jitter=0.3))
    whole = take(make_loader(config, tokenizer), 0, 24)  # more than one epoch
    kept = [batch for i, batch in enumerate(whole) if i not in (2, 3, 17)]
    loader = make_loader(config, tokenizer)
    for step in (0, 2, 9):
        batches = loader.batches(step, skipped=(17, 2, 3))
        for expected in kept[step:]:
            assert_same(next(batches), expected)
        batches.close()


def test_resuming_at_a_step_gives_the_batches_of_a_run_from_zero(tokenizer):
    config = make_config(image=replace(IMAGE, jitter=0.3))
    straight = take(make_loader(config, tokenizer), 0, 30)  # more than one epoch of 66 examples
    for step in (1, 7, 25):
        for resumed, expected in zip(take(make_loader(config, tokenizer), step, 4), straight[step:], strict=False):
            assert_same(resumed, expected)


def test_threads_do_not_change_the_order(tokenizer):
    plain = take(make_loader(make_config(num_threads=0), tokenizer), 3, 4)
    threaded = take(make_loader(make_config(num_threads=3), tokenizer), 3, 4)
    for a, b in zip(plain, threaded, strict=True):
        assert_same(a, b)


def test_worker_processes_do_not_change_the_order(tokenizer):
    source = f"lerobot:{demo.path('so100')}"
    batches = []
    for workers in (0, 2):
        config = make_config(image=ImageConfig(shortest_edge=32, jitter=0.2), source=source, num_workers=workers)
        batches.append(take(Loader(config, tokenizer=tokenizer, progress=False), 2, 3))
    for a, b in zip(*batches, strict=True):
        assert_same(a, b)


def test_seed_changes_the_order(tokenizer):
    first = make_loader(make_config(seed=0), tokenizer)
    second = make_loader(make_config(seed=1), tokenizer)
    a, b = take(first, 0, 5), take(second, 0, 5)
    assert [numbers(x, first).tolist() for x in a] != [numbers(x, second).tolist() for x in b]


def test_an_epoch_holds_every_window_of_unequal_episodes_once(tokenizer):
    loader = make_loader(make_config(batch_size=1), tokenizer)
    windows = [max(0, n - CHUNK - FRAMES) for n in LENGTHS]
    assert loader.num_examples == sum(windows) == 66
    first = np.cumsum([0, *LENGTHS[:-1]])
    expected = [f + i for f, w in zip(first, windows, strict=True) for i in range(w)]
    epochs = [[int(numbers(b, loader)[0]) for b in take(loader, e * 66, 66)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1] and epochs[0] != expected


def test_number_of_examples_of_each_stage(tokenizer):
    counts = {
        "robot": sum(max(0, n - CHUNK - FRAMES) for n in LENGTHS),
        "action_vae": sum(max(0, n - CHUNK) for n in LENGTHS),
        "video": sum(n - FRAMES + 1 for n in LENGTHS),
        "vqgan": 2 * sum(LENGTHS),
    }
    for stage, count in counts.items():
        assert make_loader(make_config(stage), tokenizer).num_examples == count


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("wrist", [True, False])
@pytest.mark.parametrize("clips", [1, 2])
def test_batches_are_what_the_stage_says(tokenizer, stage, wrist, clips):
    """Names, shapes and types, which the train step is lowered from before there is a batch."""
    config = make_config(stage, wrist=wrist, length=512)
    config = replace(config, sequence=replace(config.sequence, clips=clips))
    loader = make_loader(config, tokenizer)
    (batch,) = take(loader, 0, 1)
    spec = STAGES[stage].batch_spec(config, loader.frame_size)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (s, np.dtype(d)) for k, (s, d) in spec.items()}


@pytest.mark.parametrize("stage", ["video", "robot"])
def test_batches_with_codes_made_ahead_are_what_the_stage_says(tokenizer, stage):
    config = make_config(stage, frame_codes="ahead")
    grid = IMAGE.shortest_edge // 16, IMAGE.shortest_edge // 16 * 2
    codes = [lambda episode, view: np.zeros((len(episode), *grid), np.uint16)]
    (batch,) = take(make_loader(config, tokenizer, codes=codes), 0, 1)
    spec = STAGES[stage].batch_spec(config)
    assert not {"front", "wrist"} & batch.keys()
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (s, np.dtype(d)) for k, (s, d) in spec.items()}


@pytest.mark.parametrize("stage", ["robot", "trajectory"])
def test_batches_of_robot_and_trajectory(tokenizer, stage):
    loader = make_loader(make_config(stage, wrist=stage == "robot"), tokenizer)
    (batch,) = take(loader, 0, 1)
    shapes = {
        "tokens": ("int32", (4, 256)),
        "loss_mask": ("bool", (4, 256)),
        "front": ("uint8", (4, FRAMES, 32, 64, 3)),
        "state": ("float32", (4, FRAMES, 6)),
        "actions": ("float32", (4, FRAMES, CHUNK, 6)),
        "actions_pad": ("bool", (4, FRAMES, CHUNK)),
        "state_positions": ("int32", (4, FRAMES)),
        "action_positions": ("int32", (4, FRAMES)),
    }
    if stage == "robot":
        shapes["wrist"] = ("uint8", (4, FRAMES, 32, 64, 3))
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == shapes
    vocabulary = tokenizer.vocabulary
    assert (np.take_along_axis(batch["tokens"], batch["state_positions"], 1) == vocabulary.state).all()
    assert (np.take_along_axis(batch["tokens"], batch["action_positions"], 1) == vocabulary.action).all()


def test_rows_belong_together(tokenizer):
    """Text, frames, state and chunk of a row come from the same steps of the same episode."""
    episodes = make_episodes()
    first = np.cumsum([0, *LENGTHS[:-1]])
    loader = make_loader(make_config(), tokenizer)
    for batch in take(loader, 0, 8):
        for row, number in enumerate(numbers(batch, loader)):
            which = int(np.searchsorted(first, number, side="right")) - 1
            episode, start = episodes[which], number - first[which]
            ids = tokenizer.encode(episode.text(0))
            np.testing.assert_array_equal(batch["tokens"][row, : len(ids)], ids)
            for t in range(FRAMES):
                assert (batch["front"][row, t] == number + t).all() and (
                    batch["wrist"][row, t] == 100 + number + t
                ).all()
                np.testing.assert_allclose(
                    batch["state"][row, t], normalize_state(episode.state[start + t], loader.statistics), atol=1e-6
                )
                decoded = decode_chunk(batch["actions"][row, t], episode.state[start + t], loader.statistics)
                np.testing.assert_allclose(decoded, episode.action[start + t : start + t + CHUNK], atol=1e-3)
    assert not batch["actions_pad"].any()


def test_video_stage_has_no_state(tokenizer):
    (batch,) = take(make_loader(make_config("video", wrist=False), tokenizer), 0, 1)
    assert batch.keys() == {"tokens", "loss_mask", "front"}
    assert not np.isin(batch["tokens"], [tokenizer.vocabulary.state, tokenizer.vocabulary.action]).any()


def test_action_vae_stage_needs_neither_tokenizer_nor_videos():
    config = make_config("action_vae", source=f"lerobot:{demo.path('so100')}", front="no such camera")
    loader = Loader(config, progress=False)
    (batch,) = take(loader, 0, 1)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "actions": ("float32", (4, CHUNK, 6)),
        "actions_pad": ("bool", (4, CHUNK)),
    }
    many = np.concatenate([b["actions"] for b in take(loader, 0, 200)])
    np.testing.assert_allclose(many.mean((0, 1)), 0, atol=0.2)
    np.testing.assert_allclose(many.std((0, 1)), 1, atol=0.2)


def test_vqgan_stage_shows_single_frames_of_all_views(tokenizer):
    loader = make_loader(make_config("vqgan", batch_size=1), None)
    seen = Counter(int(b["images"][0, 0, 0, 0]) for b in take(loader, 0, loader.num_examples))
    first = sum(LENGTHS)
    assert seen == Counter([*range(first), *range(100, 100 + first)])
    assert take(loader, 0, 1)[0]["images"].shape == (1, 32, 64, 3)


def test_jitter_is_one_draw_a_clip(tokenizer):
    still = Episodes.of([replace(e, views={"front": Still(), "wrist": Still()}) for e in make_episodes()], "still:x")
    config = make_config("video", batch_size=8, image=replace(IMAGE, jitter=0.4), wrist=False)

    def clips(step=0):
        loader = Loader(config, tokenizer=tokenizer, sources=[still], progress=False)
        return take(loader, step, 1)[0]["front"]

    first = clips()
    for clip in first:  # every frame of a clip is the same picture, jittered alike
        np.testing.assert_array_equal(clip, np.broadcast_to(clip[:1], clip.shape))
    assert len({clip.tobytes() for clip in first}) == len(first)
    np.testing.assert_array_equal(clips(), first)
    plain = Still().frames([0])[0]
    assert not any((clip[0] == plain).all() for clip in first)


@dataclass(frozen=True)
class Still:
    """The same coloured picture in every frame."""

    height: int = 32
    width: int = 32

    def frames(self, indices):
        picture = np.random.default_rng(5).integers(60, 180, (self.height, self.width, 3), dtype=np.uint8)
        return np.stack([picture] * len(indices))


def test_sources_of_different_rates_are_said():
    slow = Episodes.of([replace(e, fps=10.0) for e in make_episodes()], "painted:slow")
    config = make_config("action_vae", mixture=(("painted:frames", 1.0), ("painted:slow", 1.0)))
    lines = Loader(config, sources=[make_source(), slow], progress=False).describe()
    assert "recorded at 30 Hz" in lines[0] and "recorded at 10 Hz" in lines[1]
    assert lines[2].startswith("WARNING: recorded at 10 and 30 Hz") and len(lines) == 3
    even = Loader(config, sources=[make_source(), make_source()], progress=False).describe()
    assert len(even) == 2


# --- Codes made ahead --------------------------------------------------------------------------------------------


def fake_codes(images):
    """[b, h, w, 3] -> [b, h/16, w/16]: a code that depends on the pixels and on the place."""
    small = images[:, ::16, ::16, 0].astype(np.int64)
    return (small + np.arange(small.shape[2])) % 32


def test_codes_made_ahead_give_the_tokens_of_codes_made_in_the_step(tokenizer, tmp_path):
    config = make_config()
    store = encode_all(make_source(), fake_codes, config.data, tmp_path / "codes", "abc", batch=7, progress=False)
    in_step = take(make_loader(config, tokenizer), 0, 3)
    ahead = take(make_loader(config, tokenizer, codes=[store]), 0, 3)
    for with_frames, with_codes in zip(in_step, ahead, strict=True):
        assert not {"front", "wrist"} & with_codes.keys() and (with_codes["tokens"] >= 0).all()
        tokens = with_frames["tokens"]
        flat = np.concatenate(
            [fake_codes(with_frames[v].reshape(-1, 32, 64, 3)).reshape(4, -1) for v in ("front", "wrist")], axis=1
        )
        index = np.maximum(-tokens - 1, 0)
        filled = np.where(tokens < 0, tokenizer.vocabulary.code_to_token[np.take_along_axis(flat, index, 1)], tokens)
        np.testing.assert_array_equal(filled, with_codes["tokens"])
        for key in with_codes.keys() - {"tokens"}:
            np.testing.assert_array_equal(with_frames[key], with_codes[key])


def test_an_interrupted_store_is_continued(tmp_path):
    episodes, data = make_source(), DataConfig(image=IMAGE)
    calls = []

    def until(limit):
        def encode(images):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(len(images))
            return fake_codes(images)

        return encode

    with pytest.raises(KeyboardInterrupt):
        encode_all(episodes, until(3), data, tmp_path / "codes", "abc", batch=50, progress=False)
    assert {p.name for p in (tmp_path / "codes" / "episode_0").iterdir()} == {"front.npy", "wrist.npy", "sha256.json"}
    store = encode_all(episodes, until(99), data, tmp_path / "codes", "abc", batch=50, progress=False)
    assert len(calls) == 2 * len(LENGTHS) and set(calls) == {50}  # one call an episode and view, of one shape
    for episode in episodes:
        codes = store(episode, "wrist")
        assert codes.dtype == np.uint16 and codes.shape == (len(episode), 2, 4)
        np.testing.assert_array_equal(codes, fake_codes(episode.frames("wrist", range(len(episode)))))
    calls.clear()
    encode_all(episodes, until(0), data, tmp_path / "codes", "abc", progress=False)  # nothing is left to encode


def flip(path, bit=-1):
    """Changes one bit of a file, by default the last."""
    content = bytearray(path.read_bytes())
    place, shift = divmod(bit % (8 * len(content)), 8)
    content[place] ^= 1 << shift
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def replaced(text):
    return lambda path: path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("front.npy", flip, r"front.npy is not the file that was written \(its SHA-256 differs\)"),
        ("wrist.npy", lambda path: flip(path, 8 * 128 + 3), r"wrist.npy is not the file that was written"),
        ("front.npy", lambda path: flip(path, 8 * 126), r"front.npy cannot be read"),  # in the header
        ("wrist.npy", cut, r"wrist.npy cannot be read"),
        ("sha256.json", cut, r"sha256.json is not JSON"),
        ("sha256.json", replaced("[]"), r"sha256.json is not a table of sums"),
        ("sha256.json", replaced("{}"), r"sha256.json lacks front.npy"),
        ("sha256.json", lambda path: path.unlink(), r"sha256.json lacks front.npy"),
    ],
)
def test_damaged_codes_are_named_and_made_anew_once_deleted(tmp_path, name, damage, said):
    source, data = make_source(), DataConfig(image=IMAGE)

    def encode():
        return encode_all(source, fake_codes, data, tmp_path / "codes", "abc", batch=50, progress=False)

    store, view = encode(), "wrist" if name == "wrist.npy" else "front"
    folder = tmp_path / "codes" / source[1].name
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    for read in (lambda: store(source[1], view), encode):  # the loader's, and the next start
        with pytest.raises(DataError, match=f"{said}.*; delete .* and start the run again"):
            read()
    for _ in range(3):  # until nothing is said any more
        try:
            encode()
            break
        except DataError as error:
            named, deleted = re.search(r"(\S+) .*; delete (?:the folder )?(\S+)", str(error)).groups()
            files.remove(Path(named if deleted == "it" else deleted))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_file_is_checked_once_by_each_store(tmp_path):
    source, data = make_source(), DataConfig(image=IMAGE)
    store = encode_all(source, fake_codes, data, tmp_path / "codes", "abc", batch=50, progress=False)
    store(source[0], "front")
    flip(store.path(source[0], "front"))
    store(source[0], "front")
    with pytest.raises(DataError, match="SHA-256"):
        CodeStore(tmp_path / "codes", source.source, data, "abc")(source[0], "front")


def test_a_store_of_an_older_version_is_read_and_continued(tmp_path):
    source, data, directory = make_source(), DataConfig(image=IMAGE), tmp_path / "codes"

    def encode():
        return encode_all(source, fake_codes, data, directory, "abc", batch=50, progress=False)

    assert encode().summed
    manifest = files.read_json(directory / "manifest.json")
    del manifest["sums"]
    files.write_json(directory / "manifest.json", manifest)
    for path in directory.rglob("sha256.json"):
        path.unlink()
    (directory / "episode_2" / "wrist.npy").unlink()  # it was killed
    store = encode()
    assert not store.summed and store(source[0], "front").any()
    np.testing.assert_array_equal(store(source[2], "wrist"), fake_codes(source[2].frames("wrist", range(9))))
    flip(store.path(source[2], "wrist"))  # which has a sum
    with pytest.raises(DataError, match="SHA-256"):
        encode()


def test_codes_of_another_vqgan_or_image_size_are_refused(tmp_path):
    episodes, directory, data = make_source(), tmp_path / "codes", DataConfig(image=IMAGE)
    encode_all(episodes, fake_codes, data, directory, "abc", progress=False)
    with pytest.raises(DataError, match="fingerprint is 'abc' but this run has 'xyz'"):
        encode_all(episodes, fake_codes, data, directory, "xyz", progress=False)
    with pytest.raises(DataError, match="image is"):
        CodeStore(directory, episodes.source, DataConfig(image=ImageConfig(shortest_edge=64)), "abc")
    with pytest.raises(DataError, match="is not a code store: manifest"):
        CodeStore(tmp_path, episodes.source, data, "abc")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="not empty and is not a code store"):
        encode_all(episodes, fake_codes, data, tmp_path / "full", "abc", progress=False)
    store = CodeStore(directory, episodes.source, data, "abc")
    np.save(store.path(episodes[0], "front"), np.zeros((3, 2, 4), np.uint16))
    with pytest.raises(DataError, match=r"front.npy .* the episode has 30 steps"):
        store(episodes[0], "front")
    store.path(episodes[1], "front").unlink()
    with pytest.raises(DataError, match="front.npy does not exist"):
        store(episodes[1], "front")


def test_codes_of_other_frames_are_refused(tmp_path):
    """Other cameras, or another data set whose episodes have the same names."""
    source, data, directory = make_source(), DataConfig(image=IMAGE), tmp_path / "codes"
    source = replace(source, source=f"lerobot:{tmp_path}/a")
    encode_all(source, fake_codes, data, directory, "abc", progress=False)
    encode_all(replace(source, source=f"lerobot:{tmp_path}/b/../a"), fake_codes, data, directory, "abc")
    with pytest.raises(DataError, match="source is 'lerobot:.*/a' but this run has 'lerobot:.*/b'; delete the store"):
        encode_all(replace(source, source=f"lerobot:{tmp_path}/b"), fake_codes, data, directory, "abc")
    with pytest.raises(
        DataError, match="cameras is .*images.front.* but this run has .*images.top.*; delete the store"
    ):
        encode_all(source, fake_codes, replace(data, front="observation.images.top"), directory, "abc")


# --- Errors before training --------------------------------------------------------------------------------------


def test_a_sequence_that_is_too_short_names_the_instruction(tokenizer):
    good = make_loader(make_config(), tokenizer)
    needed = int(good.describe()[0].split(" at most ")[1].split()[0])
    make_loader(make_config(length=needed), tokenizer)
    with pytest.raises(ConfigError, match=rf"'task .' needs {needed} tokens .* sequence.length is {needed - 1}"):
        make_loader(make_config(length=needed - 1), tokenizer)


def test_too_little_data_is_an_error(tokenizer):
    config = make_config(batch_size=67)
    with pytest.raises(DataError, match="66 examples for stage robot, fewer than one batch of 67"):
        make_loader(config, tokenizer)
    with pytest.raises(DataError, match="the longest has 9 steps"):
        Loader(make_config(), tokenizer=tokenizer, sources=[make_source((9, 5))], progress=False)


def named(config, group, **values):
    """The config of a file that names, of a group, these keys besides."""
    written = to_dict(config)
    return from_dict(TrainConfig, {**written, group: {**written[group], **values}})


def test_contradictions_are_config_errors(tokenizer):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        make_loader(make_config(), None)
    config = make_config("video")
    with pytest.raises(ConfigError, match="sequence.use_state is True but config.stage is 'video', .* it False; leave"):
        named(config, "sequence", use_state=True)
    with pytest.raises(ConfigError, match="states of 6 values but vla.state_dim is 7"):
        make_loader(replace(make_config(), vla=VLAConfig(state_dim=7)), tokenizer)
    config = make_config("action_vae")
    with pytest.raises(ConfigError, match="action_vae_model.chunk is 9 but config.data.chunk is 8, .* it 8; leave"):
        named(config, "action_vae_model", chunk=9)
    with pytest.raises(ConfigError, match="actions of 6 values but action_vae_model.action_dim is 7"):
        make_loader(replace(config, action_vae_model=ActionVAEConfig(action_dim=7)), tokenizer)


def test_statistics_of_other_data_are_refused(tokenizer):
    statistics = make_loader(make_config(), tokenizer).statistics
    make_loader(make_config(), tokenizer, statistics=statistics)
    with pytest.raises(DataError, match="robot 'radians' and 'degrees'; set config.action_vae to"):
        make_loader(make_config(), tokenizer, statistics=replace(statistics, columns=replace(COLUMNS, robot="radians")))
    with pytest.raises(DataError, match="action column 5 relative to state column 5 and kept"):
        others = replace(statistics, columns=Columns.unstated("degrees", 6, 6, ()))
        make_loader(make_config(), tokenizer, statistics=others)


def test_a_vqgan_names_the_cameras_that_there_are():
    data = DataConfig(source=f"lerobot:{demo.path('so100')}", front="front", wrist="wrist")
    config = replace(make_config("vqgan"), data=data)
    with pytest.raises(
        ConfigError,
        match="'front', which .* does not have; set --config.data.front to one of observation.images.front, ",
    ):
        Loader(config, progress=False)


def test_cameras_of_different_shapes_are_refused(tokenizer):
    episodes = make_episodes()
    episodes[1] = replace(episodes[1], views={"front": Painted(0), "wrist": Painted(0, 32, 96)})
    with pytest.raises(DataError, match="episode_1 wrist are 32 x 96 .* episode_0 front are 32 x 64.*square"):
        Loader(make_config(), tokenizer=tokenizer, sources=[Episodes.of(episodes, "painted:frames")], progress=False)


def test_frames_that_are_no_multiple_of_32_are_refused(tokenizer):
    episodes = [replace(e, views={v: Painted(0, 32, 43) for v in ("front", "wrist")}) for e in make_episodes()]
    config = make_config(image=ImageConfig(shortest_edge=32, fit="reference_train"))
    with pytest.raises(ValueError, match="32 x 43.*fit"):
        Loader(config, tokenizer=tokenizer, sources=[Episodes.of(episodes, "painted:frames")], progress=False)


@pytest.mark.parametrize("threads", [0, 2])
def test_data_that_all_breaks_later_stops_the_run_by_name(tokenizer, tmp_path, threads):
    source = open_source(f"lerobot:{demo.path('so100')}", DataConfig(), ("front",), progress=False)
    gone = str(tmp_path / "gone.mp4")
    episodes = Episodes.of(
        [replace(e, views={"front": replace(e.views["front"], path=gone)}) for e in source], source.source
    )
    loader = Loader(
        make_config(wrist=False, num_threads=threads), tokenizer=tokenizer, sources=[episodes], progress=False
    )
    with pytest.raises(DataError, match="100 examples in a row cannot be read.*gone.mp4 does not exist"):
        take(loader, 0, 1)


@dataclass(frozen=True)
class Broken(Painted):
    """One step cannot be decoded."""

    bad: int = 0

    def frames(self, indices):
        if self.bad in indices:
            raise DataError(f"frame {self.bad} is damaged")
        return super().frames(indices)


def broken_loader(tokenizer, **data):
    """Step 17 of the first episode is unreadable, so examples 16 and 17 (of frames 16, 17 and 17, 18) are."""
    episodes = make_episodes()
    episodes[0] = replace(episodes[0], views={"front": Broken(0, bad=17)})
    episodes[1:] = [replace(e, views={"front": e.views["front"]}) for e in episodes[1:]]
    source = Episodes.of(episodes, "painted:frames")
    return Loader(make_config(wrist=False, **data), tokenizer=tokenizer, sources=[source], progress=False)


@pytest.mark.parametrize("workers", [{"num_threads": 0}, {"num_threads": 2}, {"num_workers": 2}])
def test_damaged_examples_are_replaced_from_another_episode(tokenizer, capfd, workers):
    whole = Loader(
        make_config(wrist=False),
        tokenizer=tokenizer,
        progress=False,
        sources=[
            Episodes.of([replace(e, views={"front": e.views["front"]}) for e in make_episodes()], "painted:frames")
        ],
    )
    loader = broken_loader(tokenizer, **workers)
    steps = 33  # two epochs
    got, expected = take(loader, 0, steps), take(whole, 0, steps)
    replaced = 0
    for batch, intact in zip(got, expected, strict=True):
        shown = numbers(intact, whole)
        damaged = np.isin(shown, [16, 17])
        replaced += damaged.sum()
        # of the 66 examples 56 and 57 stand in, the last episode's: their steps are 69 further on
        np.testing.assert_array_equal(numbers(batch, loader), np.where(damaged, shown + 69, shown))
        assert "damaged" not in batch
    assert replaced == loader.damaged == 4  # two in each epoch
    if not workers.get("num_workers"):
        assert capfd.readouterr().err.count("frame 17 is damaged") == 1


def test_one_damaged_episode_counts_for_its_share_only(tokenizer):
    """25 windows in a row, 0.5 % of all: each is drawn once an epoch, and replaced by one of another episode."""
    episodes = [replace(e, views={"front": e.views["front"]}) for e in make_episodes((26,) * 200)]
    episodes[50] = replace(episodes[50], views={"front": Unreadable(0)})
    config = make_config("video", wrist=False, batch_size=100)
    loader = Loader(config, tokenizer=tokenizer, sources=[Episodes.of(episodes, "painted:frames")], progress=False)
    take(loader, 0, loader.num_examples // 100)
    assert loader.damaged == 25


@dataclass(frozen=True)
class Unreadable(Painted):
    """No step can be decoded."""

    def frames(self, indices):
        raise DataError(f"frame {indices[0]} is damaged")


def test_too_much_damage_stops_the_run(tokenizer):
    with pytest.raises(DataError, match=r"3 of \d+ examples could not be read.*data.max_damaged 0.002"):
        take(broken_loader(tokenizer, max_damaged=0.002), 0, 33)
    with pytest.raises(DataError, match=r"[12] of \d+ examples could not be read"):
        take(broken_loader(tokenizer, max_damaged=0.0), 0, 17)


def test_a_mixture_takes_its_sources_by_weight(tokenizer):
    """Shares, order by (seed, step) alone, and the same global batches for any number of processes."""

    def loader(rows=None):
        episodes = make_episodes()
        halves = [Episodes.of(episodes[:1], "first:x"), Episodes.of(episodes[1:], "second:x")]
        config = make_config(mixture=(("first:x", 3.0), ("second:x", 1.0)))
        return Loader(config, tokenizer=tokenizer, sources=halves, rows=rows, progress=False)

    alone = take(loader(), 0, 30)
    drawn = np.concatenate([numbers(b, loader()) for b in alone])
    assert (drawn < LENGTHS[0]).mean() == 0.75
    assert len(set(drawn[drawn < LENGTHS[0]].tolist())) == LENGTHS[0] - CHUNK - FRAMES  # 90 draws of 20 examples
    assert_same(take(loader(), 7, 1)[0], alone[7])
    parts = [take(loader(np.arange(4)[i::2]), 5, 1)[0] for i in range(2)]
    for i in range(2):
        assert_same(parts[i], {k: v[i::2] for k, v in alone[5].items()})


def test_units_are_never_mixed(tokenizer):
    other = Episodes.of([replace(e, columns=replace(COLUMNS, robot="radians")) for e in make_episodes()], "second:x")
    mixture = (("first:x", 1.0), ("second:x", 1.0))
    with pytest.raises(DataError, match="painted:frames and second:x differ in .*: robot 'degrees' and 'radians'"):
        Loader(make_config(mixture=mixture), tokenizer=tokenizer, sources=[make_source(), other], progress=False)
    video = make_config("video", wrist=False, mixture=mixture)  # learns no action: any frames will do
    take(Loader(video, tokenizer=tokenizer, sources=[make_source(), other], progress=False), 0, 1)


def test_describe_is_one_line(tokenizer):
    (line,) = make_loader(make_config(), tokenizer).describe()
    assert "\n" not in line
    for part in (
        "4 episodes",
        "episodes too short to use: 1",
        "105 frames",
        "front, wrist at 32 x 64",
        "66 examples",
        "of 256 tokens",
    ):
        assert part in line
