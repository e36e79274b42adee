"""Finds out what the columns of a data set mean, and applies what its user says about them.

A guess is made from the names and the robot that a data set states; `rynnvla_columns.json` beside the data set and the
config group `data.columns` override it. Every guess carries its reason, which `data inspect` prints.

Sources of the tables: LeRobot's robots and motor buses (`norm_mode`), releases 0.1 to 0.4.4; the public data sets of
ALOHA, Unitree G1, LIBERO (openpi) and GR00T.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.episode import DataError, Episodes
from rynnvla_jax import metadata
from rynnvla_jax.columns import GROUPS, UNKNOWN, ActionColumn, Column, Columns, groups
from rynnvla_jax.config import ColumnsConfig, ConfigError
from rynnvla_jax.errors import brief, did_you_mean, listing
from rynnvla_jax.metadata import Index, Name
from rynnvla_jax.storage import files

FILE = "rynnvla_columns.json"

_GRIPPER = re.compile(r"gripper|claw|\bjaw|夹爪|抓手|\bfinger|\bhand open|\bhand close")
_DEXTEROUS = re.compile(r"thumb|index|middle|ring|pinky|little")
_BODY = re.compile(r"shoulder|elbow|wrist|waist|forearm|hip|knee|ankle|torso|neck|head|joint|arm\b|base|rotate")
_ANGLE = re.compile(r"\b(roll|pitch|yaw)\b|euler")
_QUATERNION = re.compile(r"quat|\bq[wxyz]\b")
_ROTATION_VECTOR = re.compile(r"axis ?angle|rot ?vec|\baa\b")
_AXIS = re.compile(r"\b[xyz]$|\b(pos|position) ?[xyz]?$")
_DELTA = re.compile(r"\bdelta|^rel\b|relative")

_RANGE, _SHARE, _USUAL = "-100..100", "0..100", "usual for this robot"
_UNITS = {"position": "metres", "euler": "radians", "rotation_vector": "radians", "quaternion": "1"}  # usual ones
# Joint units by what LeRobot calls the robot; the first that matches. None: both units exist under this name.
_ROBOTS: tuple[tuple[str, str | None, str], ...] = (
    (r"^(bi_)?so_follower$", None, "LeRobot 0.4.3 records -100..100 under this name, 0.4.4 degrees"),
    (r"^(bi_)?(so|koch|omx)\w*_follower$", _RANGE, "LeRobot's default for this robot"),
    (r"^(so100|so101|koch|moss|lekiwi)\b", "degrees", "LeRobot before mid-2025"),
    (r"aloha|unitree|g1|h1|franka|panda|ur5|gr1|xarm|piper", "radians", _USUAL),
)


@dataclass(frozen=True)
class Meaning:
    """`columns` as they are used, and which recorded column each one is."""

    columns: Columns
    state: tuple[int, ...]
    action: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    """One column in `rynnvla_columns.json`. `column` numbers the recorded one; without it the name finds it. None keeps
    the guess; `pair` names a state column, "" keeps the action as recorded.
    """

    name: Name
    column: Index | None = None
    unit: Name | None = None
    kind: Name | None = None
    delta: bool | None = None
    pair: Name | None = None


@dataclass(frozen=True)
class _File:
    """`rynnvla_columns.json`; without a list of columns all are used."""

    robot: Name | None = None
    state: list[_Entry] | None = None
    action: list[_Entry] | None = None


def flat_names(names: Any, width: int, key: str, where: str) -> tuple[str, ...]:
    """Names of a vector's columns as data sets give them: a list, nested lists, {group: list}, {name: number}.

    () where there are none, or one name for several columns. Raises DataError when names and `width` disagree.
    """
    found = [_clean(name) for name in flatten(names)]
    if not found or (len(found) == 1 and width > 1):
        return ()
    if len(found) != width:
        raise DataError(
            f"{where}: feature {key} has {width} columns but {len(found)} names ({listing(found, 8)}); correct "
            "names or shape, or set names to null"
        )
    if odd := [name for name in found if not metadata.Printable().holds(name)]:
        raise DataError(f"{where}: feature {key} has a column called {brief(odd[0])}; give it a short name in one line")
    seen: dict[str, int] = {}
    for i, name in enumerate(found):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            found[i] = f"{name} ({seen[name]})"
    return tuple(found)


def flatten(names: Any, group: str = "") -> Iterable[str]:
    """The names in nested lists and dicts, in order; `group` is put before each."""
    if isinstance(names, Mapping):
        numbered = all(isinstance(v, int) and not isinstance(v, bool) for v in names.values())
        if numbered:
            yield from (f"{group}{name}" for name, _ in sorted(names.items(), key=lambda item: item[1]))
            return
        for name, inner in names.items():
            yield from flatten(inner, f"{group}{name}_" if len(names) > 1 else group)
    elif isinstance(names, list | tuple):
        for inner in names:
            yield from flatten(inner, group)
    elif names is not None:
        yield f"{group}{names}"


def _clean(name: str) -> str:
    """One spelling for the names that releases and converters give to the same column."""
    return name.strip().removesuffix(".pos").removeprefix("main_").replace(".", "_")


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
      largest: largest |value| of each state column, which tells degrees from -100..100.
      unnamed: what columns without names are called, before their number.
    """
    named = bool(state or action)
    if state and not action and widths[0] == widths[1]:
        action = state
    if action and not state and widths[0] == widths[1]:
        state = action
    state = state or [f"{unnamed[0]}{i}" for i in range(widths[0])]
    action = action or [f"{unnamed[1]}{i}" for i in range(widths[1])]
    joints, why = _joint_unit(robot, state, largest)
    gripper = _SHARE if re.search(r"so_?10[01]|so_follower|koch|lekiwi", robot) else UNKNOWN
    if not named and why == _USUAL:
        joints, why = UNKNOWN, "not stated"  # without names they may be no joints at all
    units = {**_UNITS, "joint": joints, "other": UNKNOWN, "gripper": gripper}
    states = _whole([_column(Column, name, units, why, named) for name in state])
    actions = _whole([_column(ActionColumn, name, units, why, named) for name in action])
    if not named and widths[1] and widths[0] == widths[1] and unnamed[0] == unnamed[1]:
        last = "columns have no names; the last one is taken for the gripper, as in SO100 data sets"
        states = (*states[:-1], replace(states[-1], kind="gripper", unit=gripper, why=last))
        actions = (*actions[:-1], replace(actions[-1], kind="gripper", unit=gripper, why=last))
    return Columns(robot, states, actions)


