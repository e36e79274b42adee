"""LeRobot plug-in: `--policy.type=rynnvla --policy.path=EXPORT`, `--env.type=rynnvla_so100`.

LeRobot imports every distribution whose name starts with lerobot_policy_ before it reads the command line.
"""

import sys

from lerobot_policy_rynnvla import environment  # noqa: F401  registers the environment
from lerobot_policy_rynnvla.configuration_rynnvla import RynnvlaConfig, without_type_beside_path

sys.argv[1:] = without_type_beside_path(sys.argv[1:])

__all__ = ["RynnvlaConfig"]
