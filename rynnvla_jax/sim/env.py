"""`TableTop`: one episode of one task at a time, driven by joint targets at 30 Hz. Same seed, same bytes.

Pixels are the same for one OpenGL driver; physics is the same for one version of MuJoCo.
"""

import mujoco
import numpy as np

from rynnvla_jax.sim import arm, gl, scene, tasks
from rynnvla_jax.sim.arm import HAND, JAW, JOINTS, LIMITS
from rynnvla_jax.sim.scene import TIMESTEP, Look

CAMERAS = ("front", "wrist")
_SETTLE = 0.3  # seconds until everything lies still


class TableTop:
    """SO-100 on a table. `unit` is of `state` and of the targets; see `rynnvla_jax.sim.arm`.

    Args:
      task: block | strawberry | pen.
      scenario: single | multi (all of several targets) | distractor.
      size: pixels a side, of both cameras.
      fixed_look: colours, textures, light and cameras as ever, instead of drawn from the seed.

    Raises:
      ValueError: no such task or scenario.
      FetchError: the arm's model is not on this machine.
    """

    unit = arm.UNIT
    fps = 30

    def __init__(self, task: str, scenario: str, *, size: int = 256, fixed_look: bool = False):
        tasks.check(task, scenario)
        self.task, self.scenario, self.size, self.fixed_look = task, scenario, size, fixed_look
        self._eye: gl.Eye | None = None

    def reset(self, seed: int, *, held_out: bool = False) -> None:
        """Starts the episode of `seed`; `held_out`: with an instruction that no recording says."""
        self.close()
        place, instruction, look, texture = (np.random.default_rng([seed, stream]) for stream in range(4))
        said = tasks.phrasings(self.task, self.scenario, held_out)
        self.instruction = said[instruction.integers(len(said))]
        self.layout = tasks.layout(self.task, self.scenario, place)
        self.model = scene.build(self.layout, Look() if self.fixed_look else Look.drawn(look), texture)
        self.data = mujoco.MjData(self.model)
        self._joints = [self.model.joint(name).qposadr[0] for name in JOINTS]
        self.data.qpos[self._joints] = self.data.ctrl[:] = arm.HOME
        mujoco.mj_step(self.model, self.data, round(_SETTLE / TIMESTEP))

    @property
    def joints(self) -> np.ndarray:
        """float64 [6] radians."""
        return self.data.qpos[self._joints].copy()

    @property
    def state(self) -> np.ndarray:
        """float32 [6] in `unit`."""
        return arm.to_unit(self.joints).astype(np.float32)

    def step(self, target: np.ndarray) -> None:
        """1/30 s towards absolute joint targets [6] in `unit`; as on the robot they stop at a joint's limits.

        Raises ValueError for anything but six finite numbers.
        """
        target = np.asarray(target, np.float64)
        if target.shape != (6,) or not np.isfinite(target).all():
            raise ValueError(f"a target is six finite numbers in {self.unit}, not {target.tolist()}")
        self.data.ctrl[:] = np.clip(arm.to_radians(target), LIMITS[:, 0], LIMITS[:, 1])
        mujoco.mj_step(self.model, self.data, round(1 / self.fps / TIMESTEP))

    def render(self, camera: str) -> np.ndarray:
        """uint8 [size, size, 3] RGB of "front" or "wrist". Raises RenderingError."""
        if camera not in CAMERAS:
            raise ValueError(f"camera {camera!r} does not exist; choose one of {', '.join(CAMERAS)}")
        if self._eye is None:
            self._eye = gl.Eye(self.model, self.size)
        return self._eye.see(self.data, camera)

    def success(self) -> bool:
        """Every target is in its place, still and let go of, and nothing else is there."""
        goal = self.layout.goal
        if self.rotation(goal)[2, 2] < 0.9:  # tipped over
            return False
        for thing in self.layout.things:
            wanted = thing.name in self.layout.targets
            if thing.name != goal and wanted != (self.placed(thing.name) if wanted else self._inside(thing.name)):
                return False
        return True

    def placed(self, name: str) -> bool:
        """Whether this object is in its place, still and let go of."""
        return self._inside(name) and not self.touched(name) and self._speed(name) < 0.03

    def touched(self, name: str) -> bool:
        """Whether a jaw touches this object."""
        jaws = {self.model.body(HAND).id, self.model.body(JAW).id}
        thing = self.model.body(name).id
        pairs = self.model.geom_bodyid[self.data.contact.geom]
        return any(thing in pair and jaws & set(pair) for pair in pairs.tolist())

    def position(self, name: str) -> np.ndarray:
        """float64 [3] metres, of a body."""
        return self.data.body(name).xpos.copy()

    def rotation(self, name: str) -> np.ndarray:
        """float64 [3, 3]; columns are the body's axes."""
        return self.data.body(name).xmat.reshape(3, 3).copy()

    def grasp_point(self) -> np.ndarray:
        """float64 [3] metres: the middle between the finger tips."""
        return self.data.site("grasp").xpos.copy()

    def close(self) -> None:
        """Gives back what draws; the next `render` takes it again."""
        if self._eye is not None:
            self._eye.close()
            self._eye = None

    def _inside(self, name: str) -> bool:
        position = self.position(name)
        distance = np.linalg.norm((position - self.position(self.layout.goal))[:2])
        if self.layout.goal == "plate":
            return bool(distance < 0.05 and position[2] < 0.04)
        upright = abs(self.rotation(name)[2, 2])
        return bool(distance < 0.036 and upright > 0.6 and position[2] - 0.061 * upright < 0.03)

    def _speed(self, name: str) -> float:
        """m/s"""
        return float(np.linalg.norm(self.data.joint(name).qvel[:3]))
