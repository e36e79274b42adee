"""Names of the features of Open-X data sets, and their rates, by the name of the TFDS data set.

State and action are the listed parts side by side, as they are recorded: deltas stay deltas, and what ends an episode
is no part of an action. Data sets whose features have the default names of `data.rlds` are here for their rate.

Source: the features.json files of Open X-Embodiment (arXiv 2310.08864) and of DROID, and, for cameras and rates, the
data set configurations of Octo and OpenVLA.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class OpenX:
    """Keys in `observation` and, of `action`, in the action; "" and () for what there is not."""

    fps: float
    front: str = "image"
    wrist: str = ""
    state: tuple[str, ...] = ("state",)
    action: tuple[str, ...] = ()  # of an action that is one array


_DELTA = ("world_vector", "rotation_delta")
_CLOSED = (*_DELTA, "gripper_closedness_action")
_OPEN = (*_DELTA, "open_gripper")

DATA_SETS = {
    "fractal20220817_data": OpenX(3, state=("base_pose_tool_reached", "gripper_closed"), action=_CLOSED),
    "bridge": OpenX(5, action=_OPEN),
    "bridge_dataset": OpenX(5, front="image_0"),
    "bridge_orig": OpenX(5, front="image_0"),
    "droid": OpenX(15, "exterior_image_1_left", "wrist_image_left", ("joint_position", "gripper_position")),
    "droid_100": OpenX(15, "exterior_image_1_left", "wrist_image_left", ("joint_position", "gripper_position")),
    "r2d2_faceblur": OpenX(15, "exterior_image_1_left", "wrist_image_left", ("joint_position", "gripper_position")),
    "taco_play": OpenX(15, "rgb_static", "rgb_gripper", ("robot_obs",), ("rel_actions_world",)),
    "jaco_play": OpenX(
        10, wrist="image_wrist", state=("joint_pos",), action=("world_vector", "gripper_closedness_action")
    ),
    "berkeley_cable_routing": OpenX(10, wrist="wrist45_image", state=("robot_state",), action=_DELTA),
    "roboturk": OpenX(10, front="front_rgb", state=(), action=_CLOSED),
    "viola": OpenX(20, "agentview_rgb", "eye_in_hand_rgb", ("joint_states", "gripper_states"), _CLOSED),
    "berkeley_autolab_ur5": OpenX(5, wrist="hand_image", state=("robot_state",), action=_CLOSED),
    "toto": OpenX(30, action=_OPEN),
    "nyu_door_opening_surprising_effectiveness": OpenX(3, state=(), action=_CLOSED),
    "austin_buds_dataset_converted_externally_to_rlds": OpenX(20, wrist="wrist_image"),
    "austin_sailor_dataset_converted_externally_to_rlds": OpenX(20, wrist="wrist_image"),
    "austin_sirius_dataset_converted_externally_to_rlds": OpenX(20, wrist="wrist_image"),
    "stanford_hydra_dataset_converted_externally_to_rlds": OpenX(10, wrist="wrist_image"),
    "furniture_bench_dataset_converted_externally_to_rlds": OpenX(10, wrist="wrist_image"),
    "nyu_franka_play_dataset_converted_externally_to_rlds": OpenX(3),
    "nyu_rot_dataset_converted_externally_to_rlds": OpenX(3),
    "maniskill_dataset_converted_externally_to_rlds": OpenX(20, wrist="wrist_image"),
}
