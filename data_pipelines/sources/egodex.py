"""EgoDex: ego-centric video with hand poses. One view ("front"); metres; states and chunks in the camera's frame.

State at step t, [6]: left then right wrist position relative to the camera of that step. The action at t is the
position of both wrists at t + 1, in the recording's world frame; `Episode.chunk` rotates the displacements into the
frame of the camera at the chunk's first step. An episode of N frames thus has N - 1 steps.

Every file is checked when it is first seen (`index`); poses are read, and checked again, when an episode is read.

Source: EgoDex (`<task>/<i>.hdf5` with `<task>/<i>.mp4`); the layout is described in the data set's documentation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.episode import DataError, Episode, Episodes, rates_of, summarize
from data_pipelines.sources.exclude import left_in
from data_pipelines.sources.hdf5_files import numbers, opened, texts
from data_pipelines.sources.index import Row, find_files, index_files, index_videos
from data_pipelines.video import VideoFrames
from rynnvla_jax.columns import ActionColumn, Column, Columns
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig

_HANDS = ("leftHand", "rightHand")
_NAMES = [f"{hand}_wrist_{axis}" for hand in ("left", "right") for axis in "xyz"]
_WHY = "format of EgoDex"
COLUMNS = Columns(
    "egodex",
    tuple(Column(name, "metres", "position", _WHY) for name in _NAMES),
    tuple(ActionColumn(name, "metres", "position", _WHY, pair=i) for i, name in enumerate(_NAMES)),
)
_FPS = 30.0  # where no video is looked at


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes of every `.hdf5` under `root`, by path in natural order. Raises DataError naming the faulty file."""
    views = ("front",) if views is None else views
    if "wrist" in views:
        raise ConfigError(f"{root}: EgoDex has no wrist camera; {ONE_CAMERA}")
    names = [name.removesuffix(".hdf5") for name in find_files(root, {".hdf5"})]
    if not names:
        raise DataError(f"{root} contains no .hdf5 file; correct data.source")
    source = f"egodex:{root}"
    names = [names[i] for i in left_in(source, names, config)]
    rows = index_files("egodex 1", root, [f"{n}.hdf5" for n in names], _row, progress)
    lengths = np.array([row["steps"] for row in rows], np.int64)
    videos = index_videos(root, [f"{n}.mp4" for n in names], progress) if "front" in views else []
    for name, steps, video in zip(names, lengths, videos, strict=False):
        if video["frames"] != steps + 1:
            raise DataError(
                f"{root / name}.mp4 has {video['frames']} frames but {Path(name).name}.hdf5 has {steps + 1} poses; "
                f"remove both files"
            )
    fps = np.array([v["fps"] for v in videos] or [_FPS] * len(names))
    sizes = np.array([(v["height"], v["width"]) for v in videos], np.int32)
    read = _Recordings(root, names, lengths, fps, sizes)
    return Episodes(
        source=source,
        lengths=lengths,
        read=read,
        texts=tuple(sorted({row["text"] for row in rows})),
        frame_sizes={
            (int(size[0]), int(size[1])): f"{n} front" for n, size in reversed(list(zip(names, sizes, strict=False)))
        },
        seconds=float((lengths / fps).sum()),
        views=views,
        columns=COLUMNS,
        rates=rates_of(fps.tolist()),
        files=read.files,
        summaries=partial(summarize, names, [(row["text"],) for row in rows], fps.tolist()),
    )


@dataclass(frozen=True, eq=False)
class _Recordings:
    """Number -> Episode. `sizes` [n, 2] is empty where no video is wanted."""

    root: Path
    names: Sequence[str]
    lengths: np.ndarray
    fps: np.ndarray
    sizes: np.ndarray

    def files(self) -> Iterator[Path]:
        return (self.root / f"{name}.hdf5" for name in self.names)

    def __call__(self, number: int) -> Episode:
        name, steps, fps = self.names[number], int(self.lengths[number]), float(self.fps[number])
        file = self.root / f"{name}.hdf5"
        camera, hands, text = _read(file)
        if len(camera) != steps + 1:
            raise DataError(
                f"{file} now has {len(camera)} poses instead of {steps + 1}, so it was changed during the "
                "run; start the run again"
            )
        views = {}
        if len(self.sizes):
            height, width = map(int, self.sizes[number])
            views["front"] = VideoFrames(str(self.root / f"{name}.mp4"), 0, steps + 1, fps, height, width)
        world_to_camera = camera[:, :3, :3].transpose(0, 2, 1)
        relative = np.einsum("nij,nhj->nhi", world_to_camera, hands - camera[:, None, :3, 3])
        world = hands.reshape(len(hands), -1)
        return Episode(
            name=name,
            texts=(text,),
            text_of=np.zeros(steps, np.int32),
            fps=fps,
            state=relative.reshape(len(hands), -1)[:-1].astype(np.float32),
            action=world[1:].astype(np.float32),
            origin=world[:-1].astype(np.float32),
            world_to_camera=world_to_camera[:-1].astype(np.float32),
            columns=COLUMNS,
            views=views,
        )


def _row(file: Path) -> Row:
    camera, _, text = _read(file)
    return {"steps": len(camera) - 1, "text": text}


def _read(file: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """(camera poses [N, 4, 4], wrist positions [N, 2, 3], instruction), world frame, metres, float64."""
    with opened(file) as content:
        poses = {n: np.asarray(numbers(content, f"transforms/{n}"), np.float64) for n in ("camera", *_HANDS)}
        which = (*texts(content, "which_llm_description"), "1")[0]
        key = {"1": "llm_description", "2": "llm_description2"}.get(which)
        text = " ".join(texts(content, key)) if key else ""
    camera = poses["camera"]
    count = len(camera) if camera.ndim else 0
    for name, pose in poses.items():
        if pose.shape != (count, 4, 4):
            raise DataError(
                f"{file}: transforms/{name} has shape {list(pose.shape)}, expected [N, 4, 4]; copy it again"
            )
        if not np.isfinite(pose).all():
            raise DataError(f"{file}: transforms/{name} is not finite; remove the recording")
    if len(camera) < 2:
        raise DataError(f"{file} has {len(camera)} poses, too few for a motion; remove the recording")
    rotation = camera[:, :3, :3]
    if np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() > 1e-2:
        raise DataError(f"{file}: transforms/camera does not contain rotations; remove the recording")
    if not text:
        raise DataError(f"{file}: which_llm_description is {which!r} and {key} is empty; remove the recording")
    return camera, np.stack([poses[hand][:, :3, 3] for hand in _HANDS], axis=1), text
