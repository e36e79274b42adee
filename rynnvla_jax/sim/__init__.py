"""The SO-100 table-top in MuJoCo: scenes, tasks, scripted expert, recording."""

import os

try:
    import mujoco  # noqa: F401
except (AttributeError, OSError, RuntimeError) as error:  # it looks for what MUJOCO_GL names at once
    raise ImportError(
        f"MuJoCo found no OpenGL for MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); unset MUJOCO_GL, or install "
        "libegl1 and libegl-mesa0 (egl), or libosmesa6 (osmesa)"
    ) from error
