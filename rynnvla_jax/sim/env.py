"""`TableTop`: one episode of one task at a time, driven by joint targets at 30 Hz. Same seed, same bytes.

Pixels are the same for one OpenGL driver; physics is the same for one version of MuJoCo.
"""

import mujoco
import numpy as np

from rynnvla_jax.columns import describe
from rynnvla_jax.sim import arm, gl, scene, tasks
from rynnvla_jax.sim.arm import HAND, JAW, JOINTS, LIMITS
from rynnvla_jax.sim.object_state import Things
from rynnvla_jax.sim.scene import TIMESTEP, Look

CAMERAS = ("front", "wrist")
FIRST_SEED = 10**12  # of evaluations, and no recording's: those are --seed * 1000000 + i
_SETTLE = 0.3  # seconds until everything lies still


class TableTop:
    """SO-100 on a table. `columns` says what `state` and the targets mean; see `rynnvla_jax.sim.arm`.

    Args:
      task: block | strawberry | pen.
      scenario: single | multi (all of several targets) | distractor.
      size: pixels a side, of both cameras.
      fixed_look: always the same colours, textures, light and cameras, instead of random ones from the seed.

    Raises:
      ValueError: no such task or scenario.
      FetchError: the arm's model is not on this machine.
    """

    columns = arm.COLUMNS
    fps = 30

    def __init__(self, task: str, scenario: str, *, size: int = 256, fixed_look: bool = False):
        tasks.check(task, scenario)
        self.task, self.scenario, self.size, self.fixed_look = task, scenario, size, fixed_look
        self._eye: gl.Eye | None = None

    def reset(self, seed: int, *, held_out: bool = False) -> None:
        """Starts the episode of `seed`; `held_out`: with an instruction whose wording no recording uses."""
        self.close()
        placement, instruction, look, texture = (np.random.default_rng([seed, stream]) for stream in range(4))
        said = tasks.phrasings(self.task, self.scenario, held_out)
        self.instruction = said[instruction.integers(len(said))]
        self.layout = tasks.layout(self.task, self.scenario, placement)
        self.model = scene.build(self.layout, Look() if self.fixed_look else Look.drawn(look), texture)
        self.data = mujoco.MjData(self.model)
        self._things = Things(self.model, self.data, self.layout, (HAND, JAW))
        self._joints = [self.model.joint(name).qposadr[0] for name in JOINTS]
        self.data.qpos[self._joints] = self.data.ctrl[:] = arm.HOME
        mujoco.mj_step(self.model, self.data, round(_SETTLE / TIMESTEP))

    @property
    def joints(self) -> np.ndarray:
        """float64 [6] radians."""
        return self.data.qpos[self._joints].copy()

    @property
    def state(self) -> np.ndarray:
        """float32 [6], as `columns` says."""
        return arm.to_unit(self.joints).astype(np.float32)

    def step(self, target: np.ndarray) -> None:
        """1/30 s towards absolute joint targets [6]; as on the robot they stop at a joint's limits and are
        rounded to what the servos can tell apart, so that the last bits of a policy's floats decide nothing.

        Raises ValueError for anything but six finite numbers.
        """
        target = np.asarray(target, np.float64)
        if target.shape != (6,) or not np.isfinite(target).all():
            raise ValueError(f"a target is six finite numbers ({describe(self.columns.action)}), not {target.tolist()}")
        steps = np.round(arm.to_radians(target) / arm.SERVO_STEP)
        self.data.ctrl[:] = np.clip(steps * arm.SERVO_STEP, LIMITS[:, 0], LIMITS[:, 1])
        mujoco.mj_step(self.model, self.data, round(1 / self.fps / TIMESTEP))

    def render(self, camera: str) -> np.ndarray:
        """uint8 [size, size, 3] RGB of "front" or "wrist". Raises RenderingError."""
        if camera not in CAMERAS:
            raise ValueError(f"camera {camera!r} does not exist; choose one of {', '.join(CAMERAS)}")
        if self._eye is None:
            self._eye = gl.Eye(self.model, self.size)
        return self._eye.see(self.data, camera)

    def success(self) -> bool:
        """Whether every target is at its goal, at rest and released, and no other object is there."""
        return self._things.success()

    def placed(self, name: str) -> bool:
        """Whether this object is at its goal, at rest and released."""
        return self._things.placed(name)

    def touched(self, name: str) -> bool:
        """Whether a jaw touches this object."""
        return self._things.touched(name)

    def position(self, name: str) -> np.ndarray:
        """float64 [3] metres, of a body."""
        return self._things.position(name)

    def rotation(self, name: str) -> np.ndarray:
        """float64 [3, 3]; columns are the body's axes."""
        return self._things.rotation(name)

    def grasp_point(self) -> np.ndarray:
        """float64 [3] metres: the middle between the finger tips."""
        return self.data.site("grasp").xpos.copy()

    def close(self) -> None:
        """Frees the renderer; the next `render` creates it again."""
        if self._eye is not None:
            self._eye.close()
            self._eye = None
