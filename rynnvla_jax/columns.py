"""What the columns of state and action mean: name, unit, kind, recorded as a target or as a difference, and pairs.

The meaning travels with data, statistics, checkpoint and export, and is compared wherever two of them meet.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.config import ConfigError, check_choice
from rynnvla_jax.errors import listing
from rynnvla_jax.metadata import Index, Name

KINDS = {
    "joint": "angle or position of one joint",
    "position": "x, y or z",
    "euler": "angle that wraps: roll, pitch or yaw",
    "quaternion": "one of four columns in a row; q and -q are the same rotation",
    "rotation_vector": "one of three columns in a row: axis times angle, which wraps at half a turn",
    "gripper": "opening of a gripper; never made relative",
    "other": "anything else",
}
UNKNOWN = "unknown"  # the data do not say the unit; "" means that the question was never asked (old files)
TURNS = {"degrees": 360.0, "radians": 2 * math.pi}
GROUPS = {"quaternion": 4, "rotation_vector": 3}  # columns of one rotation
_MOST = 2**16  # columns


@dataclass(frozen=True)
class Column:
    """One column of the state. `unit`: "degrees", "radians", "metres", "-100..100" (share of a joint's range) or
    another text; `why` says how the meaning was found and is not compared.
    """

    name: Name = ""
    unit: Name = ""
    kind: Name = "other"
    why: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class ActionColumn(Column):
    """One column of the action. `delta`: recorded as a difference already. `pair`: the state column that a relative
    action starts from; None: the column is kept as recorded.
    """

    delta: bool = False
    pair: Index | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of state and action, in order. `robot` names the machine and its calibration ("lerobot:so100")."""

    robot: Name = ""
    state: tuple[Column, ...] = ()
    action: tuple[ActionColumn, ...] = ()

    def __post_init__(self):
        for what, columns in (("state", self.state), ("action", self.action)):
            if len(columns) > _MOST:
                raise ConfigError(f"columns.{what} has {len(columns)} columns; a robot has at most {_MOST}")
            names = [column.name for column in columns if column.name]
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1][:1]:
                raise ConfigError(f"columns.{what}: two columns are called {twice[0]!r}; give each its own name")
            for column in columns:
                where = f"columns.{what}: kind of {column.name or 'a column'}"
                check_choice(where, column.kind, tuple(KINDS))
                if column.kind in ("euler", "rotation_vector") and column.unit not in TURNS:
                    raise ConfigError(
                        f"{where} is {column.kind} but its unit is {column.unit!r}; set the unit to degrees or radians"
                    )
            for first, kind, size in groups(columns):
                if size != GROUPS[kind]:
                    raise ConfigError(
                        f"columns.{what}: {size} columns from number {first} on are of kind {kind}, which needs "
                        f"{GROUPS[kind]} in a row; use all of them or none, or correct their kind"
                    )
        for i, column in enumerate(self.action):
            if column.pair is None:
                continue
            where = f"columns.action: column {i} ({column.name})"
            if column.pair >= len(self.state):
                raise ConfigError(f"{where} is paired with state column {column.pair} of {len(self.state)}; correct it")
            if column.delta:
                raise ConfigError(f"{where} is a difference and has a pair; set its pair to null")
        for first, kind, size in groups(self.action):
            pairs = [c.pair for c in self.action[first : first + size]]
            start = pairs[0]
            if start is None and set(pairs) == {None}:
                continue
            if start is None or pairs != list(range(start, start + size)):
                raise ConfigError(
                    f"columns.action: the {size} columns of a {kind} from number {first} on have pairs {pairs}; pair "
                    "them with as many state columns in the same order, or none of them"
                )

    @property
    def kept(self) -> tuple[int, ...]:
        """Action columns that are never made relative."""
        return tuple(i for i, column in enumerate(self.action) if column.pair is None)

    @property
    def relative(self) -> tuple[int, ...]:
        """Action columns that are learnt as differences."""
        return tuple(i for i, column in enumerate(self.action) if column.pair is not None)

    def origin(self, state: np.ndarray) -> np.ndarray:
        """State [..., S] -> [..., A]: what a relative action starts from, 0 in the columns that are kept."""
        out = np.zeros((*state.shape[:-1], len(self.action)), state.dtype)
        out[..., list(self.relative)] = state[..., [c.pair for c in self.action if c.pair is not None]]
        return out

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any, where: str) -> "Columns":
        """Raises ConfigError, which names `where` and the field."""
        try:
            return metadata.parse(cls, values, where)
        except metadata.MetadataError as error:
            raise ConfigError(f"{error}; correct it") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def of_joints(cls, robot: str, names: Sequence[str], unit: str, gripper_unit: str) -> "Columns":
        """Of an arm whose state and targets are the same joints; a name with "gripper" in it is a gripper."""
        kinds = [("gripper", gripper_unit) if "gripper" in name else ("joint", unit) for name in names]
        state = tuple(Column(name, unit, kind) for name, (kind, unit) in zip(names, kinds, strict=True))
        pairs = [None if kind == "gripper" else i for i, (kind, _) in enumerate(kinds)]
        action = (ActionColumn(c.name, c.unit, c.kind, pair=pair) for c, pair in zip(state, pairs, strict=True))
        return cls(robot, state, tuple(action))

    def with_joints(self, robot: str, unit: str) -> "Columns":
        """The same columns on a robot of this name, whose joints are in `unit`; "" leaves either as it is."""

        def changed(column):
            joint = unit and column.kind in ("joint", "other")  # of unnamed columns no kind is known
            return dataclasses.replace(column, unit=unit) if joint else column

        state, action = (tuple(map(changed, columns)) for columns in (self.state, self.action))
        return Columns(robot or self.robot, state, action)

    @classmethod
    def unstated(cls, robot: str, state: int, action: int, kept: Sequence[int]) -> "Columns":
        """Of files that say no more than a robot and which columns are kept; others pair with the same state column."""
        pairs = [None if i in kept else i for i in range(action)]
        return cls(robot, (Column(),) * state, tuple(ActionColumn(pair=pair) for pair in pairs))


