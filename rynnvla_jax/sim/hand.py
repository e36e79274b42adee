"""A jointed human hand of capsules, added to a MuJoCo model, and the finger angles of its pinches.

The palm is a mocap body: x points along the fingers, y to the thumb's side of a right hand, z out of its back. The
forearm is another. Joints are named as EgoDex names them; every one is a site. Metres and radians.
"""

import functools
import math

import mujoco
import numpy as np

FINGERS = ("Thumb", "IndexFinger", "MiddleFinger", "RingFinger", "LittleFinger")
WRIST = np.array([-0.045, 0.0, 0.0])  # metres, in the palm's frame
FOREARM = 0.55  # metres of it and the upper arm, as one: out of the picture before it ends
TILT = 0.95  # radians that the fingers point down by in a pinch
PINCH = np.array([0.082, 0.012, -0.052])  # metres, in the palm's frame: where thumb and index meet

_PHALANGES = ("Knuckle", "IntermediateBase", "IntermediateTip")
_KNUCKLES = {  # metres
    "Thumb": (-0.012, 0.030, -0.010),
    "IndexFinger": (0.044, 0.028, 0.0),
    "MiddleFinger": (0.046, 0.008, 0.0),
    "RingFinger": (0.043, -0.012, 0.0),
    "LittleFinger": (0.037, -0.031, 0.0),
}
_LENGTHS = {
    "Thumb": (0.045, 0.035, 0.028),
    "IndexFinger": (0.040, 0.024, 0.020),
    "MiddleFinger": (0.044, 0.027, 0.021),
    "RingFinger": (0.040, 0.025, 0.020),
    "LittleFinger": (0.032, 0.019, 0.018),
}
_RADII = {"Thumb": 0.0098, "IndexFinger": 0.0082, "MiddleFinger": 0.0084, "RingFinger": 0.008, "LittleFinger": 0.0072}
_THUMB_AXES = np.array([[0.62, 0.62, -0.48], [-0.25, 0.75, 0.6]])  # where it points; roughly its nail's way
# Of each finger: spread, then the bends from the knuckle on.
_BENDS = ((-0.3, 1.6), (0.0, 1.7), (0.0, 1.7))
_THUMB_BENDS = ((-0.6, 1.0), (-0.2, 1.2), (-0.2, 1.2))
_SPREAD, _THUMB_SPREAD = 0.5, 1.0
OPEN = np.array(
    [[0.1, -0.2, 0.1, 0.1], [0.05, 0.35, 0.4, 0.25], [0, 0.4, 0.45, 0.3], [0, 0.55, 0.6, 0.4], [0, 0.65, 0.7, 0.45]]
)
RESTING = np.array([[0.2, 0.0, 0.2, 0.2], *[[0.06 - 0.04 * i, 0.25, 0.3, 0.2] for i in range(4)]])
_PINCHING = np.array(
    [[0, 0, 0.2, 0.2], [0, 0.6, 0.6, 0.25], [0, 0.6, 0.6, 0.25], [0, 0.75, 0.8, 0.4], [0, 0.85, 0.9, 0.5]]
)
_TUCKED = np.array([[0, 1.15, 1.4, 0.9], [0, 1.25, 1.45, 0.9]])  # ring and little finger out of the way
# Of a pinch, along the closing direction, from the object's side to the middle of a fingertip's end.
_TIP, _SQUEEZED, _CLEAR = 0.0085, 0.003, 0.014
_FINGERS_TOUCH = 2  # the bit of what fingers collide with: objects, but not the table
_ONLY_SEEN = {"contype": 0, "conaffinity": 0}
_CAPSULE, _ELLIPSOID = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_ELLIPSOID


