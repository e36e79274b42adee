"""What a folder says it holds before it is opened as episodes: features, and the keys of config.data that it needs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.columns import flatten
from data_pipelines.sources import KINDS, copies, lerobot_format
from rynnvla_jax.config import VIEW, DataConfig
from rynnvla_jax.errors import listing

_WRIST = re.compile(r"wrist|hand|gripper|eye_in|arm_cam|in_hand")
_NO_PICTURE = re.compile(r"depth|segm|mask|infrared|(^|[._])ir($|[._])")
_FRONT = re.compile(r"front|top|high|head|exterior|static|agent|main|^image$|\.image$|base")


@dataclass(frozen=True)
class Features:
    """`what` is the format, `rows` are (feature, type and shape, names); `keys` are those of config.data that name what
    this data set calls otherwise, such as {"front": "observation.images.top"}. `cameras` are those that would not be
    used.
    """

    what: str
    rows: tuple[tuple[str, str, str], ...] = ()
    keys: dict[str, str] = field(default_factory=dict)
    cameras: tuple[str, ...] = ()


def find(source: str, config: DataConfig, progress: bool = True) -> Features:
    """Of "KIND:PATH"; nothing but the format of kinds whose features are fixed.

    Raises DataError for metadata that cannot be read.
    """
    kind, _, path = source.partition(":")
    if kind == "lerobot":
        return _lerobot(copies.described(kind, path, progress), config)
    if kind == "rlds":
        return _rlds(copies.described(kind, path, progress), config)
    return Features(KINDS[kind])


def _lerobot(root: Path, config: DataConfig) -> Features:
    info = lerobot_format.read_features(root)
    rows = []
    for key, feature in info.features.items():
        names = [] if feature.dtype in ("video", "image") else list(flatten(feature.names))
        rows.append((key, f"{feature.dtype} {feature.shape}", listing(names, 8)))
    keys = {}
    for which in ("state", "action"):
        likely = lerobot_format.likely(info, which)
        if getattr(config.lerobot, which) not in info.features and len(likely) == 1:
            keys[f"lerobot.{which}"] = likely[0]
    cameras = info.cameras("video", "image")
    named = info.camera_keys(config)
    keys |= _cameras(cameras, named)
    robot = f", robot {info.robot_type}" if info.robot_type else ""
    what = f"LeRobot {info.codebase_version}{robot}, {info.fps:g} steps per second"
    return Features(what, tuple(rows), keys, _unused(cameras, named | keys))


def _rlds(root: Path, config: DataConfig) -> Features:
    from data_pipelines.sources import openx, rlds

    name, features = rlds.features(root)
    rows = [(key, f"{dtype} {list(shape)}", "") for key, (shape, dtype) in features.items()]
    observed = {
        key.removeprefix("observation/"): shape for key, (shape, _) in features.items() if "observation/" in key
    }
    keys: dict[str, str] = {}
    cameras: tuple[str, ...] = ()
    if name not in openx.DATA_SETS:
        pictures = [key for key, shape in observed.items() if len(shape) == 3 and shape[2] == 3]
        named = {"front": config.rlds.front, "wrist": config.rlds.wrist} | {view: view for view in config.extra_views}
        found = _cameras(pictures, named)
        cameras = _unused(pictures, named | found)
        keys |= {f"rlds.{view}": key for view, key in found.items()}
        vectors = [key for key, shape in observed.items() if len(shape) == 1]
        if config.rlds.state and config.rlds.state not in observed and len(vectors) == 1:
            keys["rlds.state"] = vectors[0]
    return Features(f"RLDS, data set {name}", tuple(rows), keys, cameras)


def _unused(cameras: Sequence[str], named: Mapping[str, str]) -> tuple[str, ...]:
    left = (c for c in cameras if c not in named.values() and not _NO_PICTURE.search(c.lower()))
    return tuple(c for c in left if re.fullmatch(VIEW, c))  # others cannot be used


def _cameras(cameras: Sequence[str], named: dict[str, str]) -> dict[str, str]:
    """The cameras for front and wrist, where the config names none of these."""
    keys: dict[str, str] = {}
    left = [camera for camera in cameras if camera not in named.values()]
    left = [camera for camera in left if not _NO_PICTURE.search(camera.lower())] or left
    if named["wrist"] not in cameras:
        wrists = [camera for camera in left if _WRIST.search(camera.lower())]
        if wrists:
            keys["wrist"] = wrists[0]
    if named["front"] not in cameras:
        others = [camera for camera in left if not _WRIST.search(camera.lower())]
        front = next((camera for camera in others if _FRONT.search(camera.lower())), next(iter(others), None))
        if front is None and "wrist" in keys:
            front = keys.pop("wrist")  # the only camera is the front one, whatever it is called
        elif front is None and named["wrist"] in cameras:
            front, keys["wrist"] = named["wrist"], "none"
        if front:
            keys["front"] = front
    return keys
