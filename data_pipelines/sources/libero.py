"""LIBERO's demonstrations: a folder of .hdf5 files, or one such file, in robomimic's layout.

    data                          attribute problem_info: JSON with language_instruction
    data/demo_<i>/actions         [N, 7], deltas of the end effector's pose from -1 to 1, and the gripper, -1 or 1
    data/demo_<i>/obs/            ee_states [N, 6], gripper_states [N, 2]; agentview_rgb, eye_in_hand_rgb [N, H, W, 3]

The state is `ee_states` (position in metres, orientation as axis and angle) and `gripper_states`. Actions are used as
recorded. The cameras are agentview (front) and eye in hand (wrist); robosuite stores
pictures bottom row first (attribute macros_image_convention: "opengl"), and they are turned upright here. The rate is
20 Hz. An observation is that after the action of the same row, as LIBERO records it. Episodes are named
"<file>/demo_<i>".

Source: LIBERO (arXiv 2306.03310), scripts/create_dataset.py; robomimic's data set format; robosuite's macros.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.episode import DataError, Episode, Episodes, Kept, rates_of, summarize
from data_pipelines.sources.exclude import DamagedEpisodesError, left_in
from data_pipelines.sources.hdf5_files import StoredFrames, has, members, numbers, opened, texts
from data_pipelines.sources.index import Row, find_files, index_files
from rynnvla_jax.columns import ActionColumn, Column, Columns
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig

FPS = 20.0
_STATES, _ACTIONS = {"ee_states": 6, "gripper_states": 2}, 7
_WHY = "format of LIBERO"
COLUMNS = Columns(
    "libero",
    (
        *(Column(axis, "metres", "position", _WHY) for axis in "xyz"),
        *(Column(f"axis_angle_{axis}", "radians", "rotation_vector", _WHY) for axis in "xyz"),
        *(Column(f"gripper_{finger}", "metres", "gripper", _WHY) for finger in ("left", "right")),
    ),
    (
        *(ActionColumn(f"delta_{axis}", "1 is 0.05 m", "position", _WHY, delta=True) for axis in "xyz"),
        *(ActionColumn(f"delta_axis_angle_{axis}", "1 is 0.5 rad", "other", _WHY, delta=True) for axis in "xyz"),
        ActionColumn("gripper", "-1..1", "gripper", _WHY),
    ),
)
_SUFFIXES = {".hdf5", ".h5"}
_CAMERAS = {"front": "agentview_rgb", "wrist": "eye_in_hand_rgb"}


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes by path and number. Raises DataError naming the faulty file and demonstration, ConfigError for a
    camera that none has."""
    source = f"libero:{root}"
    base, files = (root.parent, [root.name]) if root.is_file() else (root, find_files(root, _SUFFIXES))
    if not files:
        raise DataError(f"{root} contains no .hdf5 or .h5 file; correct data.source")
    found = index_files("libero 1", base, files, _row, progress)
    demos = [(file, demo, row) for file, row in zip(files, found, strict=True) for demo in row["demos"]]
    names = [f"{file}/{demo['name']}" if demo["name"] else file for file, demo, _ in demos]
    keep = left_in(source, names, config)
    if faults := {names[i]: (base / demos[i][0], demos[i][1]["fault"]) for i in keep if demos[i][1]["fault"]}:
        raise DamagedEpisodesError(faults)
    cameras = set().union(*(demos[i][1]["sizes"] for i in keep))
    views = tuple(v for v in _CAMERAS if v in cameras) if views is None else views
    sizes: dict[Any, str] = {}  # by (height, width)
    for view in views:
        if view not in cameras:
            remedy = ONE_CAMERA if view == "wrist" else "correct data.source"
            raise ConfigError(f"{root}: no demonstration has obs/{_CAMERAS[view]}; {remedy}")
        if lacking := [i for i in keep if view not in demos[i][1]["sizes"]]:
            without = f"lacks obs/{_CAMERAS[view]}; leave it out with data.exclude"
            raise DamagedEpisodesError(
                {names[i]: (base / demos[i][0], f"{base}/{names[i]} {without}") for i in lacking}
            )
        for i in keep:
            sizes.setdefault(tuple(demos[i][1]["sizes"][view]), f"{names[i]} {view}")
    lengths = np.array([demos[i][1]["steps"] for i in keep], np.int64)
    return Episodes(
        source=source,
        lengths=lengths,
        read=Kept(_Demonstrations(base, names, demos, views), np.array(keep)),
        texts=tuple(sorted({demos[i][2]["text"] for i in keep})),
        frame_sizes=sizes,
        seconds=float(lengths.sum() / FPS),
        views=views,
        columns=COLUMNS,
        rates=rates_of((FPS,)),
        files=partial(_files, base, tuple(files)),
        summaries=partial(
            summarize, [names[i] for i in keep], [(demos[i][2]["text"],) for i in keep], [FPS] * len(keep)
        ),
    )


