"""RynnVLA-001's own HDF5, one file per episode: a folder of .hdf5 or .h5, one such file, or the JSON with `task_data`.

State and action have 6 values, the gripper last. The files do not state their unit. They are made from LeRobot SO100
data without conversion, so "lerobot:so100" is assumed. `rynnvla_unit`, an attribute of a file or a key of the JSON for
all its files, sets another unit. Set it for degrees from a LeRobot calibration of before mid-2025, which differ.

The JSON lists `task_data`: {task: {"data_path": [...], "instructions": [...]}}, {task: [path, ...]} or [path, ...];
relative paths start at the JSON's folder. With several instructions per task, step i uses instruction i modulo their
number; the public code picks one at random.

Source: RynnVLA-001, misc/lerobot_data_convert.py and datasets/vla_dataset.py.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.column_guess import guess
from data_pipelines.columns import Meaning, resolve
from data_pipelines.episode import DataError, Episode, Episodes, rates_of, summarize
from data_pipelines.sources.exclude import DamagedEpisodesError, left_in
from data_pipelines.sources.hdf5_files import StoredFrames, has, numbers, opened, texts
from data_pipelines.sources.index import Row, find_files, index_files
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig
from rynnvla_jax.errors import brief
from rynnvla_jax.storage import files

ROBOT = "lerobot:so100"
_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
_WIDTH = 6
_SUFFIXES = {".hdf5", ".h5"}
_LEAVE_OUT = "leave the file out with data.exclude"
_CAMERAS = {"front": "obs/front_image", "wrist": "obs/wrist_image"}


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes by path in natural order, or in the JSON's. Raises DataError naming the faulty file, ConfigError for
    a camera that no file has."""
    source = f"hdf5:{root}"
    base, names, instructions, unit = _files(root)
    keep = left_in(source, names, config)
    names, instructions = [names[i] for i in keep], [instructions[i] for i in keep]
    found = index_files("hdf5 1", base, names, _row, progress)
    cameras = set().union(*(row["sizes"] for row in found))
    views = tuple(v for v in _CAMERAS if v in cameras) if views is None else views
    for view in views:
        if view not in cameras:
            remedy = ONE_CAMERA if view == "wrist" else "correct data.source"
            raise ConfigError(f"{root}: no file has {_CAMERAS[view]}; {remedy}")
    spoken = [tuple(own) or tuple(row["texts"]) for own, row in zip(instructions, found, strict=True)]
    units = [row["unit"] or unit or ROBOT for row in found]
    ((usual, _),) = Counter(units).most_common(1)
    faults = {}
    for name, row, text, other in zip(names, found, spoken, units, strict=True):
        if lacking := [_CAMERAS[view] for view in views if view not in row["sizes"]]:
            faults[name] = f"lacks {lacking[0]}, which other files have; {_LEAVE_OUT}"
        elif not text:
            faults[name] = f"has no language_instruction; add the attribute, or {_LEAVE_OUT}"
        elif other != usual:
            first = names[units.index(usual)]
            faults[name] = (
                f"has the unit {other} but {first} has {usual}; use one kind of data per run, or {_LEAVE_OUT}"
            )
    if faults:
        raise DamagedEpisodesError({n: (base / n, f"{base / n} {fault}") for n, fault in faults.items()})
    lengths = np.array([row["steps"] for row in found], np.int64)
    sizes: dict[Any, str] = {}  # by (height, width)
    for name, row in zip(names, found, strict=True):
        for view in views:
            sizes.setdefault(tuple(row["sizes"][view]), f"{name} {view}")
    meaning = resolve(guess(units[0], _JOINTS, _JOINTS, (_WIDTH, _WIDTH)), config.columns, root)
    read = _Recordings(base, names, spoken, meaning, views, found)
    return Episodes(
        source=source,
        lengths=lengths,
        read=read,
        texts=tuple(sorted({t for text in spoken for t in text})),
        frame_sizes=sizes,
        seconds=float(sum(row["steps"] / row["fps"] for row in found)),
        views=views,
        columns=meaning.columns,
        rates=rates_of(row["fps"] for row in found),
        files=read.files,
        summaries=partial(summarize, names, spoken, [row["fps"] for row in found]),
    )


@dataclass(frozen=True, eq=False)
class _Recordings:
    """Number -> Episode."""

    base: Path
    names: Sequence[str]
    texts: Sequence[tuple[str, ...]]
    meaning: Meaning
    views: tuple[str, ...]
    rows: Sequence[Row]

    def files(self) -> Iterator[Path]:
        return (self.base / name for name in self.names)

    def __call__(self, number: int) -> Episode:
        path, row, instruction_texts = self.base / self.names[number], self.rows[number], self.texts[number]
        with opened(path) as content:
            state, action = _vectors(path, content)
        if len(action) != row["steps"]:
            raise DataError(
                f"{path} now has {len(action)} steps instead of {row['steps']}, so it was changed during "
                "the run; start the run again"
            )
        views = {v: StoredFrames(str(path), _CAMERAS[v], len(action), *row["sizes"][v]) for v in self.views}
        return Episode(
            name=self.names[number],
            texts=instruction_texts,
            text_of=(np.arange(len(action)) % len(instruction_texts)).astype(np.int32),
            fps=row["fps"],
            state=state[:, self.meaning.state],
            action=action[:, self.meaning.action],
            columns=self.meaning.columns,
            views=views,
        )


