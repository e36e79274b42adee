"""Small steps from an example's number to arrays. Each is a frozen dataclass that is called on a growing dict.

Keys of an example: `number`, `jitter`, `fractions`, `episode`, `views`, `start`, `indices` [T] (steps), a view's
frames uint8 [T, h, w, 3] under its name, `codes` {view: int [T, h/16, w/16]}, then the keys of a batch row.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.corpus.packing import Plan
from data_pipelines.episode import DataError, Episode, Episodes
from rynnvla_jax.actions import Statistics, normalize_actions, normalize_state, pad_chunk
from rynnvla_jax.config import ImageConfig, SequenceConfig
from rynnvla_jax.images import preprocess
from rynnvla_jax.sequence import code_placeholders, compose
from rynnvla_jax.stage import start_counts
from rynnvla_jax.vocabulary import Vocabulary

Example = dict[str, Any]
_IN_A_ROW = 100
RECORDED = ("recorded", "origin", "last")  # what `Recorded` adds
_JUMP = 0.618  # share of all examples; multiples of the golden ratio spread evenly


@dataclass(frozen=True)
class Draw:
    """Draws the random values of an example: `jitter`, three factors in [1 - strength, 1 + strength] (brightness,
    contrast, saturation), and `fractions` [clips] in [0, 1)."""

    strength: float
    clips: int

    def __call__(self, number: int, generator: np.random.Generator) -> Example:
        jitter = generator.uniform(1 - self.strength, 1 + self.strength, 3).astype(np.float32)
        return {"number": number, "jitter": jitter, "fractions": generator.random(self.clips)}


@dataclass(frozen=True, eq=False)
class Window:
    """An example's number -> episode, views, start and the indices of `length` steps, `interval` steps apart.

    `ends` is the running sum of the number of starts per episode. With `one_view` each start counts once per view.
    """

    episodes: Episodes
    ends: np.ndarray
    views: tuple[str, ...]
    length: int
    interval: int = 1
    one_view: bool = False

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __call__(self, example: Example) -> Example:
        number = example["number"]
        # right: a number that equals a running sum is the first start of the next episode.
        row = int(np.searchsorted(self.ends, number, side="right"))
        start, views = int(number - (self.ends[row - 1] if row else 0)), self.views
        if self.one_view:
            starts = int(self.ends[row] - (self.ends[row - 1] if row else 0)) // len(views)
            views, start = (views[start // starts],), start % starts
        return {
            **example,
            "episode": self.episodes[row],
            "views": views,
            "start": start,
            "indices": start + self.interval * np.arange(self.length),
        }


@dataclass(frozen=True, eq=False)
class Planned:
    """A sequence's number -> its clips from a corpus, each through `steps`; `pack` joins several clips in one row.

    A random window of each record is used: `length` frames, `interval` frames apart, with `after` steps following the
    last one. Every `stride`-th step has a frame.
    """

    episodes: Episodes
    plan: Plan
    views: tuple[str, ...]
    length: int
    interval: int
    stride: int
    after: int
    steps: Callable[[Example], dict[str, np.ndarray]]
    pack: Callable | None

    def __len__(self) -> int:
        return len(self.plan)

    def __call__(self, example: Example) -> dict[str, np.ndarray]:
        rows = [
            self.steps(self._window(record, fraction, example["jitter"]))
            for record, fraction in zip(self.plan[example["number"]], example["fractions"], strict=False)
        ]
        return self.pack(rows) if self.pack else rows[0]

    def _window(self, record: int, fraction: float, jitter: np.ndarray) -> Example:
        episode = self.episodes[int(record)]
        span = (self.length - 1) * self.interval * self.stride + 1
        starts = int(start_counts(len(episode), span, self.after, self.stride))
        if not starts:
            raise DataError(
                f"{episode.name} is shorter than its manifest states; run the command that writes the corpus again"
            )
        start = int(fraction * starts) * self.stride
        return {
            "episode": episode,
            "views": self.views,
            "start": start,
            "indices": start + self.interval * self.stride * np.arange(self.length),
            "jitter": jitter,
        }


@dataclass(frozen=True, eq=False)
class OtherIfDamaged:
    """Replaces an example that cannot be read with one whose number is far away, because its neighbours are windows of
    the same damaged episode.

    The replacement depends on the example's number alone. `damaged` int32 [1] is 1 for a replaced example; each error
    is printed once on stderr. Raises DataError after `_IN_A_ROW` failures in a row.
    """

    make: Callable[[Example], dict[str, np.ndarray]]
    count: int
    named: set[str] = field(default_factory=set)

    def __call__(self, example: Example) -> dict[str, np.ndarray]:
        for passed in range(_IN_A_ROW):
            number = (example["number"] + int(passed * _JUMP * self.count)) % self.count
            try:
                row = self.make({**example, "number": number})
            except DataError as error:
                reason = error
                if str(error) not in self.named:
                    self.named.add(str(error))
                    print(f"skipped a damaged example and used another: {error}", file=sys.stderr, flush=True)
                continue
            return {**row, "damaged": np.array([passed > 0], np.int32)}
        raise DataError(f"{_IN_A_ROW} examples in a row cannot be read; the last error: {reason}")


@dataclass(frozen=True)
class ReadFrames:
    """Decodes and resizes the frames of every view: uint8 [T, h, w, 3] under the view's name."""

    image: ImageConfig

    def __call__(self, example: Example) -> Example:
        for view in example["views"]:
            frames = example["episode"].frames(view, example["indices"])
            example[view] = np.stack([preprocess(frame, self.image) for frame in frames])
        return example


