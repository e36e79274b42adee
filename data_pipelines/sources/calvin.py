"""CALVIN: the language-annotated windows of one split folder (`training/`, `validation/`).

State [7]: position (metres) and Euler angles (radians, xyz) of the tool centre in the world, and the gripper's opening
(metres). Action [7]: the target pose in the same frame, and the gripper (-1 close, 1 open; absolute).
Euler angles in the files jump by 2 pi where they wrap; they are unwrapped here, so that differences are motions.

Windows come from lang_annotations/auto_lang_ann.npy; every step is one episode_XXXXXXX.npz, read on request.

Source: CALVIN, dataset/README.md of its repository. Departure: CALVIN reads the annotations as an unrestricted pickle.
"""

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from data_pipelines.episode import DataError, Episode, Episodes, rates_of, summarize
from data_pipelines.sources.exclude import DamagedEpisodesError, left_in
from rynnvla_jax.columns import ActionColumn, Column, Columns
from rynnvla_jax.config import DataConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import MAX_PIXELS

_TCP = (
    *((axis, "metres", "position") for axis in "xyz"),
    *((angle, "radians", "euler") for angle in ("roll", "pitch", "yaw")),
    ("gripper", "-1..1", "gripper"),
)
_WHY = "format of CALVIN"
COLUMNS = Columns(
    "calvin:tcp",
    tuple(Column(*column, _WHY) for column in _TCP),
    tuple(ActionColumn(*column, _WHY, pair=None if column[2] == "gripper" else i) for i, column in enumerate(_TCP)),
)
FPS = 30.0
_WIDTH = 7
_CAMERAS = {"front": "rgb_static", "wrist": "rgb_gripper"}
_LAST = 9_999_999  # step: file names have seven digits
_LARGEST = 4 * 3 * MAX_PIXELS  # bytes of one array of a step
# All that arrays of texts and numbers need; the module's name changed with numpy 2.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.multiarray", name): getattr(multiarray, name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    **{("builtins", kind.__name__): kind for kind in (list, tuple, dict, set, frozenset)},
}


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """One episode per window, in the order of the annotations. Raises DataError naming the faulty file or window.

    `progress` is not used, because opening is fast.
    """
    views = tuple(_CAMERAS) if views is None else views
    path = root / "lang_annotations" / "auto_lang_ann.npy"
    texts, bounds = annotations(path)
    source = f"calvin:{root}"
    names = [f"window_{i:06d}" for i in range(len(texts))]
    keep = left_in(source, names, config)
    names, texts, bounds = [names[i] for i in keep], [texts[i] for i in keep], bounds[keep]
    for name, text, (start, end) in zip(names, texts, bounds, strict=True):
        if not text:
            raise DataError(f"{path}: {name} has no text; add its instruction")
        if not 0 <= start < end:
            raise DataError(f"{path}: {name} runs from step {start} to {end}; correct the annotations")
    _check_steps(root, path, names, bounds)
    first = _step_path(root, bounds[0, 0])
    try:
        images = _load_step(first, [_CAMERAS[v] for v in views])
        sizes = {view: _image_size(first, images, _CAMERAS[view]) for view in views}
    except DataError as error:
        raise DamagedEpisodesError({names[0]: (first, str(error))}) from None
    lengths = (bounds[:, 1] - bounds[:, 0] + 1).astype(np.int64)
    read = _Windows(root, names, texts, bounds, sizes)
    return Episodes(
        source=source,
        lengths=lengths,
        read=read,
        texts=tuple(sorted(set(texts))),
        frame_sizes={size: f"{names[0]} {view}" for view, size in reversed(sizes.items())},
        seconds=float(lengths.sum() / FPS),
        views=views,
        columns=COLUMNS,
        rates=rates_of((FPS,)),
        files=read.files,
        summaries=partial(summarize, names, [(text,) for text in texts], [FPS] * len(names)),
    )


@dataclass(frozen=True, eq=False)
class _Windows:
    """Number -> Episode; reads state and action of every step of the window."""

    root: Path
    names: Sequence[str]
    texts: Sequence[str]
    bounds: np.ndarray
    sizes: dict[str, tuple[int, int]]  # by view

    def files(self) -> Iterator[Path]:
        used = np.zeros(int(self.bounds.max()) + 1, bool)  # windows overlap
        for start, end in self.bounds:
            used[start : end + 1] = True
        return (_step_path(self.root, int(step)) for step in np.flatnonzero(used))

    def __call__(self, number: int) -> Episode:
        start, end = map(int, self.bounds[number])
        steps = [_load_step(_step_path(self.root, i), ["robot_obs", "actions"]) for i in range(start, end + 1)]
        rows = {}
        for key, width in (("robot_obs", 15), ("actions", _WIDTH)):
            for i, step in enumerate(steps):
                if step[key].shape != (width,) or not np.isfinite(step[key]).all():
                    raise DataError(
                        f"{_step_path(self.root, start + i)}: {key} is not {width} finite values; copy it again"
                    )
            rows[key] = np.stack([step[key] for step in steps]).astype(np.float64)[:, :_WIDTH]
        return Episode(
            name=self.names[number],
            texts=(self.texts[number],),
            text_of=np.zeros(len(steps), np.int32),
            fps=FPS,
            state=rows["robot_obs"].astype(np.float32),
            action=rows["actions"].astype(np.float32),
            columns=COLUMNS,
            views={v: _Camera(self.root, start, len(steps), _CAMERAS[v], *size) for v, size in self.sizes.items()},
        )