def _files(root: Path) -> tuple[Path, list[str], list[list[str]], str]:
    """(folder, paths of the files in it, instructions that the JSON gives for each, unit or "")."""
    if root.is_dir():
        names = find_files(root, _SUFFIXES)
        if not names:
            raise DataError(f"{root} contains no .hdf5 or .h5 file; correct data.source")
        return root, names, [[] for _ in names], ""
    if root.suffix.lower() in _SUFFIXES:
        return root.parent, [root.name], [[]], ""
    try:
        content = files.read_json(root)
        tasks = content["task_data"]
        tasks = list(tasks.values()) if isinstance(tasks, dict) else [tasks]
        names, instructions = [], []
        for task in tasks:
            paths, instruction_texts = (
                (task, []) if isinstance(task, list) else (task["data_path"], task.get("instructions", []))
            )
            instruction_texts = [
                str(text).strip()
                for text in ([instruction_texts] if isinstance(instruction_texts, str) else instruction_texts)
            ]
            paths = [paths] if isinstance(paths, str) else paths
            names += [str(path) for path in paths]
            instructions += [[text for text in instruction_texts if text]] * len(paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{root} has no readable task_data ({brief(error)}); use the JSON of the training run"
        ) from None
    if not names:
        raise DataError(f"{root}: task_data lists no files; correct it")
    paths = [os.path.abspath(root.parent / name) for name in names]
    base = os.path.commonpath([os.path.dirname(p) for p in paths])
    names = [os.path.relpath(p, base).replace(os.sep, "/") for p in paths]
    return Path(base), names, instructions, str(content.get("rynnvla_unit", ""))


def _row(path: Path) -> Row:
    with opened(path) as content:
        if has(content, "data") and not has(content, "action"):
            raise DataError(f"{path} has the layout of robomimic; if it is LIBERO's, set the source to libero:PATH")
        _, action = _vectors(path, content)
        fps = _rate(path, np.asarray(numbers(content, "timestamp"), np.float64).reshape(-1), len(action))
        sizes = {}
        for view, key in _CAMERAS.items():
            if not has(content, key):
                continue
            images = numbers(content, key)
            if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) != len(action):
                raise DataError(
                    f"{path}: {key} is {images.dtype} {list(images.shape)}, not uint8 [{len(action)}, H, W, 3]; "
                    f"convert the episode again"
                )
            images[-1]
            sizes[view] = list(images.shape[1:3])
        unit = texts(content, "rynnvla_unit")
        instruction_texts = texts(content, "language_instruction")
    return {
        "steps": len(action),
        "fps": fps,
        "texts": instruction_texts,
        "sizes": sizes,
        "unit": unit[0] if unit else "",
    }


def _vectors(path: Path, content: h5py.File) -> tuple[np.ndarray, np.ndarray]:
    """State and action, float32 [N, 6], checked."""
    out = []
    for key in ("obs/state", "action"):
        values = np.asarray(numbers(content, key), np.float32)
        if values.ndim != 2 or values.shape[1] != _WIDTH or len(values) < 2:
            raise DataError(
                f"{path}: {key} has shape {list(values.shape)}, expected [N, {_WIDTH}]; convert the episode again"
            )
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise DataError(f"{path}: {key} is not finite at step {bad}; {_LEAVE_OUT}")
        out.append(values)
    if len(out[0]) != len(out[1]):
        raise DataError(f"{path} has {len(out[0])} states but {len(out[1])} actions; convert the episode again")
    return out[0], out[1]


def _rate(path: Path, times: np.ndarray, steps: int) -> float:
    """Frames per second, from time stamps in seconds whose interval is constant to within half a frame."""
    if len(times) != steps:
        raise DataError(f"{path} has {len(times)} time stamps for {steps} steps; convert the episode again")
    step = float(np.median(np.diff(times)))
    if not (np.isfinite(times).all() and step > 0):
        raise DataError(f"{path}: timestamp does not ascend; convert the episode again")
    # The mean is exact where rounding of single stamps is not; the median shows gaps that would spoil the mean.
    fps = (steps - 1) / float(times[-1] - times[0])
    late = np.abs(times - times[0] - np.arange(steps) / fps) > 0.5 / fps
    gaps = np.abs(np.diff(times) - step) > 0.5 * step
    if late.any() or gaps.any():
        bad = int(np.flatnonzero(gaps)[0]) + 1 if gaps.any() else int(np.flatnonzero(late)[0])
        raise DataError(f"{path}: timestamp is uneven at step {bad} ({1 / step:.4g} fps otherwise); {_LEAVE_OUT}")
    return round(fps, 3)
