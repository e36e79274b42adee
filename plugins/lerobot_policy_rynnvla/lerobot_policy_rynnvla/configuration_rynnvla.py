"""LeRobot's config of an exported policy. The policy itself is described by the export's own config.json."""

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

UNIT = "lerobot:so100_follower"  # joints -100..100 over their range, gripper 0..100: what LeRobot's SO-100 speaks


@PreTrainedConfig.register_subclass("rynnvla")
@dataclass
class RynnvlaConfig(PreTrainedConfig):
    """How an exported policy runs. Raises ExportError for a dtype that does not exist.

    Args:
      n_action_steps: control steps between two looks of the policy, in `select_action`.
      ensemble: average what overlapping chunks say (ACT's temporal ensembling).
      asynchronous: the policy thinks beside the control loop of one robot; the latest observation wins.
      unit: of the robot's state and targets; a policy of another unit refuses every observation.
      dtype: of the transformer: float32, bfloat16 or float16.
      compile: through torch.compile: slower start, faster answers.
    """

    n_action_steps: int = 10
    ensemble: bool = False
    asynchronous: bool = False
    unit: str = UNIT
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

    @classmethod
    def of_export(cls, folder: str | Path, cli_overrides: list[str] | None = None) -> "RynnvlaConfig":
        """The config of an export folder with the command line's `--KEY=VALUE`. Raises ExportError."""
        export = export_format.read_config(folder)
        if missing := [name for name in export_format.PROCESSORS if not (Path(folder) / name).exists()]:
            raise ExportError(f"{folder} lacks {', '.join(missing)}, which LeRobot reads; export the model again")
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
        """Nothing to do: what is missing in an observation is refused there."""

    def get_optimizer_preset(self):
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")

    def get_scheduler_preset(self):
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")


def features(export: ExportConfig) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """LeRobot's (input, output) features of an export. Frames of any size are read; the declared one is the model's."""
    edge = export.image.shortest_edge
    cameras = [camera for camera in (export.cameras.front, export.cameras.wrist) if camera]
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, (3, edge, edge)) for camera in cameras}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (export.vla.state_dim,))
    return inputs, {ACTION: PolicyFeature(FeatureType.ACTION, (export.action_dim,))}


def is_export(folder: str | Path) -> bool:
    """Whether `rynnvla convert export` made this folder."""
    config = Path(folder) / export_format.CONFIG
    return config.is_file() and "rynnvla" in export_format.read_json(config)


def without_type_beside_path(arguments: list[str]) -> list[str]:
    """Drops `--policy.type=rynnvla` beside the `--policy.path` of an export: they agree, and LeRobot takes only one."""
    paths = [a.partition("=")[2] for a in arguments if a.startswith("--policy.path=")]
    if paths and is_export(paths[0]):
        return [a for a in arguments if a != "--policy.type=rynnvla"]
    return arguments


_of_lerobot = PreTrainedConfig.from_pretrained.__func__


def _from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """LeRobot's, but for exports: their config.json is Hugging Face's, and LeRobot has no hook for another format."""
    if is_export(pretrained_name_or_path):
        return RynnvlaConfig.of_export(pretrained_name_or_path, kwargs.get("cli_overrides"))
    return _of_lerobot(cls, pretrained_name_or_path, **kwargs)


PreTrainedConfig.from_pretrained = classmethod(_from_pretrained)
