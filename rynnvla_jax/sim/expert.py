"""The scripted expert: knows all positions, plans way-points, and tries again when a grasp failed.

It acts as LeRobot's teleoperator does: a stream of absolute joint targets at 30 Hz.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rynnvla_jax.sim import arm, ik
from rynnvla_jax.sim.arm import HOME, PAN_AXIS
from rynnvla_jax.sim.env import TableTop

TRIES = 5  # of one target
_FPS = TableTop.fps
_OPEN = {"pen": 0.5}  # radians of the jaw before a grasp
_OPEN_DEFAULT = 0.75
_CLOSED = -0.18  # radians: the controller's force limit holds the object before it gets there
# Along the jaws' closing direction: width of the object and how far the fixed jaw keeps clear; height of the grasp.
_GRASPS = {"block": (0.025, 0.006, 0.0125), "strawberry": (0.028, 0.006, 0.013), "pen": (0.011, 0.007, 0.010)}
_FIXED_JAW = 0.0079  # metres from the grasp site to the fixed jaw's pads
_SLOT = 0.026  # metres from the plate's middle, where several targets share it
_HIGH = (-1.9, 1.7, 1.3)  # radians of lift, elbow and wrist on the way between two places: above everything


@dataclass(frozen=True)
class ArmCommand:
    """The expert's target and the executed target, which differ by the noise. float32 [6] in the arm's unit."""

    target: np.ndarray
    executed: np.ndarray


@dataclass(frozen=True)
class _Pose:
    """Of the grasp site; see `ik.grasp_rotation`."""

    position: np.ndarray
    pitch: float
    roll: float


def demonstrate(env: TableTop, seed: int, noise: float = 0.0) -> Iterator[ArmCommand]:
    """Commands for the episode that `env` was reset to; step the environment with each before taking the next.

    Args:
      env: is read, never stepped.
      seed: of speed, small variations and noise.
      noise: standard deviation of the noise on the executed targets, in the arm's unit. It changes slowly and fades
        near the table, so that recordings show how to recover from states that the expert alone would not reach.
    """
    expert = _Expert(env, np.random.default_rng([seed, 0]))
    disturbance = _Disturbance(np.random.default_rng([seed, 1]), noise)
    for joints, jaw in expert.run():
        target = arm.to_unit(np.append(joints, jaw)).astype(np.float32)
        executed = target + disturbance.next(env.grasp_point()[2]) if noise else target
        yield ArmCommand(target, executed.astype(np.float32))


class _Disturbance:
    """A slow random walk about zero for the five joints; the jaw is left alone."""

    def __init__(self, rng: np.random.Generator, scale: float):
        self._rng, self._scale, self._value = rng, scale, np.zeros(6)

    def next(self, height: float) -> np.ndarray:
        keep = 0.95  # a step: it forgets in two thirds of a second
        self._value[:5] = keep * self._value[:5] + math.sqrt(1 - keep**2) * self._scale * self._rng.normal(size=5)
        return self._value * np.clip((height - 0.02) / 0.06, 0.1, 1.0)


class _Expert:
    """Generators of (five joints, jaw) in radians; each motion starts from the last command."""

    def __init__(self, env: TableTop, rng: np.random.Generator):
        self.env, self.rng = env, rng
        self.speed = rng.uniform(0.85, 1.15)
        self.joints, self.jaw = HOME[:5].copy(), HOME[5]

    def run(self):
        targets = self.env.layout.targets
        goal = self.env.position(self.env.layout.goal)
        toward = math.atan2(*(goal[:2] - PAN_AXIS)[::-1])
        for i, name in enumerate(targets):
            angle = toward + 2 * math.pi * i / len(targets)
            slot = _SLOT * np.array([math.cos(angle), math.sin(angle)]) if len(targets) > 1 else np.zeros(2)
            for _ in range(TRIES):
                yield from self._once(name, slot)
                if self.env.placed(name):
                    break
        yield from self._home()

    def _once(self, name: str, slot: np.ndarray):
        pose = yield from self._pick(name)
        if self.env.position(name)[2] < 0.05:  # not in the hand
            yield from self._hold(6, jaw=0.5)
        elif self.env.layout.goal == "holder":
            yield from self._insert(pose, name)
        else:
            yield from self._place(pose, name, slot)
        yield from self._hold(4)

    def _pick(self, name: str):
        site, roll = self._grasp(name)
        site[:2] += self.rng.normal(0, 0.001, 2)
        above = site + (0, 0, self.rng.uniform(0.055, 0.08))
        opened = _OPEN.get(self.env.layout[name].kind, _OPEN_DEFAULT)
        pan = math.atan2(*(above[:2] - PAN_AXIS)[::-1])
        over = ik.solve(above, ik.grasp_rotation(above, 0, roll), np.array([pan, -1.5, 1.5, 1.4, 0.0]))
        yield from self._joints_to(np.array([(self.joints[0] + over[0]) / 2, *_HIGH, over[4]]), opened, fastest=2.2)
        yield from self._joints_to(over, opened)
        yield from self._hold(2)
        pose = yield from self._straight_to(_Pose(above, 0, roll), _Pose(site, 0, roll), 0.10)
        yield from self._hold(2)
        yield from self._hold(14, jaw=_CLOSED)
        return (yield from self._straight_to(pose, _Pose(site + (0, 0, 0.09), 0, roll)))

    def _grasp(self, name: str) -> tuple[np.ndarray, float]:
        """Where the grasp site goes, and the roll that closes the jaws across the object's narrow side."""
        position, axes = self.env.position(name), self.env.rotation(name)
        kind = self.env.layout[name].kind
        width, clear, height = _GRASPS[kind]
        bearing = math.atan2(*(position[:2] - PAN_AXIS)[::-1])
        if kind == "block":
            face = axes[:, np.argmin(np.abs(axes[2]))]  # the most level of its three axes
            roll = _wrapped(bearing + math.pi / 2 - math.atan2(face[1], face[0]), math.pi / 2)
        elif kind == "strawberry" and abs(axes[2, 2]) > 0.7:  # it stands: any side will do
            roll = 0.0
        else:
            roll = _wrapped(bearing - math.atan2(axes[1, 2], axes[0, 2]), math.pi)
        closing = ik.grasp_rotation(position, 0, roll)[:, 0]
        site = position - closing * (_FIXED_JAW - width / 2 - clear)
        site[2] = height
        return site, roll + math.atan2(*(site[:2] - PAN_AXIS)[::-1]) - bearing

    def _place(self, pose: _Pose, name: str, slot: np.ndarray):
        spread = 0.006 if not slot.any() else 0.002
        spot = self.env.position(self.env.layout.goal)[:2] + slot + self.rng.normal(0, spread, 2)
        spot = spot - (self.env.position(name) - self.env.grasp_point())[:2]
        over = _Pose(np.array([*spot, 0.11]), 0, pose.roll)
        low = _Pose(np.array([*spot, 0.036]), 0, pose.roll)
        yield from self._straight_to(pose, over, 0.20)
        yield from self._straight_to(over, low, 0.12)
        yield from self._hold(2)
        yield from self._hold(8, jaw=0.6)
        yield from self._straight_to(low, _Pose(low.position + (0, 0, 0.07), 0, low.roll))

    def _insert(self, pose: _Pose, name: str):
        """Lifts, draws in, points the hand outwards so that the pen stands, and lowers it into the holder."""
        goal = self.env.position("holder")
        bearing = math.atan2(*(goal[:2] - PAN_AXIS)[::-1])
        pitch = 1.35
        lifted = _Pose(np.array([*pose.position[:2], 0.14]), 0.2, pose.roll)
        near = np.array([*(PAN_AXIS + 0.24 * np.array([math.cos(bearing), math.sin(bearing)])), 0.20])
        drawn = _Pose(near, pitch, 0.0)
        yield from self._straight_to(pose, lifted, 0.20)
        yield from self._straight_to(lifted, drawn, 0.20)
        yield from self._hold(3)
        offset = (self.env.position(name) - self.env.grasp_point())[:2]
        over = _Pose(np.array([*(goal[:2] - offset), 0.185]), pitch, 0.0)
        low = _Pose(np.array([*over.position[:2], 0.125]), pitch, 0.0)
        yield from self._straight_to(drawn, over, 0.15)
        yield from self._hold(2)
        yield from self._straight_to(over, low, 0.10)
        yield from self._hold(3)
        yield from self._hold(8, jaw=0.35)
        yield from self._straight_to(low, _Pose(low.position + (0, 0, 0.05), pitch, 0.0), 0.15)

    def _home(self):
        yield from self._joints_to(np.array([self.joints[0], -2.0, 1.9, 1.2, 0.0]))
        yield from self._joints_to(HOME[:5], jaw=HOME[5])
        yield from self._hold(3)

    def _hold(self, steps: int, jaw: float | None = None):
        start, end = self.jaw, self.jaw if jaw is None else jaw
        for i in range(steps):
            self.jaw = start + (end - start) * min(1.0, (i + 1) / (0.7 * steps))
            yield self.joints, self.jaw

    def _joints_to(self, joints: np.ndarray, jaw: float | None = None, fastest: float = 1.6):
        """`fastest` rad/s of the joint with the longest way."""
        start, opening = self.joints, self.jaw
        end = opening if jaw is None else jaw
        for s in _eased(max(8, int(_FPS * 1.875 * np.abs(joints - start).max() / fastest / self.speed))):
            self.joints, self.jaw = start + (joints - start) * s, opening + (end - opening) * s
            yield self.joints, self.jaw

    def _straight_to(self, start: _Pose, end: _Pose, speed: float = 0.14):
        """Straight in cylinder coordinates about the pan axis, `speed` m/s; returns `end`."""
        a, b = _cylinder(start.position), _cylinder(end.position)
        far = np.linalg.norm(end.position - start.position) / speed
        turn = max(abs(end.pitch - start.pitch), abs(end.roll - start.roll), abs(b[1] - a[1])) / 1.5  # rad/s
        for s in _eased(max(6, int(_FPS * 1.875 * max(far, turn) / self.speed / 1.3))):
            radius, angle, z = a + (b - a) * s
            position = np.array([*(PAN_AXIS + radius * np.array([math.cos(angle), math.sin(angle)])), z])
            pitch, roll = start.pitch + (end.pitch - start.pitch) * s, start.roll + (end.roll - start.roll) * s
            self.joints = ik.solve(position, ik.grasp_rotation(position, pitch, roll), self.joints)
            yield self.joints, self.jaw
        return end


def _eased(steps: int) -> Iterator[float]:
    """From 0 (left out) to 1 without a jerk (a quintic)."""
    for i in range(1, steps + 1):
        s = i / steps
        yield s * s * s * (10 - 15 * s + 6 * s * s)


def _cylinder(position: np.ndarray) -> np.ndarray:
    """(radius, angle, height) about the pan axis."""
    out = position[:2] - PAN_AXIS
    return np.array([np.linalg.norm(out), math.atan2(out[1], out[0]), position[2]])


def _wrapped(angle: float, period: float) -> float:
    return (angle + period / 2) % period - period / 2
