"""One episode, whatever it was recorded with. Every source returns these; nothing behind knows the source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rynnvla_jax.actions import relative_chunk


class DataError(ValueError):
    """Data that cannot be used; the message names the file or record and the remedy."""


class Frames(Protocol):
    """A camera's frames of one episode, decoded when asked for."""

    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Episode:
    """N steps of one recording.

    `state` float32 [N, S] and `action` float32 [N, A] share `unit`; columns `absolute` of the action (the gripper)
    are never made relative. `text_of` int32 [N] says which of `texts` holds at a step. `views` has "front" and
    maybe "wrist"; step i is frame i.

    Where actions are positions in a world frame (EgoDex), `origin` [N, A] is where each step's motion starts in
    that frame (None: the state) and `world_to_camera` float32 [N, 3, 3] turns displacements into the camera's frame.
    """

    name: str
    texts: tuple[str, ...]
    text_of: np.ndarray
    fps: float
    state: np.ndarray
    action: np.ndarray
    unit: str
    absolute: tuple[int, ...]
    views: Mapping[str, Frames] = field(default_factory=dict)
    origin: np.ndarray | None = None
    world_to_camera: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.action)

    def text(self, step: int) -> str:
        """The instruction that holds at `step`."""
        return self.texts[self.text_of[step]]

    def frames(self, view: str, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB in the order of `indices`. Raises DataError for a frame that cannot be decoded."""
        return self.views[view].frames(indices)

    def chunk(self, start: int, length: int) -> np.ndarray:
        """Relative actions float32 [<= length, A] of the chunk at `start`, in `unit`, shorter at the end.

        With `world_to_camera`, each xyz triple is a displacement in the camera frame of step `start`.
        """
        rows = relative_chunk(
            self.action, self.state if self.origin is None else self.origin, start, length, self.absolute
        )
        if self.world_to_camera is None:
            return rows
        points = rows.reshape(len(rows), -1, 3)
        return np.einsum("ij,kpj->kpi", self.world_to_camera[start], points).reshape(rows.shape).astype(np.float32)