def joints(side: str) -> tuple[str, ...]:
    """EgoDex's names of one hand's joints, `side` left | right: the wrist, then finger by finger to the tip."""
    names = [f"{side}Hand"]
    for finger in FINGERS:
        parts = ("Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
        names += [f"{side}{finger}{part}" for part in (("Metacarpal",) if finger != "Thumb" else ()) + parts]
    return tuple(names)


def angles(side: str = "right") -> tuple[str, ...]:
    """Names of the model's hinges and of their actuators, four a finger as in `OPEN`."""
    return tuple(f"{side}{finger}{bend}" for finger in FINGERS for bend in ("Spread", "0", "1", "2"))


def phalanges(side: str = "right") -> tuple[str, ...]:
    """Names of the bodies that touch objects."""
    return tuple(f"{side}{finger}{part}" for finger in FINGERS for part in _PHALANGES)


def add(spec: mujoco.MjSpec, side: str, skin, sleeve, posture: np.ndarray | None = None) -> None:
    """Palm `<side>Palm` and forearm `<side>Forearm`, colours 0..1 RGB; stiff in `posture` [5, 4], or with actuators."""
    mirror = 1 if side == "right" else -1
    skin = (*skin, 1.0)
    palm = spec.worldbody.add_body(name=f"{side}Palm", mocap=True)
    palm.add_site(name=f"{side}Hand", pos=WRIST)
    _palm(palm, side, mirror, skin)
    for i, finger in enumerate(FINGERS):
        _finger(spec, palm, side, finger, mirror, skin, None if posture is None else posture[i])
    arm = spec.worldbody.add_body(name=f"{side}Forearm", mocap=True)
    _bone(arm, (-0.008, 0, 0), (0.09, 0, 0), 0.0225, skin)
    _bone(arm, (0.085, 0, 0), (FOREARM, 0, 0), 0.034, (*sleeve, 1.0))


def touchable(model: mujoco.MjModel, name: str, yes: bool) -> None:
    """Whether fingers touch this object."""
    for geom in np.flatnonzero((model.geom_bodyid == model.body(name).id) & (model.geom_contype > 0)):
        model.geom_conaffinity[geom] = 1 | (_FINGERS_TOUCH if yes else 0)


def _palm(palm, side: str, mirror: int, skin) -> None:
    for finger in FINGERS[1:]:
        x, y, _ = _KNUCKLES[finger]
        start = (-0.036, 0.55 * mirror * y, 0.0)
        _bone(palm, start, (x, mirror * y, 0), 0.0108, skin)
        palm.add_site(name=f"{side}{finger}Metacarpal", pos=start)
    palm.add_geom(type=_ELLIPSOID, size=(0.048, 0.036, 0.0135), rgba=skin, **_ONLY_SEEN)
    palm.add_geom(type=_ELLIPSOID, size=(0.030, 0.022, 0.015), pos=(-0.040, 0, 0), rgba=skin, **_ONLY_SEEN)
    ball = np.array(_KNUCKLES["Thumb"]) * (1, mirror, 1)
    _bone(palm, (-0.032, mirror * 0.012, -0.004), ball, 0.0125, skin)
    _bone(palm, ball, (0.030, mirror * 0.022, -0.004), 0.0105, skin)  # the web of the thumb


def _finger(spec, palm, side: str, finger: str, mirror: int, skin, stiff: np.ndarray | None) -> None:
    parent = palm.add_body(pos=np.array(_KNUCKLES[finger]) * (1, mirror, 1), quat=_base(finger, mirror))
    thumb = finger == "Thumb"
    bends, spread = (_THUMB_BENDS, _THUMB_SPREAD) if thumb else (_BENDS, _SPREAD)
    length = 0.0
    for i, part in enumerate(_PHALANGES):
        name = f"{side}{finger}{part}"
        parent = parent.add_body(name=name, pos=(length, 0, 0), gravcomp=1)
        parent.add_site(name=name)
        if stiff is not None:
            turn = _turn("z", mirror * stiff[0]) if i == 0 else np.eye(3)
            parent.quat = quaternion(turn @ _turn("y", stiff[i + 1]))
        else:
            if i == 0:
                _hinge(spec, parent, f"{side}{finger}Spread", (0, 0, mirror), (-spread, spread))
            _hinge(spec, parent, f"{side}{finger}{i}", (0, 1, 0), bends[i])
        length = _LENGTHS[finger][i]
        touch = {"contype": _FINGERS_TOUCH, "conaffinity": 0, "condim": 4, "friction": (1.5, 0.02, 0.001)}
        touch |= {"solref": (0.006, 1), "solimp": (0.95, 0.99, 0.001, 0.5, 2)}
        radius = _RADII[finger] * (1 - 0.06 * i)
        _bone(parent, (0, 0, 0), (length, 0, 0), radius, skin, mass=0.01, **(touch if stiff is None else _ONLY_SEEN))
    parent.add_site(name=f"{side}{finger}Tip", pos=(length, 0, 0))


def _base(finger: str, mirror: int) -> np.ndarray:
    if finger != "Thumb":
        return np.array([1.0, 0, 0, 0])
    x, z = _THUMB_AXES * (1, mirror, 1)
    x = x / np.linalg.norm(x)
    z = z - x * (x @ z)
    z = z / np.linalg.norm(z)
    return quaternion(np.stack([x, np.cross(z, x), z], 1))


def _hinge(spec, body, name: str, axis, limits) -> None:
    body.add_joint(
        name=name,
        type=mujoco.mjtJoint.mjJNT_HINGE,
        axis=axis,
        range=limits,
        limited=mujoco.mjtLimited.mjLIMITED_TRUE,
        damping=0.02,
        armature=0.0005,
    )
    actuator = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    actuator.set_to_position(kp=3.0, dampratio=1.0)  # N m/rad
    actuator.forcelimited, actuator.forcerange = True, (-0.8, 0.8)


def _bone(body, start, end, radius: float, rgba, **extra) -> None:
    body.add_geom(
        type=_CAPSULE, fromto=(*start, *end), size=(radius, 0, 0), rgba=rgba, **(extra or {"mass": 0, **_ONLY_SEEN})
    )


# Pinches


def grasp_rotation() -> np.ndarray:
    """[3, 3] in the palm's frame: x from the thumb to the index finger, y to the thumb's side, z where it came from."""
    return _turn("y", TILT).T


@functools.cache
def pinch(width: float, opened: bool, tucked: bool) -> np.ndarray:
    """Finger angles [20] that close around, or hold open about, an object of `width` at `PINCH`.

    `tucked`: ring and little finger are out of the way.
    """
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    add(spec, "right", (0, 0, 0), (0, 0, 0))
    model = spec.compile()
    data = mujoco.MjData(model)
    reach = width / 2 + _TIP + (_CLEAR if opened else -_SQUEEZED)
    axes = grasp_rotation()
    fingertips = {"Thumb": (-reach, 0.004, 0.002), "IndexFinger": (reach, 0.009, 0), "MiddleFinger": (reach, -0.010, 0)}
    wanted = np.concatenate([PINCH + axes @ np.array(p) for p in fingertips.values()])
    sites = [model.site(f"right{finger}Tip").id for finger in fingertips]
    names = angles()
    columns = np.array([model.joint(name).qposadr[0] for name in names])
    limits = np.array([model.joint(name).range for name in names])
    nominal = (OPEN if opened else _PINCHING).copy()
    if tucked:
        nominal[3:] = _TUCKED
    nominal = nominal.ravel()
    found, jacobian = nominal.copy(), np.zeros((len(wanted), model.nv))
    for _ in range(200):
        data.qpos[columns] = found
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        for i, site in enumerate(sites):
            mujoco.mj_jacSite(model, data, jacobian[3 * i : 3 * i + 3], None, site)
        j = jacobian[:, columns]
        back = j.T @ np.linalg.inv(j @ j.T + 2e-5 * np.eye(len(wanted)))
        pull = 0.15 * (nominal - found)
        change = back @ (wanted - data.site_xpos[sites].ravel()) + pull - back @ (j @ pull)
        found = np.clip(found + np.clip(change, -0.15, 0.15), limits[:, 0], limits[:, 1])
    return found


def _turn(axis: str, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]] if axis == "y" else [[c, -s, 0], [s, c, 0], [0, 0, 1]])


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """[3, 3] -> unit [4], w x y z."""
    out = np.zeros(4)
    mujoco.mju_mat2Quat(out, np.ascontiguousarray(rotation).ravel())
    return out