@dataclass(frozen=True)
class ColourJitter:
    """Applies the example's factors to all its frames; contrast is relative to the mean grey of the whole clip."""

    def __call__(self, example: Example) -> Example:
        for view in example["views"]:
            example[view] = jitter(example[view], example["jitter"])
        return example


@dataclass(frozen=True, eq=False)
class ReadCodes:
    """Reads stored VQ codes instead of frames: those of a corpus, or of `store(episode, view)` uint16 [N, ...]."""

    store: Callable[[Episode, str], np.ndarray] | None = None

    def __call__(self, example: Example) -> Example:
        episode, indices = example["episode"], example["indices"]
        example["codes"] = {}
        for view in example["views"]:
            if self.store is None:
                codes, rows = episode.codes[view], indices // episode.stride
            else:
                codes, rows = self.store(episode, view), indices
            example["codes"][view] = np.asarray(codes[rows], np.int32)
        return example


@dataclass(frozen=True, eq=False)
class Compose:
    """Lays out tokens and loss mask; codes that are not stored become placeholders that the train step fills in.

    `encode` gives an instruction's ids, `grid` is (h/16, w/16). Adds `tokens` int32 [S], `loss_mask` bool
    [S] and, with states, `state_positions` and `action_positions` int32 [T].
    """

    encode: Callable[[str], np.ndarray]
    grid: tuple[int, int]
    vocabulary: Vocabulary
    sequence: SequenceConfig

    def __call__(self, example: Example) -> Example:
        config, views = self.sequence, example["views"]
        codes = example["codes"] if "codes" in example else code_placeholders(views, config.num_frames, *self.grid)
        ids = self.encode(example["episode"].text(example["start"]))
        row = compose(ids, codes, self.vocabulary, config, config.length if config.clips == 1 else None)
        example.update(tokens=row.tokens, loss_mask=row.loss_mask)
        if config.use_state:
            example.update(state_positions=row.state_positions, action_positions=row.action_positions)
        return example


@dataclass(frozen=True, eq=False)
class RelativeActions:
    """Normalised relative chunks: with `frames` one per step of the window, and the states; otherwise one chunk."""

    statistics: Statistics
    chunk: int
    mode: str
    frames: bool

    def __call__(self, example: Example) -> Example:
        episode = example["episode"]
        steps = example["indices"] if self.frames else [example["start"]]
        pairs = [
            pad_chunk(normalize_actions(episode.chunk(int(t), self.chunk), self.statistics, self.mode), self.chunk)
            for t in steps
        ]
        actions, is_pad = (np.stack(part) for part in zip(*pairs, strict=True))
        if self.frames:
            example["state"] = normalize_state(episode.state[example["indices"]], self.statistics)
        else:
            actions, is_pad = actions[0], is_pad[0]
        example.update(actions=actions, actions_pad=is_pad)
        return example


