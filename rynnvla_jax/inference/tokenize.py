"""VQ codes of every frame of a data set, in ArrayRecord shards.

Frames are decoded in threads and encoded in full batches on all local devices. The shards are divided among the
processes of a run (`rynnvla launch`), and a finished shard is not written again. An episode whose frames cannot be read
is skipped, counted, and listed in left_out/<shard>.json of the corpus.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from data_pipelines.checks import image_key
from data_pipelines.corpus import records
from data_pipelines.corpus.records import CorpusLayout, Record
from data_pipelines.episode import DataError, Episode, Episodes
from rynnvla_jax.config import ConfigError, DataConfig, ImageConfig
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import brief
from rynnvla_jax.images import frame_size, preprocess
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.progress import Bar, progress_bar
from rynnvla_jax.sequence import PATCH
from rynnvla_jax.storage import files, lease

_SEGMENT = 64  # frames of one episode that are decoded at once: bounds memory


@dataclass(frozen=True, eq=False)
class _Segment:
    """Some frames of one episode, or the error that they raised."""

    number: int  # of the episode
    episode: Episode | None
    view: str
    frames: np.ndarray | None
    last: bool
    error: str = ""


@dataclass(frozen=True, eq=False)
class _ReadSegment:
    """(episode number, view, first frame) -> `_Segment`."""

    source: Episodes
    stride: int
    image: ImageConfig

    def __call__(self, key: tuple[int, str, int]) -> _Segment:
        number, view, first = key
        steps = int(self.source.lengths[number])
        indices = range(first * self.stride, min(steps, (first + _SEGMENT) * self.stride), self.stride)
        last = indices[-1] + self.stride >= steps and view == self.source.views[-1]
        try:
            episode = self.source[number]
            if len(episode) != steps:
                raise DataError(
                    f"{episode.name} has {len(episode)} steps, but {steps} in the index; make the index again"
                )
            frames = np.stack([preprocess(frame, self.image) for frame in episode.frames(view, indices)])
        except (DataError, ConfigError) as error:
            return _Segment(number, None, view, None, last, str(error))
        return _Segment(number, episode, view, frames, last)


class Shard:
    """Tokenizes the episodes `numbers` of a source into records; `left_out` has the unreadable ones and why."""

    def __init__(
        self, source: Episodes, layout: CorpusLayout, image: ImageConfig, numbers: range, codec: FrameCodec, bar: Bar
    ):
        self._layout, self._codec, self._bar = layout, codec, bar
        self.left_out: dict[str, str] = {}
        frames = [-(-int(source.lengths[n]) // layout.stride) for n in numbers]
        keys = [
            (n, view, first)
            for n, count in zip(numbers, frames, strict=True)
            for view in source.views
            for first in range(0, count, _SEGMENT)
        ]
        read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        dataset = grain.MapDataset.source(keys).map(_ReadSegment(source, layout.stride, image))
        self._segments = dataset.to_iter_dataset(read)

    def records(self) -> Iterator[Record]:
        """One record per readable episode, in order."""
        waiting: list[tuple[_Segment, np.ndarray | None]] = []
        for segment, codes in self._encoded():
            waiting.append((segment, codes))
            if segment.last:
                yield from self._record(waiting)
                waiting = []

    def _encoded(self) -> Iterator[tuple[_Segment, np.ndarray | None]]:
        """Segments with their codes; batches span segments, and one is always in progress on the devices."""
        held: list[_Segment] = []  # not complete yet
        pixels: list[np.ndarray] = []  # not encoded yet
        codes: list[np.ndarray] = []  # not given to a segment yet
        started: tuple[jax.Array, int] | None = None

        def start(count: int):
            nonlocal started, pixels
            flat = np.concatenate(pixels)
            before, started = started, (self._codec.start(flat[:count]), count)
            pixels = [flat[count:]] if len(flat) > count else []
            if before:
                take(before)

        def take(done: tuple[jax.Array, int]):
            codes.append(np.asarray(done[0])[: done[1]].astype(np.uint16))
            self._bar.update(done[1])

        def ready():
            while held and (held[0].frames is None or sum(map(len, codes)) >= len(held[0].frames)):
                segment = held.pop(0)
                if segment.frames is None:
                    yield segment, None
                    continue
                flat = np.concatenate(codes) if len(codes) > 1 else codes[0]
                n = len(segment.frames)
                codes[:] = [flat[n:]] if len(flat) > n else []
                yield dataclasses.replace(segment, frames=None), flat[:n]

        for segment in self._segments:
            held.append(segment)
            if segment.frames is not None:
                pixels.append(segment.frames)
            while sum(map(len, pixels)) >= self._codec.batch:
                start(self._codec.batch)
            yield from ready()
        if rest := sum(map(len, pixels)):
            start(rest)
        if started:
            take(started)
        yield from ready()

    def _record(self, parts: list[tuple[_Segment, np.ndarray | None]]) -> Iterator[Record]:
        failed = [segment for segment, codes in parts if codes is None]
        if failed:
            self.left_out[f"episode {failed[0].number}"] = failed[0].error
            return
        episode, layout = parts[0][0].episode, self._layout
        assert episode is not None  # no part of it failed
        record: Record = {
            "clip_id": episode.name,
            "captions": list(episode.texts),
            "caption_of": episode.text_of,
            "fps": episode.fps,
        }
        for view in layout.views:
            record[f"{view}_codes"] = np.concatenate([codes for segment, codes in parts if segment.view == view])
        if layout.columns.state:
            record["state"] = episode.state
        if layout.columns.action:
            record["action"] = episode.action
        if layout.world:
            record.update(origin=episode.origin, world_to_camera=episode.world_to_camera)
        yield record


def layout_of(source: Episodes, codec: FrameCodec, image: ImageConfig, stride: int) -> CorpusLayout:
    """The common properties of the records of `source`. Raises DataError when its frames differ in size."""
    first = source[0]
    if first.codes:
        raise DataError(f"{source.source} contains VQ codes already; tokenize the data set that it was made from")
    sizes = {frame_size(h, w, image): where for (h, w), where in source.frame_sizes.items()}
    if len(sizes) != 1:
        found = "; ".join(f"{h} x {w} ({where})" for (h, w), where in sizes.items())
        raise DataError(
            f"{source.source}: frames become {found or 'nothing'}; use one size: --config.data.image.fit=square"
        )
    ((height, width),) = sizes
    return CorpusLayout(
        views=source.views,
        grid=(height // PATCH, width // PATCH),
        stride=stride,
        columns=source.columns,
        world=first.world_to_camera is not None,
        vqgan=codec.fingerprint,
        image=image_key(DataConfig(image=image)),
    )


def split(lengths: np.ndarray, layout: CorpusLayout, shard_bytes: int, at_least: int) -> list[range]:
    """Episodes of each shard: contiguous, of about `shard_bytes`, and at least `at_least` shards."""
    actions = len(layout.columns.action) * (2 if layout.world else 1)
    per_step = 4 * (len(layout.columns.state) + actions + 1 + 9 * layout.world)
    per_frame = 2 * len(layout.views) * layout.grid[0] * layout.grid[1]
    ends = np.cumsum(lengths.astype(np.int64) * per_step + -(-lengths.astype(np.int64) // layout.stride) * per_frame)
    shards = min(max(-(-int(ends[-1]) // shard_bytes), at_least), len(lengths))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards) + 1
    edges = [0, *np.clip(np.maximum.accumulate(cuts), 0, len(lengths)).tolist(), len(lengths)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def tokenize(
    source: Episodes, codec: FrameCodec, image: ImageConfig, stride: int, out: Path, shard_bytes: int
) -> dict[str, float]:
    """Writes the corpus; every process of a run calls it. Returns `frames` and `seconds` of this call, and `left_out`.

    Raises:
      DataError: `out` contains another corpus, or no episode can be read.
      LeaseError: another process writes into `out`.

    In s3:// there is no lease, which needs conditional writes. Two copies of one command write the same bytes there.
    """
    with contextlib.ExitStack() as stack:
        if not str(out).startswith("s3://"):
            multihost.first(lambda: stack.enter_context(lease.hold(out, "writing a corpus in", multihost.say)))
        return _tokenize(source, codec, image, stride, out, shard_bytes)


def _tokenize(
    source: Episodes, codec: FrameCodec, image: ImageConfig, stride: int, out: Path, shard_bytes: int
) -> dict[str, float]:
    layout = layout_of(source, codec, image, stride)
    settings = {"source": source.source, "episodes": len(source), "layout": dataclasses.asdict(layout)}
    multihost.first(lambda: _begin(source, layout, settings, out, shard_bytes))
    edges = multihost.together(lambda: _edges(settings, out))
    total = len(edges) - 1
    done = records.shards_done(out, total)
    todo = [s for s in range(jax.process_index(), total, jax.process_count()) if not done[s]]
    frames = [sum(-(-int(source.lengths[n]) // stride) for n in range(edges[s], edges[s + 1])) for s in todo]
    say = f"; {total} shards, {len(todo)} to be written by this process" if total > len(todo) else ""
    multihost.say(f"  writes     {out}{say}")
    started = time.monotonic()
    bar = progress_bar(
        total=sum(frames) * len(source.views),
        desc="VQ codes",
        unit="frame",
        show=multihost.primary(),
    )

    def make_shards() -> None:
        for s in todo:
            shard = Shard(source, layout, image, range(edges[s], edges[s + 1]), codec, bar)
            records.write_shard(out, s, total, _noting(shard, out / "left_out" / f"{s:05d}.json"), layout)

    with bar:
        multihost.together(make_shards)
    seconds = time.monotonic() - started
    left_out = sum(len(files.read_json(p)) for p in (out / "left_out").glob("*.json"))
    multihost.first(lambda: records.finish(out, total, {"source": source.source, "left_out": left_out}, layout))
    return {"frames": sum(frames) * len(source.views), "seconds": seconds, "left_out": left_out}


def _begin(source: Episodes, layout: CorpusLayout, settings: dict, out: Path, shard_bytes: int) -> None:
    """Decides which episodes each shard has, unless that was done before. For process 0, before the others start."""
    for folder in (out, out / "manifest", out / "left_out"):
        files.remove_partial(folder)
    if (out / "tokenize.json").exists():
        return
    if out.exists() and files.contents(out):
        raise DataError(f"{out} is not empty and not a corpus; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    edges = [r.start for r in split(source.lengths, layout, shard_bytes, jax.process_count())] + [len(source)]
    files.write_json(out / "tokenize.json", {**settings, "edges": edges}, indent=None)


def _edges(settings: dict, out: Path) -> list[int]:
    """First episode of each shard, and their number. Raises DataError when `out` was started with other settings."""
    about = files.read_json(out / "tokenize.json")
    for key, value in json.loads(json.dumps(settings)).items():
        if about[key] != value:
            name, before, now = _differing(key, about[key], value)
            raise DataError(f"{out} was started with {name} {brief(before)}, not {brief(now)}; choose another --out")
    return about["edges"]


def _differing(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first entry in which two JSON values differ: its name and both values. A layout has hundreds of entries."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        parts = [(f"{name}.{key}", before[key], now[key]) for key in before]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(before, now, strict=True))]
    else:
        return name, before, now
    return next((_differing(*part) for part in parts if part[1] != part[2]), (name, before, now))


def _noting(shard: Shard, path: Path) -> Iterator[Record]:
    """The records of a shard; the list of skipped episodes is written before the shard is complete."""
    yield from shard.records()
    if shard.left_out:
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, shard.left_out)
    else:
        path.unlink(missing_ok=True)  # of a run that was killed before the shard was there
