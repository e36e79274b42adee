"""`--env.type=rynnvla_so100`: the simulated SO-100 of rynnvla_jax as a gymnasium environment."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

_ID = "lerobot_policy_rynnvla/TableTop-v0"
_CAMERAS = ("front", "wrist")


@EnvConfig.register_subclass("rynnvla_so100")
@dataclass
class RynnvlaSo100Config(EnvConfig):
    """SO-100 arm on a table. Needs `lerobot_policy_rynnvla[sim]`; run `rynnvla fetch so100` once before.

    Args:
      task: block | strawberry | pen.
      scenario: single | multi | distractor.
      episode_length: number of steps, each 1/30 s.
      size: height and width of both cameras' pictures, in pixels.
      fixed_look: keep colours, light and cameras the same, instead of choosing them by the seed.
      held_out: use instructions that no recording uses.
    """

    task: str | None = "block"
    scenario: str = "single"
    fps: int = 30
    episode_length: int = 450
    size: int = 256
    fixed_look: bool = False
    held_out: bool = True
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in _CAMERAS},
        }
    )

    def __post_init__(self):
        pictures = {f"pixels/{c}": PolicyFeature(FeatureType.VISUAL, (self.size, self.size, 3)) for c in _CAMERAS}
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (6,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (6,)),
            **pictures,
        }

    @property
    def gym_id(self) -> str:
        return _ID

    @property
    def package_name(self) -> str:
        return "lerobot_policy_rynnvla"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        names = ("task", "scenario", "size", "fixed_look", "held_out", "episode_length")
        return {name: getattr(self, name) for name in names}


class TableTopEnv(gym.Env):
    """`rynnvla_jax.sim.env.TableTop`; states and actions are absolute joints in LeRobot's unit of the SO-100.

    Raises ValueError for a task or scenario that does not exist, FetchError when the arm's model is missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    render_mode = "rgb_array"

    def __init__(self, task: str, scenario: str, size: int, fixed_look: bool, held_out: bool, episode_length: int):
        from rynnvla_jax.sim.env import FIRST_SEED, TableTop  # the plug-in works on a robot that has no MuJoCo

        self._first_seed = FIRST_SEED
        self._table = TableTop(task, scenario, size=size, fixed_look=fixed_look)
        self._held_out, self._max_episode_steps = held_out, episode_length  # LeRobot reads the latter
        self.task = task
        picture = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        joints = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
        pictures = gym.spaces.Dict(dict.fromkeys(_CAMERAS, picture))
        self.observation_space = gym.spaces.Dict({"pixels": pictures, "agent_pos": joints})
        self.action_space = joints

    @property
    def task_description(self) -> str:
        """The instruction of this episode."""
        return self._table.instruction

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """The episode of `seed` is the one with the same number in `rynnvla evaluate --seed 0`."""
        super().reset(seed=seed)
        number = seed if seed is not None else int(self.np_random.integers(10**6))
        self._table.reset(self._first_seed + number, held_out=self._held_out)
        self._steps = 0
        return self._observed(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self._table.step(action)
        self._steps += 1
        success = self._table.success()
        truncated = self._steps >= self._max_episode_steps
        return self._observed(), float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        return self._table.render("front")

    def close(self) -> None:
        self._table.close()

    def _observed(self) -> dict:
        pictures = {camera: self._table.render(camera) for camera in _CAMERAS}
        return {"pixels": pictures, "agent_pos": self._table.state}


# Wrappers would hide `task_description` from LeRobot.
gym.register(_ID, TableTopEnv, order_enforce=False, disable_env_checker=True)
