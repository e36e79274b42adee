"""An arm without hardware, for LeRobot's programs: --robot.discover_packages_path=still_arm --robot.type=still_arm."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


@RobotConfig.register_subclass("still_arm")
@dataclass
class StillArmConfig(RobotConfig):
    """`log`: file of all targets, a JSON line each. `broken_at`: the observation whose state is out of range."""

    log: str = "targets.jsonl"
    broken_at: int = -1


class StillArm(Robot):
    """Reaches every target at once, and does nothing else."""

    config_class, name = StillArmConfig, "still_arm"

    def __init__(self, config):
        super().__init__(config)
        self.config, self.looks, self.is_open = config, 0, False
        self.state = dict(zip(self.action_features, np.arange(6.0).tolist(), strict=True))

    @property
    def action_features(self):
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def observation_features(self):
        return {**self.action_features, "front": (48, 64, 3)}

    @property
    def is_connected(self):
        return self.is_open

    is_calibrated = True

    def connect(self, calibrate=True):
        self.is_open = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        broken = {"shoulder_pan.pos": 1e6} if self.looks == self.config.broken_at else {}
        self.looks += 1
        return {**self.state, **broken, "front": frame}

    def send_action(self, action):
        self.state = {name: float(value) for name, value in action.items()}
        with Path(self.config.log).open("a", encoding="utf-8") as log:
            print(json.dumps(list(self.state.values())), file=log)
        return action

    def disconnect(self):
        self.is_open = False
