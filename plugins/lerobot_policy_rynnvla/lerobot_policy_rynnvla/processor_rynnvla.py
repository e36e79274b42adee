"""LeRobot's steps before and after the policy: rename keys, make batches, move tensors. Nothing is normalised."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_rynnvla.configuration_rynnvla import RynnvlaConfig


def make_rynnvla_pre_post_processors(
    config: RynnvlaConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline[dict, dict], PolicyProcessorPipeline[PolicyAction, PolicyAction]]:
    """The same steps as the export's files for LeRobot; `dataset_stats` are not used, as the export has its own."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
    ]
    after = [DeviceProcessorStep(device="cpu")]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