def groups(columns: Sequence[Column]) -> list[tuple[int, str, int]]:
    """(first column, kind, columns) of each quaternion and rotation vector; runs of one kind are cut into groups."""
    found, i = [], 0
    while i < len(columns):
        kind, first = columns[i].kind, i
        if kind not in GROUPS:
            i += 1
            continue
        while i < len(columns) and columns[i].kind == kind and i - first < GROUPS[kind]:
            i += 1
        found.append((first, kind, i - first))
    return found


def difference(ours: Columns, theirs: Columns) -> str:
    """The first way in which two meanings differ, as "robot 'a' and 'b'"; "" if they agree. What one of the two does
    not state ("") is not compared.
    """
    if ours.robot and theirs.robot and ours.robot != theirs.robot:
        return f"robot {ours.robot!r} and {theirs.robot!r}"
    for what, a, b in (("state", ours.state, theirs.state), ("action", ours.action, theirs.action)):
        if len(a) != len(b):
            return f"{len(a)} and {len(b)} columns of {what}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            label = f"{what} column {i}"
            if x.name and y.name and x.name != y.name:
                return f"{label} {x.name!r} and {y.name!r}"
            label += f" ({x.name or y.name})" if x.name or y.name else ""
            unknown_gripper = x.kind == y.kind == "gripper" and UNKNOWN in (x.unit, y.unit)  # nobody asks for it
            if x.unit and y.unit and x.unit != y.unit and not unknown_gripper:
                return f"{label} in {x.unit} and in {y.unit}"
            if x.unit and y.unit and x.kind != y.kind:  # who states no unit states no kind
                return f"{label} of kind {x.kind} and {y.kind}"
            if isinstance(x, ActionColumn) and isinstance(y, ActionColumn):
                if x.delta != y.delta:
                    return f"{label} as {_recorded(x)} and as {_recorded(y)}"
                if x.pair != y.pair:
                    return f"{label} {_relative(x)} and {_relative(y)}"
    return ""


def _recorded(column: ActionColumn) -> str:
    return "a difference" if column.delta else "a target"


