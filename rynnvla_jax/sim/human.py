"""`HandTable`: the table seen from a head camera, and a human hand that moves over it at 30 Hz. Same seed, same bytes.

Layouts, instructions and the look of things are those of `TableTop` for the same seed. The hand follows its commands;
its fingers touch objects, but friction does not hold them (a friction grasp failed 10 times of 10): an object is
attached to the hand while thumb and index fingertip are within `HOLDS` of it, and falls when it is let go.
"""

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from rynnvla_jax.sim import gl, hand, scene, tasks
from rynnvla_jax.sim.arm import look_along
from rynnvla_jax.sim.hand import quaternion
from rynnvla_jax.sim.object_state import Things
from rynnvla_jax.sim.scene import TIMESTEP, Look, color

HOLDS = 0.032  # metres from a fingertip to the middle of an object, or to the axis of a pen
SHOULDER = np.array([-0.25, -0.2])  # metres: where the right arm comes from
CAMERA = "head"
_HALF_AXIS = {"pen": 0.05}  # metres of an object's z axis to either side that count as its middle
_ELBOWS = {"right": np.array([-0.24, -0.30, 0.22]), "left": np.array([-0.26, 0.32, 0.10])}
_FOLLOWS = 0.12  # share of the hand's way that the gaze goes with it
# The left hand's share of the right one's way: the body leans. An idle hand that moved by itself would be noise, and
# normalised as large as what the right one does.
_LEANS = np.array([0.05, 0.05, 0.02])
_PARTS = 5  # of a step: the hand moves that often
_SETTLE = 0.3  # seconds until everything lies still
_SKINS = ((0.93, 0.76, 0.65), (0.87, 0.65, 0.52), (0.76, 0.54, 0.41), (0.58, 0.39, 0.28), (0.40, 0.27, 0.20))


@dataclass(frozen=True)
class Person:
    """Appearance and start pose of a person. Colours 0..1 RGB; metres; radians."""

    skin: tuple[float, float, float] = _SKINS[1]
    sleeve: tuple[float, float, float] = (0.25, 0.30, 0.42)
    head: tuple[float, float, float] = (-0.12, 0.02, 0.52)
    gaze: tuple[float, float, float] = (0.22, 0.0, 0.0)
    fovy: float = 52.0  # degrees
    left: tuple[float, float, float] = (-0.03, 0.22, 0.024)  # where the left hand lies
    left_yaw: float = -0.25

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Person":
        """Of their own: skin, sleeve, head."""
        return cls(
            skin=color(np.array(_SKINS[rng.integers(len(_SKINS))]) + rng.normal(0, 0.02, 3)),
            sleeve=color(rng.uniform(0.1, 0.8) + rng.normal(0, 0.1, 3)),
            head=tuple((np.array(cls.head) + rng.uniform(-0.03, 0.03, 3)).tolist()),
            gaze=tuple((np.array(cls.gaze) + (*rng.uniform(-0.02, 0.02, 2), 0)).tolist()),
            fovy=float(rng.uniform(51, 54)),
            left=tuple((np.array(cls.left) + (*rng.uniform(-0.015, 0.015, 2), 0)).tolist()),
            left_yaw=float(rng.uniform(-0.5, 0.0)),
        )


@dataclass(frozen=True)
class HandCommand:
    """Where the pinch goes: its middle [3], its axes [3, 3] (`hand.grasp_rotation`), finger angles [20]."""

    position: np.ndarray
    rotation: np.ndarray
    fingers: np.ndarray
    holds: bool


