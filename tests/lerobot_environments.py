"""The environments with LeRobot that slow tests run in: the Pythons that RYNNVLA_LEROBOT_PYTHON names.

Several, such as one of LeRobot 0.4.4 and one of 0.6, are separated by ":" (`rynnvla evaluate` takes one only).
"""

import os
from pathlib import Path

import pytest

from rynnvla_jax.sim.lerobot_process import PYTHON

PYTHONS = [python for python in os.environ.get(PYTHON, "").split(os.pathsep) if python]
# Without PYTHONPATH, which would put this tree before the installed distributions.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"{PYTHON} names no Python of an environment with LeRobot"))


@pytest.fixture(scope="module", params=PYTHONS or [_ABSENT], ids=lambda python: Path(python or "none").parts[-3:][0])
def python(request):
    """The Python of each environment in turn."""
    return request.param
