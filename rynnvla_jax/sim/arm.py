"""The SO-ARM100: its model from `rynnvla fetch so100`, with a grasp site, a wrist camera and LeRobot's unit.

Source: the arm's MJCF and meshes are The Robot Studio's, by way of MuJoCo Menagerie (Apache-2.0). The joints' friction
and the controller are ours: the model's own make the arm creep.
"""

import functools
from pathlib import Path

import fast_simplification
import mujoco
import numpy as np

from rynnvla_jax.columns import Columns
from rynnvla_jax.storage import fetch, files

ROBOT = "lerobot:so100_follower"
NAMES = tuple(
    f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
)
# Joints -100..100 over their range, gripper 0 (closed) to 100.
COLUMNS = Columns.of_joints(ROBOT, [name.removesuffix(".pos") for name in NAMES], "-100..100", "0..100")
JOINTS = ("Rotation", "Pitch", "Elbow", "Wrist_Pitch", "Wrist_Roll", "Jaw")
LIMITS = np.array(  # radians, of the model
    [[-2.2, 2.2], [-3.14158, 0.2], [0.0, 3.14158], [-2.0, 1.8], [-3.14158, 3.14158], [-0.2, 2.0]]
)
SERVO_STEP = 2 * np.pi / 4096  # radians: the arm's servos (Feetech STS3215) take targets as 12-bit positions of a turn
HOME = np.array([0.0, -2.6, 2.6, 0.9, 0.0, 0.0])  # radians: folded, jaw a little open
PAN_AXIS = np.array([0.0452, 0.0])  # metres, where the first joint's axis meets the table
HAND, JAW = "Fixed_Jaw", "Moving_Jaw"
TRIANGLES = 19_000  # of all visual meshes together: drawing is bound by vertices

_ZERO = np.array([-100.0] * 5 + [0.0])
_SCALE = np.array([200.0] * 5 + [100.0]) / (LIMITS[:, 1] - LIMITS[:, 0])
_PREFIX = "so_arm100_left"
_FILES = ("so_arm100_dependencies.xml", f"{_PREFIX}.xml")
_MODEL = f"""<mujoco model="so100"><include file="{_FILES[0]}"/><worldbody><include file="{_FILES[1]}"/></worldbody>
</mujoco>"""


def to_unit(radians: np.ndarray) -> np.ndarray:
    """[..., 6] joint angles of the model -> LeRobot's unit (`COLUMNS`)."""
    return (np.asarray(radians, np.float64) - LIMITS[:, 0]) * _SCALE + _ZERO


def to_radians(values: np.ndarray) -> np.ndarray:
    """[..., 6] in LeRobot's unit -> joint angles of the model."""
    return (np.asarray(values, np.float64) - _ZERO) / _SCALE + LIMITS[:, 0]


@functools.cache
def _spec() -> mujoco.MjSpec:
    folder = fetch.path("so100")
    meshes = {file.name: file.read_bytes() for file in sorted(folder.glob("*.stl"))}
    small = {f"visual_{name}": data for name, data in _decimated(folder).items()}
    includes = {name: (folder / name).read_bytes() for name in _FILES}
    spec = mujoco.MjSpec.from_string(_MODEL, include=includes, assets={**meshes, **small})
    for element in (*spec.bodies, *spec.joints, *spec.geoms):
        element.name = element.name.removeprefix(f"{_PREFIX}/").replace(_PREFIX, "Base")
    spec.body("Base").pos = (0, 0, 0)
    for name in small:
        mesh = spec.add_mesh(name=Path(name).stem, file=name)
        mesh.smoothnormal = False
    for geom in spec.geoms:
        if geom.contype == 0 and geom.meshname:
            geom.meshname = f"visual_{geom.meshname}"
    _strengthen(spec)
    return spec


def spec() -> mujoco.MjSpec:
    """A fresh copy of the arm at the origin, reaching along +x. Raises FetchError."""
    return _spec().copy()


def _strengthen(spec: mujoco.MjSpec) -> None:
    """Joints, position controllers, jaw pads that hold by friction, grasp site and camera."""
    for name in JOINTS:
        jaw, joint = name == "Jaw", spec.joint(name)
        joint.frictionloss, joint.armature = 0.1, 0.01 if jaw else 0.1
        kp, force = (8.0, 1.0) if jaw else (50.0, 35.0)  # N m/rad, N m
        actuator = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        actuator.set_to_position(kp=kp, dampratio=1.0)
        actuator.forcelimited, actuator.forcerange = True, (-force, force)
        actuator.ctrllimited, actuator.ctrlrange = True, tuple(joint.range)
    for geom in spec.geoms:
        if "_pad_" in geom.name:
            geom.condim, geom.friction = 4, (1.5, 0.02, 0.001)
            geom.solref, geom.solimp[:3] = (0.006, 1), (0.95, 0.99, 0.001)
    spec.add_exclude(bodyname1="Base", bodyname2="Rotation_Pitch")
    hand = spec.body(HAND)
    hand.add_site(name="grasp", pos=(0, -0.0975, 0), rgba=(0, 0, 0, 0))
    # Looks along the fingers from above the wrist.
    hand.add_camera(name="wrist", pos=(0, -0.015, 0.07), quat=look_along((0, -0.78, -0.62), (0, 0, 1)), fovy=70)


def look_along(direction, up) -> np.ndarray:
    """Unit quaternion of a camera that looks along `direction` (its -z), with `up` upward in the picture."""
    z = -np.asarray(direction, np.float64)
    x = np.cross(up, z)
    axes = np.stack([x, np.cross(z, x), z], 1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, (axes / np.linalg.norm(axes, axis=0)).ravel())
    return quaternion


def _decimated(folder: Path) -> dict[str, bytes]:
    """STL files {name: bytes} of about TRIANGLES triangles in all, made once and stored next to the originals."""
    made = folder / f"decimated-{TRIANGLES}"
    if not made.is_dir():
        originals = [f for f in sorted(folder.glob("*.stl")) if "Collision" not in f.name]
        triangles = {file: _triangles(file) for file in originals}
        reduction = 1 - TRIANGLES / sum(map(len, triangles.values()))
        try:
            with files.replacing(made) as partial:
                partial.mkdir()
                for file, corners in triangles.items():
                    points, faces = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
                    points, faces = fast_simplification.simplify(points, faces.reshape(-1, 3), reduction)
                    (partial / file.name).write_bytes(_stl(points[faces]))
        except OSError:  # another process was faster
            if not made.is_dir():
                raise
    return {file.name: file.read_bytes() for file in sorted(made.glob("*.stl"))}


_STL = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def _triangles(file: Path) -> np.ndarray:
    """float32 [triangles, 3 corners, 3] of a binary STL file."""
    return np.frombuffer(file.read_bytes(), _STL, offset=84)["corners"]


def _stl(corners: np.ndarray) -> bytes:
    out = np.zeros(len(corners), _STL)
    out["corners"] = corners
    return bytes(80) + len(out).to_bytes(4, "little") + out.tobytes()
