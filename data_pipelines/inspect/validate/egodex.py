"""Finds every fault of an EgoDex data set; `sources/egodex.py` stops at the first one."""

from pathlib import Path

import numpy as np

from data_pipelines.cut_off import COPY
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.audit import Audit
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.rows import Location, Rows
from data_pipelines.inspect.validate.videos import Segment, check_videos
from data_pipelines.sources.egodex import COLUMNS
from data_pipelines.sources.hdf5_files import numbers, opened, texts
from data_pipelines.sources.index import find_files
from rynnvla_jax.config import DataConfig
from rynnvla_jax.progress import progress_bar

_POSES = ("camera", "leftHand", "rightHand")
_TEXTS = {"1": "llm_description", "2": "llm_description2"}
_FPS = 30.0  # of the data set


def check(root: Path, config: DataConfig, findings: Findings, progress: bool) -> None:
    """Adds to `findings`. Raises DataError when the folder has no .hdf5 file."""
    files = [root / name for name in find_files(root, {".hdf5"})]
    if not files:
        raise DataError(f"{root} holds no .hdf5 file; correct the path")
    rows, videos = Rows(findings, COLUMNS), {}
    audit = Audit(findings, COLUMNS, root, config, cameras=1)
    for file in progress_bar(files, desc=f"{root.name}: poses", unit="file", show=progress):
        name = file.relative_to(root).with_suffix("").as_posix()
        if name in findings.left_out:
            continue
        findings.looked_at["episodes"] += 1
        poses = _check_file(file, name, findings)
        length = max((len(p) for p in poses.values() if p.ndim), default=0)
        if file.with_suffix(".mp4").is_file():
            videos[file.with_suffix(".mp4")] = [Segment(name, 0, length)] if length else []
        else:
            message = f"this file is missing, but {file.name} is there; {COPY}"
            findings.error("file reference", file.with_suffix(".mp4"), None, message, [name])
        if len(poses) == len(_POSES) and all(p.shape == (length, 4, 4) for p in poses.values()) and length >= 2:
            findings.looked_at["rows"] += length
            audit.lengths[name] = length - 1  # a step is the motion to the next pose
            _check_poses(file, name, poses, rows, audit, findings)
    named = {file.with_suffix(".mp4") for file in files}
    for path in (root / name for name in find_files(root, {".mp4"})):
        if path not in named:
            findings.warn("file reference", path, None, f"{path.stem}.hdf5 is missing beside it; {COPY}")
    rows.finish()
    check_videos(findings, videos, 0.0, root.name, True, audit, progress)
    audit.finish()


def _check_file(file: Path, name: str, findings: Findings) -> dict[str, np.ndarray]:
    """The poses that the file has; checks text and shapes."""
    poses = {}
    try:
        with opened(file) as content:
            for n in _POSES:
                try:
                    poses[n] = np.asarray(numbers(content, f"transforms/{n}"), np.float64)
                except DataError as error:
                    findings.error("column", file, None, str(error), [name])
            which = (*texts(content, "which_llm_description"), "1")[0]
            spoken = {n: texts(content, key) for n, key in _TEXTS.items()}
    except DataError as error:
        findings.error("file", file, None, str(error), [name])
        return {}
    count = len(poses["camera"]) if "camera" in poses and poses["camera"].ndim else 0
    for part, pose in poses.items():
        if pose.ndim != 3 or pose.shape != (count, 4, 4):
            findings.error(
                "column", file, None, f"transforms/{part} has shape {list(pose.shape)}, expected [N, 4, 4]", [name]
            )
    if "camera" in poses and count < 2:
        findings.error("row count", file, None, f"{count} poses are too few for a motion", [name])
    if which not in _TEXTS:
        findings.error("instruction", file, None, f"which_llm_description is {which!r}, not '1' or '2'", [name])
    elif not spoken[which]:
        findings.error("instruction", file, None, f"{_TEXTS[which]} is empty", [name])
    return poses


def _check_poses(
    file: Path, name: str, poses: dict[str, np.ndarray], rows: Rows, audit: Audit, findings: Findings
) -> None:
    """`poses` [N, 4, 4] each, world frame, metres."""
    finite = True
    for which, pose in poses.items():
        if len(bad := np.flatnonzero(~np.isfinite(pose).all((1, 2)))):
            message = f"transforms/{which} is not finite at step {bad[0]} ({len(bad)} steps in total)"
            findings.error("finite", file, bad[0], message, [name])
            finite = False
    if not finite:
        return
    rotation = poses["camera"][:, :3, :3]
    wrong = np.flatnonzero(np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2)) > 1e-2)
    if len(wrong):
        message = f"transforms/camera is not a rotation at step {wrong[0]} ({len(wrong)} steps in total)"
        findings.error("rotation", file, wrong[0], message, [name])
        return
    hands = np.stack([poses[hand][:, :3, 3] for hand in _POSES[1:]], axis=1)
    seen = np.einsum("nji,nhj->nhi", rotation, hands - poses["camera"][:, None, :3, 3]).reshape(len(hands), -1)
    world = hands.reshape(len(hands), -1)
    state = seen[:-1].astype(np.float32)
    rows.add(Location(name, file), state, world[1:], origin=world[:-1])
    audit.rows(Location(name, file), state, world[1:], _FPS, joints=False)
