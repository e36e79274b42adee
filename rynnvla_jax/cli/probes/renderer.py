"""MuJoCo renders a frame without a screen. Answers {"name": backend}, or {"none": why} if no backend is installed."""

import os

from rynnvla_jax.cli.probes import answer
from rynnvla_jax.sim import gl

try:
    name = gl.backend()
except gl.RenderingError as error:
    if os.environ.get("MUJOCO_GL"):  # a backend that was asked for and does not work is broken, not missing
        raise
    answer({"none": str(error)})
else:
    gl.check()
    answer({"name": name})
