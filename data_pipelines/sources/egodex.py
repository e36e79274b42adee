"""EgoDex: ego-centric video with hand poses. One view ("front"); metres; states and chunks in the camera's frame.

State at step t, [6]: left then right wrist position relative to the camera of that step. The action at t is where
both wrists are at t + 1, in the recording's world frame; `Episode.chunk` turns the displacements into the frame of
the camera at the chunk's first step. An episode of N frames thus has N - 1 steps.

Source: EgoDex (`<task>/<i>.hdf5` beside `<task>/<i>.mp4`); layout in the data set's own description.
"""

import re
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from data_pipelines.episode import DataError, Episode
from data_pipelines.video import ClipRequest, open_clips
from rynnvla_jax.config import ConfigError, DataConfig

UNIT = "metres"
_HANDS = ("leftHand", "rightHand")


def load(root: Path, config: DataConfig, views: tuple[str, ...], progress: bool = True) -> list[Episode]:
    """Episodes of every `.hdf5` under `root`, by path in natural order. Raises DataError naming the file at fault.

    `config` is not used: EgoDex has one camera.
    """
    if "wrist" in views:
        raise ConfigError(f"{root}: EgoDex has no wrist camera; set sequence.use_wrist_frame=False")
    files = sorted(root.rglob("*.hdf5"), key=lambda p: _natural(p.relative_to(root)))
    if not files:
        raise DataError(f"{root} holds no .hdf5 file; correct data.source")
    clips = []
    if "front" in views:
        clips = open_clips([ClipRequest(f.with_suffix(".mp4")) for f in files], root.name, progress)
    episodes = []
    for i, file in enumerate(tqdm(files, desc=f"{root.name}: episodes", disable=None if progress else True)):
        camera, hands, text = _read(file)
        clip = clips[i] if clips else None
        if clip and clip.count != len(camera):
            raise DataError(f"{clip.path} has {clip.count} frames but {file.name} {len(camera)} poses; remove the pair")
        world_to_camera = camera[:, :3, :3].transpose(0, 2, 1)
        relative = np.einsum("nij,nhj->nhi", world_to_camera, hands - camera[:, None, :3, 3])
        world = hands.reshape(len(hands), -1)
        episodes.append(
            Episode(
                name=file.relative_to(root).with_suffix("").as_posix(),
                texts=(text,),
                text_of=np.zeros(len(camera) - 1, np.int32),
                fps=clip.fps if clip else 30.0,
                state=relative.reshape(len(hands), -1)[:-1].astype(np.float32),
                action=world[1:].astype(np.float32),
                origin=world[:-1].astype(np.float32),
                world_to_camera=world_to_camera[:-1].astype(np.float32),
                unit=UNIT,
                absolute=(),
                views={"front": clip} if clip else {},
            )
        )
    return episodes


def _natural(path: Path) -> list:
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", path.as_posix())]


def _read(file: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """(camera poses [N, 4, 4], wrist positions [N, 2, 3], instruction), world frame, metres, float64."""
    try:
        with h5py.File(file, "r") as content:
            poses = {}
            for name in ("camera", *_HANDS):
                if f"transforms/{name}" not in content:
                    raise DataError(f"{file} lacks transforms/{name}; copy it again")
                poses[name] = np.asarray(content[f"transforms/{name}"], np.float64)
            attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in content.attrs.items()}
    except OSError as error:
        raise DataError(f"{file} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    camera = poses["camera"]
    for name, pose in poses.items():
        if pose.shape != (len(camera), 4, 4):
            raise DataError(f"{file}: transforms/{name} is {list(pose.shape)}, not [N, 4, 4]; copy it again")
        if not np.isfinite(pose).all():
            raise DataError(f"{file}: transforms/{name} is not finite; remove the recording")
    if len(camera) < 2:
        raise DataError(f"{file} has {len(camera)} poses, too few for a motion; remove the recording")
    rotation = camera[:, :3, :3]
    if np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() > 1e-2:
        raise DataError(f"{file}: transforms/camera holds no rotations; remove the recording")
    which = str(attributes.get("which_llm_description", "1"))
    key = {"1": "llm_description", "2": "llm_description2"}.get(which)
    text = str(attributes.get(key, "")).strip() if key else ""
    if not text:
        raise DataError(f"{file}: which_llm_description is {which!r} and {key} is empty; remove the recording")
    return camera, np.stack([poses[hand][:, :3, 3] for hand in _HANDS], axis=1), text
