"""Writes clips in EgoDex's layout, `<task>/<i>.hdf5` and `<task>/<i>.mp4`, aligned frame by frame.

Source: the layout of EgoDex. Departs from it: pictures are square, `confidences` are 1 where a joint is inside the
picture and 0 elsewhere, and of the body only the hands are there.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from rynnvla_jax.sim.lerobot_writer import H264
from rynnvla_jax.storage import files
from rynnvla_jax.storage.mp4 import Mp4Writer

_POSES, _VIDEO = "clip.h5", "clip.mp4"  # of one clip in its own folder; no reader takes it for data


class ClipWriter:
    """One clip in `folder`. A context manager; complete after its exit.

    Args:
      size: pixels a side.
      intrinsic: float32 [3, 3] of the camera, pixels.
      attributes: EgoDex's, of the file.
    """

    def __init__(self, folder: Path, size: int, fps: int, intrinsic: np.ndarray, attributes: Mapping[str, str]):
        self._folder, self._intrinsic, self._attributes = folder, intrinsic, attributes
        self._size = size
        self._poses: list[Mapping[str, np.ndarray]] = []
        self._video = Mp4Writer(folder / _VIDEO, fps, H264)

    def __enter__(self) -> "ClipWriter":
        return self

    def add(self, poses: Mapping[str, np.ndarray], image: np.ndarray) -> None:
        """One frame: float32 [4, 4] in the world by name, "camera" among them, and uint8 [size, size, 3]."""
        self._video.add(image)
        self._poses.append(poses)

    def __len__(self) -> int:
        return len(self._poses)

    def __exit__(self, kind, *error) -> None:
        self._video.__exit__(kind, *error)
        if kind is None:
            self._write()

    def _write(self) -> None:
        tracks = {name: np.stack([poses[name] for poses in self._poses]) for name in self._poses[0]}
        with h5py.File(self._folder / _POSES, "w") as file:
            file["camera/intrinsic"] = self._intrinsic
            for name, track in tracks.items():
                file[f"transforms/{name}"] = track
                if name != "camera":
                    file[f"confidences/{name}"] = self._seen(tracks["camera"], track[:, :3, 3])
            file.attrs.update(self._attributes)

    def _seen(self, camera: np.ndarray, points: np.ndarray) -> np.ndarray:
        """float32 [frames]: 1 where a point [frames, 3] is inside the picture."""
        x, y, z = np.einsum("nji,nj->ni", camera[:, :3, :3], points - camera[:, :3, 3]).T
        pixels = self._intrinsic[:2, :2] @ (np.stack([x, y]) / z) + self._intrinsic[:2, 2:]
        return ((z > 0) & (pixels >= 0).all(0) & (pixels < self._size).all(0)).astype(np.float32)


def assemble(folders: Sequence[Path], out: Path) -> None:
    """Copies the clips of `folders` to `out`/0.hdf5, `out`/0.mp4 and on."""
    out.mkdir(parents=True, exist_ok=True)
    for i, folder in enumerate(folders):
        for name, suffix in ((_VIDEO, "mp4"), (_POSES, "hdf5")):
            with files.replacing(out / f"{i}.{suffix}") as partial:
                shutil.copyfile(folder / name, partial)
