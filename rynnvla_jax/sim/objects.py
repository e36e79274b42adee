"""The objects on the table, added to a MuJoCo model as free bodies. Metres, kilograms; held by friction alone."""

import math

import mujoco
import numpy as np

_GEOM = mujoco.mjtGeom
_STEEL = (0.25, 0.25, 0.28)
_FIRM = {"solref": (0.006, 1.0), "solimp": (0.95, 0.99, 0.001, 0.5, 2.0)}
_GRIPPED = {"condim": 4, "friction": (1.2, 0.01, 0.0005), **_FIRM}
# What is round rolls away unless rolling costs something.
_ROUND = {"condim": 6, "friction": (1.2, 0.02, 0.004), **_FIRM}
_ONLY_SEEN = {"contype": 0, "conaffinity": 0}


def add(spec: mujoco.MjSpec, name: str, kind: str, rgb: tuple[float, float, float], position, quaternion) -> None:
    """One object of `kind`; `rgb` 0..1 is the colour of what it is known by."""
    body = spec.worldbody.add_body(name=name, pos=position, quat=quaternion)
    body.add_freejoint(name=name)
    _KINDS[kind](body, (*rgb, 1.0))


def _block(body, rgba) -> None:
    body.add_geom(type=_GEOM.mjGEOM_BOX, size=(0.0125, 0.0125, 0.0125), mass=0.02, rgba=rgba, **_GRIPPED)


def _can(body, rgba) -> None:
    body.add_geom(type=_GEOM.mjGEOM_CYLINDER, size=(0.013, 0.015, 0), mass=0.02, rgba=rgba, **_ROUND)


def _lemon(body, rgba) -> None:
    body.add_geom(type=_GEOM.mjGEOM_ELLIPSOID, size=(0.015, 0.015, 0.02), mass=0.02, rgba=rgba, **_ROUND)


def _strawberry(body, rgba) -> None:
    leaf = (0.1, 0.5, 0.1, 1.0)
    body.add_geom(type=_GEOM.mjGEOM_ELLIPSOID, size=(0.014, 0.014, 0.018), mass=0.018, rgba=rgba, **_ROUND)
    for size, z, mass in (((0.009, 0.0015, 0), 0.0165, 0.0005), ((0.0015, 0.006, 0), 0.022, 0.0002)):
        body.add_geom(type=_GEOM.mjGEOM_CYLINDER, size=size, pos=(0, 0, z), mass=mass, rgba=leaf, **_ONLY_SEEN)


def _pen(body, rgba) -> None:
    body.add_geom(type=_GEOM.mjGEOM_BOX, size=(0.0055, 0.0055, 0.055), mass=0.012, rgba=rgba, **_GRIPPED)
    body.add_geom(
        type=_GEOM.mjGEOM_CYLINDER,
        size=(0.0045, 0.006, 0),
        pos=(0, 0, -0.060),
        mass=0.0006,
        rgba=(0.9, 0.9, 0.9, 1),
        **_GRIPPED,
    )


def _plate(body, rgba) -> None:
    body.add_geom(type=_GEOM.mjGEOM_CYLINDER, size=(0.05, 0.003, 0), pos=(0, 0, 0.003), mass=0.3, rgba=rgba, **_GRIPPED)
    rim = (*(0.92 * np.array(rgba[:3])), 1.0)
    _ring(body, 12, 0.052, (0.003, 0.0145, 0.004), 0.006, 0.005, rim)


def _holder(body, rgba) -> None:
    radius, thick, half = 0.036, 0.002, 0.04
    width = radius * math.tan(math.pi / 8) + thick
    body.add_geom(
        type=_GEOM.mjGEOM_CYLINDER,
        size=(radius, 0.003, 0),
        pos=(0, 0, 0.003),
        mass=0.15,
        rgba=(*(0.8 * np.array(_STEEL)), 1),
        **_GRIPPED,
    )
    _ring(body, 8, radius, (thick, width, half), half, 0.02, (*_STEEL, 1.0))


def _ring(body, count: int, radius: float, size, z: float, mass: float, rgba) -> None:
    for angle in 2 * math.pi * np.arange(count) / count:
        body.add_geom(
            type=_GEOM.mjGEOM_BOX,
            size=size,
            pos=(radius * math.cos(angle), radius * math.sin(angle), z),
            quat=(math.cos(angle / 2), 0, 0, math.sin(angle / 2)),
            mass=mass,
            rgba=rgba,
            **_GRIPPED,
        )


_KINDS = {
    "block": _block,
    "can": _can,
    "lemon": _lemon,
    "strawberry": _strawberry,
    "pen": _pen,
    "plate": _plate,
    "holder": _holder,
}
