"""One episode in one form for all sources. Every source returns episodes; later code does not depend on the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from rynnvla_jax.actions import relative_chunks
from rynnvla_jax.columns import Columns, difference
from rynnvla_jax.errors import one_line
from rynnvla_jax.storage import bucket_cache


class DataError(ValueError):
    """Data that cannot be used; the message names the file or record and says how to correct it.

    Of a copy of an object (`bucket_cache`) the message names the object.
    """

    def __init__(self, message: str):
        super().__init__(one_line(bucket_cache.named(message)))


class Frames(Protocol):
    """The frames of one camera in one episode, decoded on request."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Episode:
    """N steps of one recorded episode.

    `state` float32 [N, S] and `action` float32 [N, A] mean what `columns` says. `text_of` int32 [N] is the index in
    `texts` of the instruction at each step. `views` has "front" and may have "wrist"; step i is frame i.

    `codes` {view: uint16 [M, h/16, w/16]} are VQ codes of every `stride`-th step, where frames are stored encoded.

    Where actions are positions in a world frame (EgoDex), `origin` [N, A] is the position at which each step's motion
    starts (None: the state) and `world_to_camera` float32 [N, 3, 3] rotates displacements into the camera's frame.
    """

    name: str
    texts: tuple[str, ...]
    text_of: np.ndarray
    fps: float
    state: np.ndarray
    action: np.ndarray
    columns: Columns
    views: Mapping[str, Frames] = field(default_factory=dict)
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    stride: int = 1
    origin: np.ndarray | None = None
    world_to_camera: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.action)

    def text(self, step: int) -> str:
        """The instruction at `step`."""
        return self.texts[self.text_of[step]]

    def frames(self, view: str, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB in the order of `indices`. Raises DataError for a frame that cannot be decoded."""
        return self.views[view].frames(indices)

    def chunk(self, start: int, length: int) -> np.ndarray:
        """Relative actions float32 [<= length, A] of the chunk at `start`, shorter at the end.

        With `world_to_camera`, each xyz triple is a displacement in the camera frame of step `start`.
        """
        return self.chunks(np.array([start]), min(length, len(self) - start))[0]

    def chunks(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Those at all `starts` int [B], float32 [B, length, A]; steps after the episode's end repeat its last."""
        return relative_chunks(self.action, self.state, starts, length, self.columns, self.origin, self.world_to_camera)

    def last_motion(self, step: int) -> np.ndarray:
        """float32 [A]: what the action before `step` did, in the camera frame of `step` where there is one: the change
        of the relative columns, and the kept ones as recorded. At step 0 nothing has moved: 0, and kept targets are
        those of step 0.
        """
        if step == 0:
            still = self.chunk(0, 1)[0]
            moving = [i for i, column in enumerate(self.columns.action) if column.delta or column.pair is not None]
            still[moving] = 0
            return still
        before = max(step - 2, 0)
        turned = self.world_to_camera
        if turned is not None:
            turned = np.broadcast_to(turned[step], turned.shape)
        chunk = relative_chunks(
            self.action, self.state, np.array([before]), step - before, self.columns, self.origin, turned
        )
        return chunk[0, -1]


@dataclass(frozen=True, eq=False)
class Kept:
    """Number among the kept episodes -> Episode; `kept` are their numbers for `read`."""

    read: Callable[[int], Episode]
    kept: np.ndarray

    def __call__(self, number: int) -> Episode:
        return self.read(int(self.kept[number]))


class Summary(NamedTuple):
    """What is known of an episode without reading it; a corpus tells no texts."""

    name: str
    texts: Sequence[str]
    fps: float


def summarize(names: Iterable[str], texts: Iterable[Sequence[str]], fps: Iterable[float]) -> Iterator[Summary]:
    """Of a source that has them in lists."""
    return map(Summary, names, texts, fps)


def _summarize(episodes: Iterable[Episode]) -> Iterator[Summary]:
    return (Summary(episode.name, episode.texts, episode.fps) for episode in episodes)


@dataclass(frozen=True, eq=False)
class Episodes(Sequence[Episode]):
    """The episodes of one source, each read on request; the fields are known without reading any episode.

    All episodes agree in `columns`. `lengths` int64 [n] are their steps, `texts` the
    distinct instructions, sorted. `frame_sizes` maps every (height, width) of a camera to an example of its use.
    `rates` are the steps per second (`rates_of`), () where they are not known.
    `files` lists the files that hold the states and actions; where they are unchanged, so are these (`rows.py`).
    `summaries` tells of each episode, in order. Of a part of a source, `whole` is that source and `kept` int64 [n] are
    the numbers of the episodes there.
    """

    source: str  # "lerobot:DIR"
    lengths: np.ndarray
    read: Callable[[int], Episode]
    texts: tuple[str, ...]
    frame_sizes: Mapping[tuple[int, int], str]
    seconds: float
    views: tuple[str, ...]
    columns: Columns
    corpus: Path | None = (
        None  # a corpus of `data_pipelines.corpus.records`, whose sequences are planned before training
    )
    rates: tuple[float, ...] = ()
    files: Callable[[], Iterable[str | Path]] | None = None  # a function: there may be a million
    summaries: Callable[[], Iterable[Summary]] | None = None  # None: the episodes themselves are read
    whole: "Episodes | None" = None
    kept: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        episodes: Iterable[Episode],
        source: str,
        files: Callable[[], Iterable[str | Path]] | None = None,
    ) -> "Episodes":
        """From episodes in memory. Raises DataError when the list is empty, or the episodes differ in kind."""
        episodes = list(episodes)
        if not episodes:
            raise DataError(f"{source} holds no episode; record episodes or correct the path")
        first = episodes[0]
        sizes: dict[tuple[int, int], str] = {}
        for episode in episodes:
            check_alike(first, episode)
            for view, frames in episode.views.items():
                sizes.setdefault((frames.height, frames.width), f"{episode.name} {view}")
        return cls(
            source=source,
            lengths=np.array([len(e) for e in episodes], np.int64),
            read=episodes.__getitem__,
            texts=tuple(sorted({t for e in episodes for t in e.texts})),
            frame_sizes=sizes,
            seconds=sum(len(e) / e.fps for e in episodes),
            views=tuple(first.views),
            columns=first.columns,
            rates=rates_of(e.fps for e in episodes),
            files=files,
            summaries=partial(_summarize, episodes),
        )

    def part(self, kept: np.ndarray, texts: Iterable[str], fps: np.ndarray) -> "Episodes":
        """The episodes of these numbers, whose instructions are `texts` and whose rates `fps` [n]; frame sizes are
        those of the whole source."""
        lengths = self.lengths[kept]
        return replace(
            self,
            lengths=lengths,
            read=Kept(self.read, kept),
            texts=tuple(sorted(set(texts))),
            seconds=float((lengths / fps).sum()),
            rates=rates_of(np.unique(fps).tolist()),
            summaries=None,
            whole=self,
            kept=kept,
        )

    @property
    def state_width(self) -> int:
        return len(self.columns.state)

    @property
    def action_width(self) -> int:
        return len(self.columns.action)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices: episodes are read one by one
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.source} has {len(self)} episodes; there is no episode {index}")
        return self.read(int(index) % len(self))


def rates_of(fps: Iterable[float]) -> tuple[float, ...]:
    """The different ones, to three digits: 29.97 and 30 are one, and so are those of time stamps that jitter."""
    return tuple(sorted({float(f"{rate:.3g}") for rate in fps}))


def check_alike(first: Episode, other: Episode) -> None:
    """Raises DataError unless two episodes agree in the meaning of their columns and in their views."""
    if differ := difference(first.columns, other.columns):
        raise DataError(f"{other.name} and {first.name} differ: {differ}; use one kind of data per run")
    if tuple(first.views) != tuple(other.views):
        raise DataError(
            f"{other.name}: views is {tuple(other.views)} but {first.name} has {tuple(first.views)}; use one kind of "
            "data per run"
        )
