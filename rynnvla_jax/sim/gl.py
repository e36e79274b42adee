"""Rendering without a screen: with EGL, or else OSMesa. MUJOCO_GL selects one if it is set."""

import ctypes
import functools
import importlib
import os
import sys

import mujoco
import numpy as np

PACKAGES = "apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri (or libosmesa6)"


class RenderingError(RuntimeError):
    """No OpenGL can render without a screen; the message names the Debian packages."""


class Eye:
    """Draws one model, `size` x `size` pixels. Raises RenderingError."""

    def __init__(self, model: mujoco.MjModel, size: int):
        name = backend()
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            self._context = importlib.import_module(f"mujoco.{name}").GLContext(size, size)
            self._context.make_current()
            self._drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # each OpenGL has its own kinds
            raise RenderingError(
                f"MuJoCo cannot render with MUJOCO_GL={name} ({type(error).__name__}: {error}). Install its packages: "
                f"{PACKAGES}, or set MUJOCO_GL to the other one of egl and osmesa"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._drawing)
        self._model, self._size = model, size
        self._option, self._scene = mujoco.MjvOption(), mujoco.MjvScene(model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def see(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8 [size, size, 3] RGB of a camera of the model."""
        self._context.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        whole = mujoco.MjrRect(0, 0, self._size, self._size)
        mujoco.mjr_render(whole, self._scene, self._drawing)
        pixels = np.empty((self._size, self._size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, whole, self._drawing)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        self._context.make_current()
        self._drawing.free()
        self._context.free()


def check() -> None:
    """Draws one frame. Raises RenderingError."""
    world = "<mujoco><worldbody><camera name='one'/></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(world)
    eye = Eye(model, 8)
    eye.see(mujoco.MjData(model), "one")
    eye.close()


def backend() -> str:
    """Name of the module of `mujoco` that gives OpenGL here. Raises RenderingError when there is none."""
    name = os.environ.get("MUJOCO_GL", "").strip().lower() or _found()
    if not name:
        raise RenderingError(f"no OpenGL on this machine can render without a screen; run {PACKAGES}")
    if name not in ("egl", "osmesa", "glfw", "cgl"):
        raise RenderingError(f"MUJOCO_GL is {name}; set it to egl or osmesa")
    return name


@functools.cache
def _found() -> str:
    if not sys.platform.startswith("linux"):
        return "cgl" if sys.platform == "darwin" else "glfw"
    return "egl" if _egl_devices() else "osmesa" if _osmesa() else ""


def _egl_devices() -> int:
    """The library alone is not enough: without a driver it finds no device."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return 0
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return 0
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    count = ctypes.c_int(0)
    return count.value if query(0, None, ctypes.byref(count)) else 0


def _osmesa() -> bool:
    for version in (8, 6):
        try:
            ctypes.CDLL(f"libOSMesa.so.{version}")
        except OSError:
            continue
        return True
    return False
