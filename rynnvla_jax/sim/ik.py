"""Inverse kinematics by damped least squares on the grasp site. Metres and radians."""

import functools
import math

import mujoco
import numpy as np

from rynnvla_jax.sim import arm
from rynnvla_jax.sim.arm import JOINTS, LIMITS, PAN_AXIS

_ROTATION = 0.05  # metres that one radian of wrong orientation counts for: five joints cannot have both exactly
_DAMPING = 1e-4
_CLOSE = (5e-4, 5e-3)  # metres, radians
_STEP = 0.2  # radians, the greatest in one iteration
_STALLED = 1e-4  # radians: an iteration that changes less than this is the last
_MARGIN = 0.02  # radians from a joint's limits


@functools.cache
def _model() -> mujoco.MjModel:
    return arm.spec().compile()


def solve(position: np.ndarray, rotation: np.ndarray, start: np.ndarray, iterations: int = 200) -> np.ndarray:
    """The five joints [5] that bring the grasp site to `position` [3], turned as `rotation` [3, 3], near `start` [5].

    Out of reach the nearest that it found: the caller sees where the hand really went.
    """
    model, low, high = _model(), LIMITS[:5, 0] + _MARGIN, LIMITS[:5, 1] - _MARGIN
    data, site = mujoco.MjData(model), model.site("grasp").id
    columns = [model.joint(name).dofadr[0] for name in JOINTS[:5]]
    joints = np.array(start[:5], np.float64)
    jacobian = np.zeros((6, model.nv))
    weights = np.array([1.0] * 3 + [_ROTATION] * 3)
    for _ in range(iterations):
        data.qpos[columns] = joints  # hinges only: a joint's place is the same in positions and velocities
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        now = data.site_xmat[site].reshape(3, 3)
        error = np.concatenate([position - data.site_xpos[site], 0.5 * np.cross(now, rotation, axis=0).sum(1)])
        if np.linalg.norm(error[:3]) < _CLOSE[0] and np.linalg.norm(error[3:]) < _CLOSE[1]:
            break
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        weighted = weights[:, None] * jacobian[:, columns]
        change = weighted.T @ np.linalg.solve(weighted @ weighted.T + _DAMPING * np.eye(6), weights * error)
        before, joints = joints, np.clip(joints + change * min(1.0, _STEP / max(np.abs(change).max(), 1e-9)), low, high)
        if np.abs(joints - before).max() < _STALLED:
            break
    return joints


def grasp_rotation(position: np.ndarray, pitch: float, roll: float) -> np.ndarray:
    """[3, 3] of a hand at `position` that it can have there: it stays in the vertical plane through the pan axis.

    `pitch` 0 points straight down, pi/2 outwards; `roll` 0 closes the jaws across that plane.
    """
    radial = np.array([*(position[:2] - PAN_AXIS), 0.0])
    radial /= np.linalg.norm(radial)
    up = np.array([0.0, 0.0, 1.0])
    across = np.cross(up, radial)
    approach = -math.cos(pitch) * up + math.sin(pitch) * radial
    level = math.sin(pitch) * up + math.cos(pitch) * radial
    x, y = math.cos(roll) * across + math.sin(roll) * level, -approach
    return np.stack([x, y, np.cross(x, y)], 1)