def _relative(column: ActionColumn) -> str:
    return "kept as recorded" if column.pair is None else f"relative to state column {column.pair}"


def labels(columns: Sequence[Column]) -> list[str]:
    """Names for figures and tables, "shoulder pan"; numbers where there are none."""
    return [column.name.replace("_", " ") or str(i) for i, column in enumerate(columns)]


def describe(columns: Sequence[Column]) -> str:
    """ "shoulder_pan, elbow_flex in degrees; gripper in 0..100" - names by unit, in order."""
    by_unit: dict[str, list[str]] = {}
    for i, column in enumerate(columns):
        by_unit.setdefault(column.unit, []).append(column.name or str(i))
    return "; ".join(f"{listing(names, 8)}{f' in {unit}' if unit else ''}" for unit, names in by_unit.items())


def without_jumps(path: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """Relative columns of paths [B, T, A] without jumps: from step 0 on angles go beyond a turn, quaternions keep their
    sign. Columns that are kept, and kinds that do not wrap, are unchanged. Same dtype.
    """
    if not wraps(columns):
        return path
    out = np.array(path, np.float64)
    for i, column in enumerate(columns):
        if column.kind == "euler" and _paired(column):
            out[..., i] = np.unwrap(out[..., i], period=TURNS[column.unit], axis=1)
    for first, kind, size in groups(columns):
        if not _paired(columns[first]):
            continue
        part = out[..., first : first + size]
        if kind == "quaternion":
            signs = np.where((part[:, 1:] * part[:, :-1]).sum(-1) < 0, -1.0, 1.0)
            part[:, 1:] *= np.cumprod(signs, axis=1)[..., None]
        else:
            for step in range(1, part.shape[1]):
                part[:, step] = _nearest_vectors(part[:, step], part[:, step - 1], TURNS[columns[first].unit])
    return out.astype(path.dtype)


def principal(values: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """Actions [C, A] as robots expect them: angles from minus to plus half a turn, quaternions of length 1."""
    if not wraps(columns):
        return values
    out = np.array(values, np.float64)
    for i, column in enumerate(columns):
        if column.kind == "euler" and _paired(column):
            turn = TURNS[column.unit]
            out[:, i] -= turn * np.round(out[:, i] / turn)
    for first, kind, size in groups(columns):
        if not _paired(columns[first]):
            continue
        part = out[:, first : first + size]
        length = np.linalg.norm(part, axis=1, keepdims=True)
        if kind == "quaternion":
            part /= np.where(length > 0, length, 1)
        else:
            turn = TURNS[columns[first].unit]
            turned = length - turn * np.round(length / turn)
            part *= np.where(length > 0, turned / np.where(length > 0, length, 1), 1)
    return out


def distance(values: np.ndarray, others: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """|values - others| of actions [..., A], float64: the short way round of angles and rotation vectors, and the
    nearer of the two quaternions of a rotation.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    apart = values - others
    for i, column in enumerate(columns):
        if column.kind == "euler":
            apart[..., i] -= TURNS[column.unit] * np.round(apart[..., i] / TURNS[column.unit])
    for first, kind, size in groups(columns):
        a, b = (x[..., first : first + size] for x in (values, others))
        if kind == "quaternion":
            apart[..., first : first + size] = a - np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)
        else:
            apart[..., first : first + size] = _nearest_vectors(a, b, TURNS[columns[first].unit]) - b
    return np.abs(apart)


def _nearest_vectors(vectors: np.ndarray, others: np.ndarray, turn: float) -> np.ndarray:
    """Rotation vectors [B, 3] of the same rotations, as near to `others` [B, 3] as can be."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    axis = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    # On the line of all vectors of this rotation, the nearest one lies around the projection of the other.
    turns = np.round(((axis * others).sum(-1, keepdims=True) - length) / turn)
    return vectors + turns * turn * axis


def _paired(column: Column) -> bool:
    return isinstance(column, ActionColumn) and column.pair is not None


def wraps(columns: Sequence[Column]) -> bool:
    """Whether a relative column is a rotation, which is followed beyond a turn."""
    return any(c.kind in ("euler", *GROUPS) and _paired(c) for c in columns)
