"""From an example's number to arrays, in small steps. Each is a frozen dataclass called on a growing dict.

Keys an example may hold: `episode`, `start`, `indices` [T], `jitter` (three factors), a view's frames uint8
[T, h, w, 3] under the view's name, `codes` {view: int [T, h/16, w/16]}, then the keys of a batch row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.episode import DataError, Episode
from rynnvla_jax.actions import Statistics, normalize_actions, normalize_state, pad_chunk
from rynnvla_jax.config import ImageConfig, SequenceConfig
from rynnvla_jax.images import preprocess
from rynnvla_jax.sequence import code_placeholders, compose
from rynnvla_jax.vocabulary import Vocabulary

Example = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Window:
    """(example number, jitter factors) -> episode, start and the indices of `length` steps, `interval` apart.

    `sources` lists (episode, views, number of starts); `ends` is the running sum of those numbers.
    """

    sources: tuple[tuple[Episode, tuple[str, ...], int], ...]
    ends: np.ndarray
    length: int
    interval: int = 1

    def __call__(self, drawn: tuple[int, np.ndarray]) -> Example:
        number, jitter = drawn
        place = int(np.searchsorted(self.ends, number, side="right"))
        episode, views, starts = self.sources[place]
        start = int(number - self.ends[place] + starts)
        return {
            "episode": episode,
            "views": views,
            "start": start,
            "indices": start + self.interval * np.arange(self.length),
            "jitter": jitter,
        }


@dataclass(frozen=True)
class DrawJitter:
    """Draws brightness, contrast and saturation factors, once an example, in [1 - strength, 1 + strength]."""

    strength: float

    def __call__(self, number: int, generator: np.random.Generator) -> tuple[int, np.ndarray]:
        return number, generator.uniform(1 - self.strength, 1 + self.strength, 3).astype(np.float32)


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
    """Applies the example's factors to all its frames alike; contrast is about the mean grey of the whole clip."""

    def __call__(self, example: Example) -> Example:
        for view in example["views"]:
            example[view] = jitter(example[view], example["jitter"])
        return example


@dataclass(frozen=True, eq=False)
class ReadCodes:
    """Takes VQ codes made ahead instead of frames. `store(episode, view)` is uint16 [N, h/16, w/16]."""

    store: Callable[[Episode, str], np.ndarray]

    def __call__(self, example: Example) -> Example:
        episode, indices = example["episode"], example["indices"]
        example["codes"] = {}
        for view in example["views"]:
            codes = self.store(episode, view)
            if len(codes) < len(episode):
                raise DataError(
                    f"codes of {episode.name} {view} hold {len(codes)} of {len(episode)} frames; remake them"
                )
            example["codes"][view] = np.asarray(codes[indices], np.int32)
        return example


@dataclass(frozen=True, eq=False)
class Compose:
    """Lays out tokens and loss mask; codes not made ahead become placeholders that the train step fills.

    `text_ids` maps an instruction to its ids, `grid` is (h/16, w/16). Adds `tokens` int32 [S], `loss_mask` bool
    [S] and, with states, `state_positions` and `action_positions` int32 [T].
    """

    text_ids: Mapping[str, np.ndarray]
    grid: tuple[int, int]
    vocabulary: Vocabulary
    sequence: SequenceConfig

    def __call__(self, example: Example) -> Example:
        config, views = self.sequence, example["views"]
        if "codes" in example:
            front, wrist = example["codes"]["front"], example["codes"].get("wrist")
        else:
            front, wrist = code_placeholders(config.num_frames, *self.grid, len(views))
        ids = self.text_ids[example["episode"].text(example["start"])]
        row = compose(ids, front, wrist, self.vocabulary, config, config.length if config.clips == 1 else None)
        example.update(tokens=row.tokens, loss_mask=row.loss_mask)
        if config.use_state:
            example.update(state_positions=row.state_positions, action_positions=row.action_positions)
        return example


@dataclass(frozen=True, eq=False)
class RelativeActions:
    """Normalised relative chunk(s): with `frames` one for each step of the window and the states, else one."""

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


@dataclass(frozen=True)
class SingleFrame:
    """The one frame of the one view, as `images` uint8 [h, w, 3]."""

    def __call__(self, example: Example) -> Example:
        example["images"] = example[example["views"][0]][0]
        return example


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
    """Several clips -> one row of `length` tokens. Adds `segments` int32 [S] (1, 2, ... by clip, 0 is padding) and
    `positions` int32 [S], which start anew with every clip; arrays by frame are joined along T.

    `codes` is how many codes the frames of one view of one clip have.
    """

    length: int
    codes: int

    def __call__(self, clips: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        sizes = [len(clip["tokens"]) for clip in clips]
        starts = np.cumsum([0, *sizes[:-1]])
        row = {
            "tokens": [self._placeholders(clip["tokens"], i, len(clips)) for i, clip in enumerate(clips)],
            # The token before a clip's first belongs to another clip and cannot foretell it.
            "loss_mask": [np.concatenate([[False], clip["loss_mask"][1:]]) for clip in clips],
            "segments": [np.full(size, i + 1, np.int32) for i, size in enumerate(sizes)],
            "positions": [np.arange(size, dtype=np.int32) for size in sizes],
        }
        padding = self.length - sum(sizes)
        packed = {key: np.pad(np.concatenate(parts), (0, padding)) for key, parts in row.items()}
        for key in clips[0].keys() - row.keys():
            parts = [clip[key] for clip in clips]
            if key.endswith("_positions"):
                parts = [np.where(p < 0, p, p + start).astype(np.int32) for p, start in zip(parts, starts, strict=True)]
            packed[key] = np.concatenate(parts)
        return packed

    def _placeholders(self, tokens: np.ndarray, clip: int, clips: int) -> np.ndarray:
        """Counts on: a row's codes are all clips' front frames, then all clips' wrist frames."""
        view, place = np.divmod(-tokens - 1, self.codes)
        return np.where(tokens < 0, -(1 + (view * clips + clip) * self.codes + place), tokens).astype(np.int32)


def jitter(frames: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint8 [T, h, w, 3] -> the same, with (brightness, contrast, saturation) `factors`, 1 meaning unchanged."""
    brightness, contrast, saturation = factors
    grey_weights = np.array([0.299, 0.587, 0.114], np.float32)
    out = frames.astype(np.float32) * brightness
    middle = float((out @ grey_weights).mean())
    out = (out - middle) * contrast + middle
    grey = (out @ grey_weights)[..., None]
    out = (out - grey) * saturation + grey
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
