"""Guesses what the columns of a data set mean from their names, the robot that it states, and the size of the values.

Every guess carries its reason. What names do not tell is left open: unit "unknown", kind "other".

Sources of the tables: LeRobot's robots and motor buses (`norm_mode`), releases 0.1 to 0.4.4; the public data sets of
ALOHA, Unitree G1, LIBERO (openpi) and GR00T.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rynnvla_jax.columns import GROUPS, UNKNOWN, ActionColumn, Column, Columns, groups

_GRIPPER = re.compile(r"gripper|claw|\bjaw|夹爪|抓手|\bfinger|robotiq|\bgrip\b|suction|\bhand( open| close)?$")
_DEXTEROUS = re.compile(r"thumb|index|middle|\bring\b|pinky|little")
_BODY = re.compile(
    r"shoulder|elbow|wrist|waist|forearm|hip|knee|ankle|torso|neck|head\b|joint|\barm\b|rotate|rotation$"
)
_RATES = re.compile(r"veloc|\bvel\b|force|torque|current|effort|accel|tactile|temperature")
_ANGLE = re.compile(r"\b(roll|pitch|yaw|theta|heading)\b|euler")
_QUATERNION = re.compile(r"\bq ?[wxyz]$|\b(quat|quaternion|ori|orientation|rot|rotation)\b.* [wxyz]$|quat \d$")
_ROTATION_VECTOR = re.compile(r"axis ?angle|rot ?vec|rotation vector|\baa\b")
_TURN = re.compile(r"\br[xyz]$|\b(ori|orientation|rot|rotation)\b")  # a rotation of a kind that the name does not tell
_AXIS = re.compile(r"\b[xyz]$|\b(pos|position) ?[xyz]?$")
_JOINT = re.compile(r"\b(motor|j)\b|^(motor|j|q) ?\d")
_DELTA = re.compile(r"\bdelta|^rel\b|relative")

_RANGE, _SHARE, _USUAL = "-100..100", "0..100", "usual for this robot"
_UNITS = {"position": "metres", "euler": "radians", "rotation_vector": "radians", "quaternion": "1"}  # usual ones
_BOTH = "LeRobot records -100..100 or degrees under this name"
# Joint units by what LeRobot calls the robot; the first that matches. None: both units exist under this name.
_ROBOTS: tuple[tuple[str, str | None, str], ...] = (
    (r"^(bi_)?so_follower$|^lekiwi", None, _BOTH),
    (r"^(bi_)?(so|koch|omx)\w*_follower$", _RANGE, "LeRobot's default for this robot"),
    (r"^(so100|so101|koch|moss)$", "degrees", "LeRobot before mid-2025"),
    (r"(?<![a-z0-9])(aloha|unitree|g1|h1|franka|panda|ur5e?|gr1|xarm[67]?|piper)(?![a-z0-9])", "radians", _USUAL),
)
_WHOLE_TURN = 2 * math.pi + 0.5  # radians that a joint or angle may reach
_REACH = 10.0  # metres
TELLS_NO_KIND = "its name says a rotation, but not of which kind"
UNNAMED = "columns have no names"


def guess(
    robot: str,
    state: Sequence[str],
    action: Sequence[str],
    widths: tuple[int, int],
    largest: np.ndarray | None = None,
    unnamed: Sequence[str] = ("", ""),
) -> Columns:
    """The columns, without pairs.

    Args:
      robot: the data set's name of its robot, such as "so100_follower"; "" if it has none.
      state, action: names; () if there are none.
      widths: of state and action.
      largest: largest |value| of each state column, which tells units apart.
      unnamed: what columns without names are called, before their number.
    """
    named = bool(state or action)
    if state and not action and widths[0] == widths[1]:
        action = state
    if action and not state and widths[0] == widths[1]:
        state = action
    state = state or [f"{unnamed[0]}{i}" for i in range(widths[0])]
    action = action or [f"{unnamed[1]}{i}" for i in range(widths[1])]
    sizes = {} if largest is None else dict(zip(state, largest.tolist(), strict=True))
    joints, why = _joint_unit(robot, [sizes[name] for name in sizes if kind_of(name) == "joint"])
    gripper = _SHARE if re.search(r"so_?10[01]|so_follower|koch|omx|lekiwi", robot.lower()) else UNKNOWN
    if not named and why == _USUAL:
        joints, why = UNKNOWN, "not stated"  # without names they may be no joints at all
    units = {**_UNITS, "joint": joints, "other": UNKNOWN, "gripper": gripper}
    states = _whole([_column(Column, name, units, why, named) for name in state], sizes)
    actions = _whole([_column(ActionColumn, name, units, why, named) for name in action], sizes)
    if not named and widths[1] and widths[0] == widths[1] and unnamed[0] == unnamed[1]:
        last = f"{UNNAMED}; the last one is taken for the gripper, as in SO100 data sets"
        states = (*states[:-1], replace(states[-1], kind="gripper", unit=gripper, why=last))
        actions = (*actions[:-1], replace(actions[-1], kind="gripper", unit=gripper, why=last))
    return Columns(robot, states, actions)


def _joint_unit(robot: str, sizes: Sequence[float]) -> tuple[str, str]:
    """(unit of joints whose largest values are `sizes`, reason)."""
    name = robot.removeprefix("lerobot:").lower()
    unit, why = next(((u, w) for pattern, u, w in _ROBOTS if re.search(pattern, name)), (UNKNOWN, "not stated"))
    most = max(sizes, default=0.0)
    if (unit == _RANGE or why == _BOTH) and most > 100.5:  # joints in -100..100 are clipped to that range
        return "degrees", f"a joint reaches {most:.4g}, beyond 100"
    if unit == "radians" and most > _WHOLE_TURN:
        return UNKNOWN, f"a joint reaches {most:.4g}, which are no radians"
    return unit or UNKNOWN, why


def kind_of(name: str, gripper: bool = True) -> str:
    """The kind that a name tells, "other" if none. Without `gripper` as if grippers were not known."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.sub(r"[_\-./]+", " ", words).strip()
    if _DEXTEROUS.search(words):
        return "joint"
    pose = _AXIS.search(words) or _ANGLE.search(words) or _QUATERNION.search(words)  # of the gripper as a body
    if gripper and _GRIPPER.search(words) and (not pose or re.search(r"pos(ition)?$", words)):
        return "gripper"
    if _RATES.search(words):
        return "other"
    if _ROTATION_VECTOR.search(words):
        return "rotation_vector"
    if _QUATERNION.search(words):
        return "quaternion"
    if _ANGLE.search(words) and not _BODY.search(words):
        return "euler"
    if _TURN.search(words) and not _BODY.search(words):
        return "other"
    axis = _AXIS.search(words)
    if axis and (words[-1] in "xyz" or not _BODY.search(words)) and not re.search(r"\bmotor\b|\bjoint\b", words):
        return "position"
    return "joint" if _BODY.search(words) or _ANGLE.search(words) or _JOINT.search(words) else "other"