def _joint_unit(robot: str, names: Sequence[str], largest: np.ndarray | None) -> tuple[str, str]:
    """(unit of joints, reason)."""
    name = robot.removeprefix("lerobot:").lower()
    unit, why = next(((u, w) for pattern, u, w in _ROBOTS if re.search(pattern, name)), (UNKNOWN, "not stated"))
    joints = [i for i, column in enumerate(names) if _kind(column) == "joint"]
    if name.endswith("_follower") and largest is not None and joints:
        most = float(largest[joints].max())
        if most > 100.5:  # joints in -100..100 are clipped to that range
            return "degrees", f"a joint reaches {most:.4g}, beyond 100"
    return unit or UNKNOWN, why


def _kind(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.sub(r"[_\-./]+", " ", words)
    if _GRIPPER.search(words) and not _DEXTEROUS.search(words):
        return "gripper"
    if _QUATERNION.search(words):
        return "quaternion"
    if _ROTATION_VECTOR.search(words):
        return "rotation_vector"
    if _ANGLE.search(words) and not _BODY.search(words):
        return "euler"
    if _AXIS.search(words) and not re.search(r"\b(joint|motor|rot|r)\b", words):
        return "position"
    if (
        _BODY.search(words)
        or _ANGLE.search(words)
        or _DEXTEROUS.search(words)
        or re.search(r"\b(motor|j)\b|^(motor|j|q)\d", words)
    ):
        return "joint"
    return "other"


def _column(cls: type, name: str, units: Mapping[str, str], why: str, named: bool) -> Any:
    """One guessed column. `units` by kind; `why` says where the unit of joints comes from."""
    kind = _kind(name) if named else "joint" if units["joint"] != UNKNOWN else "other"
    reason = "by its name" if kind in _UNITS else f"kind by its name, unit: {why}"
    column = cls(name=name, unit=units[kind], kind=kind, why=reason)
    if cls is ActionColumn and kind != "gripper" and _DELTA.search(name.lower().replace("_", " ")):
        return replace(column, delta=True, why=f"{reason}; a difference by its name")
    return column


def _whole(columns: list[Any]) -> tuple[Any, ...]:
    """Without rotations of which the names show only a part."""
    for first, kind, size in groups(columns):
        if size != GROUPS[kind]:
            for i in range(first, first + size):
                why = f"its name says {kind}, but there are {size} of {GROUPS[kind]} columns"
                columns[i] = replace(columns[i], kind="other", unit=UNKNOWN, why=why)
    return tuple(columns)


def resolve(found: Columns, config: ColumnsConfig, root: Path) -> Meaning:
    """A guess with the file beside the data set and the config applied, and relative actions paired by name.

    Raises:
      ConfigError: `data.columns` names a column that there is not.
      DataError: the file does.
    """
    state: list[tuple[int, Any]] = list(enumerate(found.state))
    action: list[tuple[int, Any]] = list(enumerate(found.action))
    robot, pairs = found.robot, {}
    if (path := _beside(root)) is not None:
        stated = _read(path)
        robot = stated.robot if stated.robot is not None else robot
        state = _listed(state, stated.state, f"{path}: state")
        action = _listed(action, stated.action, f"{path}: action")
        pairs = {entry.name: entry.pair for entry in stated.action or () if entry.pair is not None}
    robot = config.robot or robot
    state = _chosen(state, config.state, "data.columns.state")
    action = _chosen(action, config.action, "data.columns.action")
    for name in config.grippers:
        _position(action, name, "data.columns.grippers")
    state = [(i, _overridden(i, column, config)) for i, column in state]
    action = [(i, _overridden(i, column, config)) for i, column in action]
    names = {column.name: position for position, (_, column) in enumerate(state)}
    paired = []
    for _, column in action:
        if (wanted := pairs.get(column.name)) is not None and wanted and wanted not in names:
            raise DataError(
                f"{path}: action {column.name!r} has the pair {wanted!r}, which is no state column; set one of "
                f"{listing(list(names), 20)}, or '' to keep it as recorded"
            )
        name = column.name if wanted is None else wanted
        target = not column.delta and column.kind != "gripper" and name in names
        alike = target and state[names[name]][1].kind == column.kind
        if wanted and not alike:
            kind = "a difference" if column.delta else f"of kind {column.kind}"
            raise DataError(
                f"{path}: action {column.name!r} is {kind}, and its pair {wanted!r} is of kind "
                f"{state[names[wanted]][1].kind}; give both the same kind, and no pair to differences and grippers"
            )
        paired.append(replace(column, pair=names[name] if alike else None))
    try:
        columns = Columns(robot, tuple(column for _, column in state), tuple(paired))
    except ConfigError as error:
        raise DataError(f"{root}: {error} (in {FILE} beside the data set, or with data.columns)") from None
    return Meaning(columns, tuple(i for i, _ in state), tuple(i for i, _ in action))


def _beside(root: Path) -> Path | None:
    folder = root if root.is_dir() else root.parent
    return folder / FILE if (folder / FILE).is_file() else None


def _read(path: Path) -> _File:
    try:
        return metadata.read(_File, path)
    except (OSError, files.DamagedFileError) as error:
        raise DataError(f"{error}; correct the file, or remove it") from None


def _position(columns: Sequence[tuple[int, Any]], name: str, where: str) -> int:
    """Where the column of this name, or number, stands in `columns`."""
    for names in ([column.name for _, column in columns], [str(number) for number, _ in columns]):
        if name in names:
            return names.index(name)
    known = [column.name for _, column in columns]
    error = ConfigError if where.startswith("data.") else DataError
    raise error(
        f"{where}: there is no column {name!r}; the columns are {listing(known, 30)}.{did_you_mean(name, known)}"
    )


def _chosen(columns: list[tuple[int, Any]], names: Sequence[str], where: str) -> list[tuple[int, Any]]:
    if not names:
        return columns
    if len(set(names)) < len(names):
        raise ConfigError(f"{where} names a column twice: {listing(list(names), 30)}; name each once")
    return [columns[_position(columns, name, where)] for name in names]


def _listed(columns: list[tuple[int, Any]], entries: list[_Entry] | None, where: str) -> list[tuple[int, Any]]:
    if entries is None:
        return columns
    out = []
    for entry in entries:
        number, column = columns[_position(columns, entry.name if entry.column is None else str(entry.column), where)]
        stated = {k: v for k in ("unit", "kind", "delta") if (v := getattr(entry, k)) is not None}
        if not isinstance(column, ActionColumn):
            stated.pop("delta", None)
        why = f"{FILE}" if stated else column.why
        out.append((number, replace(column, name=entry.name, why=why, **stated)))
    return out


def _overridden(number: int, column: Any, config: ColumnsConfig) -> Any:
    if isinstance(column, ActionColumn) and config.grippers:
        gripper = column.name in config.grippers or str(number) in config.grippers
        if gripper != (column.kind == "gripper"):
            kind = "gripper" if gripper else "joint"
            column = replace(column, kind=kind, why="data.columns.grippers")
    if config.unit and column.kind in ("joint", "other"):
        column = replace(column, unit=config.unit, why="data.columns.unit")
    if config.actions and isinstance(column, ActionColumn) and column.kind != "gripper":
        column = replace(column, delta=config.actions == "differences", why="data.columns.actions")
    return column


def questions(columns: Columns) -> list[str]:
    """What a guess leaves open, each with what answers it; [] if nothing."""
    out: list[str] = []
    if not columns.action:
        return out
    if unknown := [c.name for c in columns.action if c.unit == UNKNOWN and c.kind in ("joint", "other")]:
        out.append(
            f"the unit of {listing(unknown, 6)} is not stated; set data.columns.unit (degrees, radians, -100..100, ...)"
        )
    if not any(c.kind == "gripper" for c in columns.action) and any(c.kind != "position" for c in columns.action):
        out.append(
            "no action column is a gripper; if one is, name it in data.columns.grippers (else it is learnt as a "
            "difference)"
        )
    if not columns.relative and not all(c.delta or c.kind == "gripper" for c in columns.action):
        out.append(
            "no action column has a state column of the same name, so all actions are kept as recorded; if they are "
            f"absolute targets of the state's columns, pair them in {FILE}"
        )
    return out


def suspicions(source: Episodes, episodes: int = 3) -> list[str]:
    """What the first rows say against the declared meaning, one sentence for each; [] if nothing.

    A relative action should follow its state. Differences that were recorded as such do not: they are small, and have
    nothing to do with the state's value.
    """
    columns = source.columns
    if not columns.relative:
        return []
    read = []
    for i in range(min(episodes, len(source))):
        try:
            read.append(source[i])
        except DataError:
            continue  # whoever needs it says so
    read = [e for e in read if e.origin is None]
    if not read:
        return []
    state = np.concatenate([columns.origin(e.state) for e in read]).astype(np.float64)
    action = np.concatenate([e.action for e in read]).astype(np.float64)
    steps = np.concatenate([np.abs(np.diff(e.action, axis=0)) for e in read])
    if not len(steps):
        return []
    apart, step = np.abs(action - state).mean(0), steps.mean(0)
    odd = []
    for i in columns.relative:
        a, s = action[:, i], state[:, i]
        if min(a.std(), s.std()) < 1e-6 or columns.action[i].kind in ("euler", "quaternion", "rotation_vector"):
            continue
        if apart[i] > 10 * step[i] and abs(float(np.corrcoef(a, s)[0, 1])) < 0.5:
            odd.append(columns.action[i].name or str(i))
    if not odd:
        return []
    return [
        f"action {listing(odd, 6)} does not follow the state (|action - state| is more than ten times the change from "
        "step to step); if actions are recorded as differences, set data.columns.actions=differences"
    ]