@dataclass(frozen=True)
class _Camera:
    """Frames `key` of `count` steps from `first` on."""

    root: Path
    first: int
    count: int
    key: str
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), self.height, self.width, 3), np.uint8)
        for row, i in zip(out, indices, strict=True):
            if not 0 <= i < self.count:
                raise IndexError(f"{self.root}: step {i} is outside the window's {self.count} frames")
            path = _step_path(self.root, self.first + int(i))
            image = _load_step(path, [self.key])[self.key]
            if image.shape != row.shape or image.dtype != np.uint8:
                what = f"{image.dtype} {list(image.shape)}, expected uint8 {list(row.shape)}"
                raise DataError(f"{path}: {self.key} is {what}; copy it again")
            row[:] = image
        return out


def _step_path(root: Path, step: int) -> Path:
    return root / f"episode_{step:07d}.npz"


def _load_step(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            for key in keys:
                if (size := content.zip.getinfo(f"{key}.npy").file_size) > _LARGEST:
                    raise ValueError(f"{key} has {size} bytes")
            return {key: content[key] for key in keys}
    except Exception as error:  # numpy and zipfile raise errors of many kinds for damaged bytes
        raise DataError(f"{path} cannot be read ({shorten(error)}); copy it again") from None


def _image_size(path: Path, step: dict[str, np.ndarray], key: str) -> tuple[int, int]:
    image = step[key]
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"{path}: {key} is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]; copy it again")
    return image.shape[:2]


def _check_steps(root: Path, path: Path, names: Sequence[str], bounds: np.ndarray) -> None:
    present = steps(root)
    found = np.searchsorted(present, bounds)
    there = np.append(present, -1)[np.minimum(found, len(present))] == bounds
    whole = there.all(1) & (found[:, 1] - found[:, 0] == bounds[:, 1] - bounds[:, 0])
    if not whole.all():
        bad = int(np.flatnonzero(~whole)[0])
        known = set(present.tolist())
        missing = next(i for i in range(bounds[bad, 0], bounds[bad, 1] + 1) if i not in known)
        raise DataError(
            f"{_step_path(root, missing)} does not exist, but {path} needs it for {names[bad]} "
            f"({int((~whole).sum())} windows lack steps); copy the data set again"
        )


def steps(root: Path) -> np.ndarray:
    """The numbers of the steps that have a file, ascending int64."""
    matches = (re.fullmatch(r"episode_(\d{7})\.npz", name) for name in os.listdir(root))
    return np.sort(np.fromiter((int(match[1]) for match in matches if match), np.int64))


def annotations(path: Path) -> tuple[list[str], np.ndarray]:
    """(texts, first and last step int64 [n, 2])."""
    content = _read_annotations(path)
    try:
        texts = [str(t).strip() for t in content["language"]["ann"]]
        bounds = np.array([(int(a), int(b)) for a, b in content["info"]["indx"]], np.int64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{path} lacks language/ann or info/indx ({error!r}); copy it again") from None
    if len(texts) != len(bounds):
        raise DataError(f"{path} has {len(texts)} texts for {len(bounds)} windows; copy it again")
    if not texts:
        raise DataError(f"{path} contains no window; correct data.source")
    if len(bad := np.flatnonzero(((bounds < -_LAST) | (bounds > _LAST)).any(1))):
        start, end = bounds[bad[0]]
        raise DataError(f"{path}: window {bad[0]} runs from step {start} to {end}; the last step can be {_LAST}")
    return texts, bounds


def _read_annotations(path: Path) -> Any:
    """What the array of one object holds, by a pickle that can make nothing but arrays and containers."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if dtype.kind != "O" or shape != ():
                raise DataError(f"{path} is {dtype} {list(shape)}, expected one object; copy it again")
            array = _Unpickler(file, path).load()
            return array.item()
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; the source must be the folder of one split, with its annotations"
        ) from None
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); copy it again") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str):
        found = _ALLOWED.get((module, name))
        if found is None:
            raise DataError(
                f"{self._path} refers to {module}.{name}, which annotations do not need; "
                "the file may be unsafe and is not read"
            )
        return found