def _files(base: Path, names: Sequence[str]) -> list[Path]:
    return [base / name for name in names]


def is_libero(path: Path) -> bool:
    """Whether a file has this layout; False for one that cannot be read."""
    try:
        with opened(path) as content:
            return bool(_demos(content))
    except DataError:
        return False


@dataclass(frozen=True, eq=False)
class _Demonstrations:
    """Number -> Episode."""

    base: Path
    names: Sequence[str]
    demos: Sequence[tuple[str, Row, Row]]
    views: tuple[str, ...]

    def __call__(self, number: int) -> Episode:
        file, demo, row = self.demos[number]
        path = self.base / file
        with opened(path) as content:
            state, action = _vectors(path, content, demo["name"])
        if len(action) != demo["steps"]:
            raise DataError(f"{path}: {demo['name']} was changed during the run; start the run again")
        return Episode(
            name=self.names[number],
            texts=(row["text"],),
            text_of=np.zeros(len(action), np.int32),
            fps=FPS,
            state=state,
            action=action,
            columns=COLUMNS,
            views={view: self._camera(path, demo, view, row["bottom_first"]) for view in self.views},
        )

    def _camera(self, path: Path, demo: Row, view: str, bottom_first: bool) -> StoredFrames:
        height, width = demo["sizes"][view]
        return StoredFrames(str(path), _key(demo["name"], view), demo["steps"], height, width, bottom_first)


def _key(demo: str, view: str) -> str:
    return f"data/{demo}/obs/{_CAMERAS[view]}"


def _row(path: Path) -> Row:
    """The index entry of a file. A fault is kept, since it matters only if its demonstration is not left out."""
    try:
        with opened(path) as content:
            demos = _demos(content)
            if not demos:
                raise DataError(f"{path} has no data/demo_0, so it is none of LIBERO's files; remove it")
            text = _instruction(path, texts(content, "problem_info", "data"))
            bottom_first = texts(content, "macros_image_convention", "data") != ("opencv",)
    except DataError as error:
        return {"text": "", "bottom_first": True, "demos": [_fault("", error)]}
    return {"text": text, "bottom_first": bottom_first, "demos": [_demo(path, name) for name in demos]}


def _fault(name: str, error: DataError) -> Row:
    return {"name": name, "steps": 0, "sizes": {}, "fault": str(error)}


def _demos(content: h5py.File) -> list[str]:
    """Names of the demonstrations, by their number."""
    found = [n for n in members(content, "data") if n.startswith("demo_") and n[5:].isdecimal()]
    return sorted(found, key=lambda name: (int(name[5:]), name))


def _instruction(path: Path, info: tuple[str, ...]) -> str:
    try:
        text = json.loads(info[0])["language_instruction"]
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{path}: attribute problem_info of data has no language_instruction; add it, or remove the file"
        ) from None
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
    if not (text := text.strip().strip('"').strip()):
        raise DataError(f"{path}: language_instruction is empty; add it, or remove the file")
    return text


def _demo(path: Path, name: str) -> Row:
    try:
        with opened(path) as content:
            _, action = _vectors(path, content, name)
            sizes = {}
            for view in _CAMERAS:
                key = _key(name, view)
                if not has(content, key):
                    continue
                images = numbers(content, key)
                if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) != len(action):
                    shape = f"{images.dtype} {list(images.shape)}, not uint8 [{len(action)}, H, W, 3]"
                    raise DataError(f"{path}: {key} is {shape}; leave it out with data.exclude")
                images[-1]
                sizes[view] = list(images.shape[1:3])
    except DataError as error:
        return _fault(name, error)
    return {"name": name, "steps": len(action), "sizes": sizes, "fault": ""}


def _vectors(path: Path, content: h5py.File, name: str) -> tuple[np.ndarray, np.ndarray]:
    """State float32 [N, 8] and action float32 [N, 7], checked."""
    parts = []
    for key, width in [*((f"obs/{k}", w) for k, w in _STATES.items()), ("actions", _ACTIONS)]:
        values = np.asarray(numbers(content, f"data/{name}/{key}"), np.float32)
        if values.ndim != 2 or values.shape[1] != width or len(values) < 1:
            raise DataError(
                f"{path}: {name}/{key} has shape {list(values.shape)}, expected [N, {width}]; leave it out with "
                "data.exclude"
            )
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise DataError(f"{path}: {name}/{key} is not finite at step {bad}; leave it out with data.exclude")
        parts.append(values)
    if len({len(values) for values in parts}) != 1:
        raise DataError(f"{path}: {name} has parts of {', '.join(str(len(v)) for v in parts)} steps; leave it out")
    return np.concatenate(parts[:-1], axis=1), parts[-1]
