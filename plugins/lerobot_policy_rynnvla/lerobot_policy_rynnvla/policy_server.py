"""LeRobot's server for asynchronous control, extended to serve exported policies too.

    python -m lerobot_policy_rynnvla.policy_server --host=127.0.0.1 --port=8080 [--robot=lerobot:so_follower]
    python -m lerobot.async_inference.robot_client --policy_type=rynnvla --pretrained_name_or_path=EXPORT ...

LeRobot's protocol unpickles the data it receives, which can run any code: let only your own robots reach the port.
"""

import sys

from lerobot.async_inference import policy_server
from lerobot.async_inference.constants import SUPPORTED_POLICIES
from lerobot.configs.types import FeatureType, PolicyFeature

from lerobot_policy_rynnvla.configuration_rynnvla import ROBOT, UNIT

NAME = "rynnvla"


class RynnvlaPolicyServer(policy_server.PolicyServer):
    """LeRobot's server, but an exported policy gets the camera's frames unchanged, as it resizes without distortion."""

    robot, unit = ROBOT, UNIT

    @property
    def policy_image_features(self) -> dict[str, PolicyFeature]:
        if self.policy_type != NAME:
            return super().policy_image_features
        cameras = {k: f["shape"] for k, f in self.lerobot_features.items() if f["dtype"] in ("image", "video")}
        return {key: PolicyFeature(FeatureType.VISUAL, (3, h, w)) for key, (h, w, _) in cameras.items()}

    def SendPolicyInstructions(self, request, context):
        answer = super().SendPolicyInstructions(request, context)
        if self.policy_type == NAME:
            self.policy.config.robot, self.policy.config.unit = self.robot, self.unit
            self.policy.config.fps = float(self.config.fps)
        return answer


def register() -> None:
    """Makes LeRobot's `serve` use this server and this policy."""
    if NAME not in SUPPORTED_POLICIES:
        SUPPORTED_POLICIES.append(NAME)
    policy_server.PolicyServer = RynnvlaPolicyServer


def main() -> None:
    for name in ("robot", "unit"):
        given = [a for a in sys.argv[1:] if a.startswith(f"--{name}=")]
        if given:
            setattr(RynnvlaPolicyServer, name, given[-1].partition("=")[2])
            sys.argv[1:] = [a for a in sys.argv[1:] if a not in given]
    register()
    policy_server.serve()


if __name__ == "__main__":
    main()
