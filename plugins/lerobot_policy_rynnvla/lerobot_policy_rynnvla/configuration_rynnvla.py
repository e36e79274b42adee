"""LeRobot's config of an exported policy. The export's own config.json describes the policy itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.export_format import ExportConfig, ExportError
from rynnvla_jax.deploy.policy import DTYPES

ROBOT, UNIT = "lerobot:so100_follower", "-100..100"  # LeRobot's SO-100 and its joints; its gripper is in 0..100


@PreTrainedConfig.register_subclass("rynnvla")
@dataclass
class RynnvlaConfig(PreTrainedConfig):
    """How an exported policy runs. Raises ExportError for a dtype that does not exist.

    Args:
      n_action_steps: control steps between two observations of the policy, in `select_action`.
      ensemble: average the predictions of overlapping chunks (ACT's temporal ensembling).
      blend: control steps within which `select_action` moves from one chunk to the next; 0: in one step. Not beside
        `ensemble`.
      asynchronous: run the policy in parallel with the control loop of one robot, on the latest observation.
      robot: the robot and its calibration; a policy that was trained on another one refuses every observation. "" does
        not compare.
      unit: unit of the robot's joints, "-100..100" or "degrees" (`robot_columns` asks the motors); compared likewise.
      fps: control steps per second of the robot's loop; a policy that was recorded at another rate refuses. 0: not
        compared.
      dtype: type of the transformer's weights: float32, bfloat16 or float16.
      compile: use torch.compile: a slower start, and faster answers.
    """

    n_action_steps: int = 10
    ensemble: bool = False
    blend: int = 0
    asynchronous: bool = False
    robot: str = ROBOT
    unit: str = UNIT
    fps: float = 30.0  # LeRobot's own default
    dtype: str = "float32"
    compile: bool = False
    # The policy normalises by its own statistics.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ExportError(f"--policy.dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.blend < 0 or (self.blend and self.ensemble):
            raise ExportError(
                f"--policy.blend is {self.blend} with --policy.ensemble={str(self.ensemble).lower()}; "
                "give at least 0 steps, and only one of the two"
            )
        if not self.fps >= 0:
            raise ExportError(f"--policy.fps is {self.fps}; give the control steps per second, or 0")

    @classmethod
    def of_export(cls, folder: str | Path, cli_overrides: list[str] | None = None) -> "RynnvlaConfig":
        """The config of an export folder, changed by the command line's `--KEY=VALUE`. Raises ExportError."""
        export = export_format.read_config(folder)
        if missing := [name for name in export_format.PROCESSORS if not (Path(folder) / name).exists()]:
            raise ExportError(
                f"{folder} lacks {', '.join(missing)}, which LeRobot needs; "
                "export the model again with `rynnvla convert export`"
            )
        with draccus.config_type("json"):
            config = draccus.parse(cls, args=cli_overrides or [])
        config.input_features, config.output_features = features(export)
        config.pretrained_path = Path(folder)
        return config

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def validate_features(self) -> None:
        """Does nothing: an incomplete observation is refused when it is used."""

    def get_optimizer_preset(self):
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")

    def get_scheduler_preset(self):
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")


def features(export: ExportConfig) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """LeRobot's (input, output) features of an export. They state the model's frame size, but any size is accepted."""
    edge = export.image.shortest_edge
    cameras = export.cameras.by_view(export.sequence).values()
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, (3, edge, edge)) for camera in cameras}
    if export.vla.state_dim:
        inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (export.vla.state_dim,))
    return inputs, {ACTION: PolicyFeature(FeatureType.ACTION, (export.action_dim,))}


def is_export(folder: str | Path) -> bool:
    """Whether `rynnvla convert export` made this folder."""
    config = Path(folder) / export_format.CONFIG
    return config.is_file() and "rynnvla" in export_format.read_json(config)


def without_type_beside_path(arguments: list[str]) -> list[str]:
    """Drops `--policy.type=rynnvla` when `--policy.path` of an export is given: LeRobot accepts only one of them.

    LeRobot 0.6 also takes an option and its value as two arguments.
    """
    paths = [a.partition("=")[2] for a in arguments if a.startswith("--policy.path=")]
    paths += [value for a, value in zip(arguments, arguments[1:], strict=False) if a == "--policy.path"]
    if not paths or not is_export(paths[0]):
        return arguments
    kept = [a for a in arguments if a != "--policy.type=rynnvla"]
    pairs = zip(kept, kept[1:], strict=False)
    place = next((i for i, pair in enumerate(pairs) if pair == ("--policy.type", "rynnvla")), len(kept))
    return kept[:place] + kept[place + 2 :]


_of_lerobot = PreTrainedConfig.from_pretrained.__func__


def _from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """LeRobot's function, except for exports: LeRobot has no hook for config.json files that are not its own."""
    if is_export(pretrained_name_or_path):
        return RynnvlaConfig.of_export(pretrained_name_or_path, kwargs.get("cli_overrides"))
    return _of_lerobot(cls, pretrained_name_or_path, **kwargs)


PreTrainedConfig.from_pretrained = classmethod(_from_pretrained)