def _column(cls: type, name: str, units: Mapping[str, str], why: str, named: bool) -> Any:
    """One guessed column. `units` by kind; `why` says where the unit of joints comes from."""
    kind = kind_of(name) if named else "joint" if units["joint"] != UNKNOWN else "other"
    reason = "by its name" if kind in _UNITS else f"kind by its name, unit: {why}"
    if kind == "other" and named and _TURN.search(re.sub(r"[_\-./]+", " ", name.lower())):
        reason = TELLS_NO_KIND
    column = cls(name=name, unit=units[kind], kind=kind, why=reason)
    if cls is ActionColumn and kind != "gripper" and _DELTA.search(name.lower().replace("_", " ")):
        return replace(column, delta=True, why=f"{reason}; a difference by its name")
    return column


def _whole(columns: list[Any], sizes: Mapping[str, float]) -> tuple[Any, ...]:
    """Corrected by what the columns beside one and the size of its values say."""
    kinds = [column.kind for column in columns]
    angles = {word for column in columns for word in ("roll", "pitch", "yaw") if word in column.name.lower()}
    pose = "position" in kinds or len(angles) == 3
    for i, column in enumerate(columns):
        size = sizes.get(column.name, 0.0)
        if column.kind == "euler" and not pose and "joint" in kinds:
            joint = columns[kinds.index("joint")]
            columns[i] = replace(column, kind="joint", unit=joint.unit, why="an angle beside joints, not a pose")
        elif column.kind in ("euler", "rotation_vector") and size > _WHOLE_TURN:
            if size <= 365:
                columns[i] = replace(column, unit="degrees", why=f"it reaches {size:.4g}, which are no radians")
            else:
                columns[i] = replace(column, kind="other", unit=UNKNOWN, why=f"it reaches {size:.4g}: no angle")
        elif column.kind == "position" and size > _REACH:
            columns[i] = replace(column, unit=UNKNOWN, why=f"it reaches {size:.4g}, hardly metres")
    for first, kind, size in groups(columns):
        part = columns[first : first + size]
        bodies = {re.sub(r"[^a-zA-Z]*[wxyz]$|_?\d$", "", column.name) for column in part}
        if size == GROUPS[kind] and len(bodies) == 1:
            continue
        why = f"its name says {kind}, but {GROUPS[kind]} columns of one rotation do not stand in a row"
        for i in range(first, first + size):
            columns[i] = replace(columns[i], kind="other", unit=UNKNOWN, why=TELLS_NO_KIND if size == 3 else why)
    return tuple(columns)
