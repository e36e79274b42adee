"""The objects of a layout in a running simulation: their poses, and whether they have reached their goal."""

from collections.abc import Iterable

import mujoco
import numpy as np

from rynnvla_jax.sim.tasks import ObjectPositions

_STILL = 0.03  # m/s
_ON_PLATE = (0.05, 0.04)  # metres: from its middle, above the table
_IN_HOLDER = (0.036, 0.03)  # metres: from its middle, the lower end above the table
_HALF_PEN = 0.061  # metres


class Things:
    """Reads `data` and never changes it. `fingers`: the bodies that hold objects."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, layout: ObjectPositions, fingers: Iterable[str]):
        self._model, self._data, self._layout = model, data, layout
        self._fingers = {model.body(name).id for name in fingers}

    def success(self) -> bool:
        """Whether every target is at its goal, at rest and released, and no other object is there."""
        goal = self._layout.goal
        if self.rotation(goal)[2, 2] < 0.9:  # tipped over
            return False
        for thing in self._layout.things:
            wanted = thing.name in self._layout.targets
            if thing.name != goal and wanted != (self.placed(thing.name) if wanted else self._inside(thing.name)):
                return False
        return True

    def placed(self, name: str) -> bool:
        """Whether this object is at its goal, at rest and released."""
        return self._inside(name) and not self.touched(name) and self._speed(name) < _STILL

    def touched(self, name: str) -> bool:
        """Whether a finger touches this object."""
        thing = self._model.body(name).id
        pairs = self._model.geom_bodyid[self._data.contact.geom]
        return any(thing in pair and self._fingers & set(pair) for pair in pairs.tolist())

    def position(self, name: str) -> np.ndarray:
        """float64 [3] metres, of a body."""
        return self._data.body(name).xpos.copy()

    def rotation(self, name: str) -> np.ndarray:
        """float64 [3, 3]; columns are the body's axes."""
        return self._data.body(name).xmat.reshape(3, 3).copy()

    def _inside(self, name: str) -> bool:
        position = self.position(name)
        distance = np.linalg.norm((position - self.position(self._layout.goal))[:2])
        if self._layout.goal == "plate":
            return bool(distance < _ON_PLATE[0] and position[2] < _ON_PLATE[1])
        upright = abs(self.rotation(name)[2, 2])
        lower_end = position[2] - _HALF_PEN * upright
        return bool(distance < _IN_HOLDER[0] and upright > 0.6 and lower_end < _IN_HOLDER[1])

    def _speed(self, name: str) -> float:
        """m/s"""
        return float(np.linalg.norm(self._data.joint(name).qvel[:3]))