@dataclass(frozen=True, eq=False)
class Recorded:
    """What actions predicted from an example's first step are compared with, in the data's unit: `recorded` float32
    [1, C, A] the relative chunk, `origin` [1, A] where its sums start, `last` [1, A] the motion before
    (`Episode.last_motion`).
    """

    chunk: int

    def __call__(self, example: Example) -> Example:
        episode, start = example["episode"], example["start"]
        parts = (
            episode.chunk(start, self.chunk),
            episode.columns.origin(episode.state[start]),
            episode.last_motion(start),
        )
        example.update({key: part[None].astype(np.float32) for key, part in zip(RECORDED, parts, strict=True)})
        return example


@dataclass(frozen=True)
class SingleFrame:
    """The one frame of the one view, as `images` uint8 [h, w, 3]."""

    def __call__(self, example: Example) -> Example:
        example["images"] = example[example["views"][0]][0]
        return example


@dataclass(frozen=True)
class From:
    """Adds the number of the source that a row is from."""

    source: int

    def __call__(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**row, "source": np.asarray(self.source, np.int32)}


@dataclass(frozen=True, eq=False)
class Chain:
    """Runs `steps` one after another and keeps `keys` of what comes out."""

    steps: tuple[Callable, ...]
    keys: tuple[str, ...]

    def __call__(self, value: Any) -> dict[str, np.ndarray]:
        for step in self.steps:
            value = step(value)
        return {key: value[key] for key in self.keys}


@dataclass(frozen=True)
class Pack:
    """Up to `clips` clips -> one row of `length` tokens. Adds `segments` int32 [S] (1, 2, ... by clip, 0 is padding)
    and `positions` int32 [S], which start at 0 in every clip; arrays with one entry per frame are joined along T. Where
    there are fewer clips, they are padded with zeros (positions with -1, meaning absent).

    `codes` is the number of codes in the frames of one view of one clip.
    """

    length: int
    codes: int
    clips: int

    def __call__(self, clips: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        sizes = [len(clip["tokens"]) for clip in clips]
        starts = np.cumsum([0, *sizes[:-1]])
        row = {
            "tokens": [self._placeholders(clip["tokens"], i) for i, clip in enumerate(clips)],
            # The token before a clip's first belongs to another clip and cannot predict it.
            "loss_mask": [np.concatenate([[False], clip["loss_mask"][1:]]) for clip in clips],
            "segments": [np.full(size, i + 1, np.int32) for i, size in enumerate(sizes)],
            "positions": [np.arange(size, dtype=np.int32) for size in sizes],
        }
        padding = self.length - sum(sizes)
        packed = {key: np.pad(np.concatenate(parts), (0, padding)) for key, parts in row.items()}
        for key in clips[0].keys() - row.keys():
            parts, absent = [clip[key] for clip in clips], np.zeros_like(clips[0][key])
            if key.endswith("_positions"):
                absent -= 1
                parts = [np.where(p < 0, p, p + start).astype(np.int32) for p, start in zip(parts, starts, strict=True)]
            packed[key] = np.concatenate(parts + [absent] * (self.clips - len(clips)))
        return packed

    def _placeholders(self, tokens: np.ndarray, clip: int) -> np.ndarray:
        """Renumbers placeholders: a row's codes are all clips' frames of the first view, then those of the next."""
        view, number = np.divmod(-tokens - 1, self.codes)
        return np.where(tokens < 0, -(1 + (view * self.clips + clip) * self.codes + number), tokens).astype(np.int32)


def jitter(frames: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint8 [T, h, w, 3] -> the same, with (brightness, contrast, saturation) `factors`, 1 meaning unchanged."""
    brightness, contrast, saturation = factors
    grey_weights = np.array([0.299, 0.587, 0.114], np.float32)
    out = frames.astype(np.float32) * brightness
    middle = float((out @ grey_weights).mean())
    out = (out - middle) * contrast + middle
    grey = (out @ grey_weights)[..., None]
    out = (out - grey) * saturation + grey
    # Rounded once, at the end: a cast alone would cut fractions off, and wrap what is outside 0..255.
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