class HandTable:
    """A person's hands over the table. `task`, `scenario`, `size`, `fixed_look` as of `TableTop`.

    Raises:
      ValueError: no such task or scenario.
    """

    fps = 30

    def __init__(self, task: str, scenario: str, *, size: int = 256, fixed_look: bool = False):
        tasks.check(task, scenario)
        self.task, self.scenario, self.size, self.fixed_look = task, scenario, size, fixed_look
        self._eye: gl.Eye | None = None

    def reset(self, seed: int) -> None:
        """Starts the episode of `seed`."""
        self.close()
        placement, instruction, look, texture, person, start = (np.random.default_rng([seed, i]) for i in range(6))
        said = tasks.phrasings(self.task, self.scenario)
        self.instruction = said[instruction.integers(len(said))]
        self.layout = tasks.layout(self.task, self.scenario, placement)
        self._person = Person() if self.fixed_look else Person.drawn(person)
        self.model = self._build(Look() if self.fixed_look else Look.drawn(look), texture)
        self.data = mujoco.MjData(self.model)
        self.things = Things(self.model, self.data, self.layout, hand.phalanges())
        self.held: str | None = None
        self._sites = {side: [self.model.site(n).id for n in hand.joints(side)] for side in ("left", "right")}
        self._time, self._phases = 0, start.uniform(0, 2 * math.pi, 3)
        spot = start.uniform((0.0, -0.24, 0.07), (0.10, -0.10, 0.14))
        self.command = HandCommand(spot, turned(start.uniform(-0.1, 0.6)), hand.pinch(0.03, True, False), False)
        self._gaze, self._start = self._wish(spot), spot
        self._pose(self.command)
        self._look()
        self.data.qpos[[self.model.joint(n).qposadr[0] for n in hand.angles()]] = self.command.fingers
        self.data.ctrl[:] = self.command.fingers
        mujoco.mj_step(self.model, self.data, round(_SETTLE / TIMESTEP))

    def _build(self, look: Look, texture: np.random.Generator) -> mujoco.MjModel:
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        person = self._person
        hand.add(spec, "right", person.skin, person.sleeve)
        hand.add(spec, "left", person.skin, person.sleeve, hand.RESTING)
        head = spec.worldbody.add_body(name=CAMERA, mocap=True)
        head.add_camera(name=CAMERA, fovy=person.fovy)
        scene.furnish(spec, self.layout, look, texture)
        for name in self._movable():
            weld = spec.add_equality(name=name, type=mujoco.mjtEq.mjEQ_WELD, objtype=mujoco.mjtObj.mjOBJ_BODY)
            weld.name1, weld.name2, weld.active, weld.solref = "rightPalm", name, False, (0.01, 1)
        model = spec.compile()
        for thing in self.layout.things:
            hand.touchable(model, thing.name, True)
        return model

    def step(self, command: HandCommand) -> None:
        """1/30 s on the way to `command`, an object in the hand when it holds one."""
        before, self.command = self.command, command
        self._time += 1
        self.data.ctrl[:] = command.fingers
        if not command.holds:
            self._let_go()
        self._look()
        steps = round(1 / self.fps / TIMESTEP)
        for part in range(1, _PARTS + 1):
            share = part / _PARTS
            position = before.position + share * (command.position - before.position)
            self._pose(HandCommand(position, between(before.rotation, command.rotation, share), command.fingers, False))
            mujoco.mj_step(self.model, self.data, steps // _PARTS)
        if command.holds and self.held is None:
            self._take()

    def render(self) -> np.ndarray:
        """uint8 [size, size, 3] RGB of the head camera. Raises RenderingError."""
        if self._eye is None:
            self._eye = gl.Eye(self.model, self.size)
        return self._eye.see(self.data, CAMERA)

    def intrinsic(self) -> np.ndarray:
        """float32 [3, 3] pixels."""
        focal = self.size / 2 / math.tan(math.radians(self._person.fovy) / 2)
        return np.array([[focal, 0, self.size / 2], [0, focal, self.size / 2], [0, 0, 1]], np.float32)

    def poses(self) -> dict[str, np.ndarray]:
        """float32 [4, 4] by name: "camera" (x right, y down, z ahead) and every joint of both hands; world, metres."""
        camera = self.model.camera(CAMERA).id
        seen = self.data.cam_xmat[camera].reshape(3, 3) * (1, -1, -1)
        out = {"camera": _matrix(self.data.cam_xpos[camera], seen)}
        for side, sites in self._sites.items():
            for name, site in zip(hand.joints(side), sites, strict=True):
                out[name] = _matrix(self.data.site_xpos[site], self.data.site_xmat[site].reshape(3, 3))
        return out

    def success(self) -> bool:
        """Whether every target is at its goal, at rest and released, and no other object is there."""
        return self.held is None and self.things.success()

    def close(self) -> None:
        """Frees the renderer; the next `render` creates it again."""
        if self._eye is not None:
            self._eye.close()
            self._eye = None

    def _movable(self) -> list[str]:
        return [thing.name for thing in self.layout.things if thing.name != self.layout.goal]

    def _take(self) -> None:
        """Attaches the object between the fingertips as it is."""
        tips = [self.data.site(f"right{finger}Tip").xpos for finger in hand.FINGERS[:2]]
        distance = {name: max(self._distance(name, tip) for tip in tips) for name in self._movable()}
        nearest = min(distance, key=distance.__getitem__)
        if distance[nearest] > HOLDS:
            return
        palm, thing = self.data.body("rightPalm"), self.data.body(nearest)
        axes = palm.xmat.reshape(3, 3)
        weld = self.model.equality(nearest).id
        self.model.eq_data[weld, :3] = 0
        self.model.eq_data[weld, 3:6] = axes.T @ (thing.xpos - palm.xpos)
        self.model.eq_data[weld, 6:10] = quaternion(axes.T @ thing.xmat.reshape(3, 3))
        self.data.eq_active[weld] = 1
        self.held = nearest
        hand.touchable(self.model, nearest, False)  # fingers would push out of the hand what is held otherwise

    def _let_go(self) -> None:
        if self.held is not None:
            self.data.eq_active[self.model.equality(self.held).id] = 0
            hand.touchable(self.model, self.held, True)
            self.held = None

    def _distance(self, name: str, point: np.ndarray) -> float:
        half = _HALF_AXIS.get(self.layout[name].kind, 0.0)
        away, axis = point - self.things.position(name), self.things.rotation(name)[:, 2]
        return float(np.linalg.norm(away - np.clip(away @ axis, -half, half) * axis))

    def _pose(self, command: HandCommand) -> None:
        """Both palms, and the forearms to where the elbows are."""
        palm = command.rotation @ hand.grasp_rotation().T
        left = np.array(self._person.left) + _LEANS * (command.position - self._start)
        for side, position, axes in (
            ("right", command.position - palm @ hand.PINCH, palm),
            ("left", left, turned(self._person.left_yaw)),
        ):
            self._put(f"{side}Palm", position, axes)
            wrist = position + axes @ hand.WRIST
            x = _unit(_ELBOWS[side] - wrist)
            y = _unit(np.cross((0, 0, 1), x))
            self._put(f"{side}Forearm", wrist, np.stack([x, y, np.cross(x, y)], 1))

    def _look(self) -> None:
        """The head sways, and turns a little after the hand."""
        self._gaze = self._gaze + 0.1 * (self._wish(self.command.position) - self._gaze)
        sway = 0.003 * np.sin(self._phases + self._time / self.fps * np.array([0.9, 1.3, 0.7]))
        head = np.array(self._person.head) + sway
        i = self.model.body(CAMERA).mocapid[0]
        self.data.mocap_pos[i], self.data.mocap_quat[i] = head, look_along(self._gaze - head, (0, 0, 1))

    def _wish(self, position: np.ndarray) -> np.ndarray:
        base = np.array(self._person.gaze)
        return base + _FOLLOWS * (position - base) * (1, 1, 0)

    def _put(self, body: str, position: np.ndarray, rotation: np.ndarray) -> None:
        i = self.model.body(body).mocapid[0]
        self.data.mocap_pos[i], self.data.mocap_quat[i] = position, quaternion(rotation)


def turned(yaw: float, roll: float = 0.0, tilt: float = 0.0) -> np.ndarray:
    """[3, 3] of a pinch: about the vertical, then about its closing direction (the thumb upwards), then forwards."""
    out = np.eye(3)
    for axis, angle in (((0, 0, 1), yaw), ((1, 0, 0), roll), ((0, 1, 0), tilt)):
        out = out @ _rotation(np.array(axis, np.float64), angle)
    return out


def between(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """[3, 3], `share` of the shortest turn from `start` to `end`."""
    turn = np.zeros(3)
    mujoco.mju_quat2Vel(turn, quaternion(start.T @ end), 1.0)
    angle = float(np.linalg.norm(turn))
    return start if angle < 1e-9 else start @ _rotation(turn / angle, share * angle)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    turn, out = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(turn, axis, angle)
    mujoco.mju_quat2Mat(out, turn)
    return out.reshape(3, 3)


def _matrix(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    out = np.eye(4, dtype=np.float32)
    out[:3, :3], out[:3, 3] = rotation, position
    return out


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
