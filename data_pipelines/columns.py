"""What the columns of a data set mean: a guess (`column_guess`), and what its user says about them.

`rynnvla_columns.json` beside the data set and the config group `data.columns` override the guess. Actions are then
paired with the state columns of their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.column_guess import TELLS_NO_KIND, UNNAMED, kind_of
from data_pipelines.episode import DataError, Episodes
from rynnvla_jax import metadata
from rynnvla_jax.columns import TURNS, UNKNOWN, ActionColumn, Columns
from rynnvla_jax.config import ColumnsConfig, ConfigError
from rynnvla_jax.errors import brief, did_you_mean, listing
from rynnvla_jax.metadata import Index, Name
from rynnvla_jax.storage import files

FILE = "rynnvla_columns.json"
_KEPT = f"{FILE}: no pair"  # why a column is kept that its user wants kept
_SHORT = {  # other words for a unit
    **dict.fromkeys(("deg", "degree"), "degrees"),
    **dict.fromkeys(("rad", "radian"), "radians"),
    **dict.fromkeys(("m", "meter", "meters", "metre"), "metres"),
}


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
    """`rynnvla_columns.json`; without a list of columns all are used. `unit` is that of all joints."""

    robot: Name | None = None
    unit: Name | None = None
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


def resolve(found: Columns, config: ColumnsConfig, root: Path) -> Meaning:
    """A guess with the file beside the data set and the config applied, and relative actions paired by name.

    Raises:
      ConfigError: `data.columns` names a column that there is not.
      DataError: the file does, or what was said contradicts itself.
    """
    state: list[tuple[int, Any]] = list(enumerate(found.state))
    action: list[tuple[int, Any]] = list(enumerate(found.action))
    robot, pairs, path = found.robot, {}, _beside(root)
    if path is not None:
        stated = _read(path)
        robot = stated.robot if stated.robot is not None else robot
        state, action = (_in_unit(columns, stated.unit or "", FILE) for columns in (state, action))
        state = _listed(state, stated.state, f"{path}: state")
        action = _listed(action, stated.action, f"{path}: action")
        pairs = {entry.name: entry.pair for entry in stated.action or () if entry.pair is not None}
    robot = config.robot or robot
    state = _chosen(state, config.state, "data.columns.state")
    action = _chosen(action, config.action, "data.columns.action")
    if config.grippers:
        where = "data.columns.grippers"
        grippers = {action[_position(action, name, where)][1].name for name in config.grippers}
        state, action = (_with_grippers(columns, grippers) for columns in (state, action))
    state, action = (_in_unit(columns, config.unit, "data.columns.unit") for columns in (state, action))
    if config.actions:
        delta, why = config.actions == "differences", "data.columns.actions"
        action = [(i, c if c.kind == "gripper" else replace(c, delta=delta, why=why)) for i, c in action]
    states = [column for _, column in state]
    try:
        paired = tuple(replace(column, pair=_pair(column, states, pairs.get(column.name))) for _, column in action)
        columns = Columns(robot, tuple(states), paired)
    except ConfigError as error:
        raise DataError(f"{path or root}: {error}") from None
    return Meaning(columns, tuple(i for i, _ in state), tuple(i for i, _ in action))


def _pair(column: ActionColumn, states: Sequence[Any], wanted: str | None) -> int | None:
    """The state column that a relative action starts from: `wanted`, or that of its name. Raises ConfigError."""
    names = [state.name for state in states]
    if wanted and wanted not in names:
        raise ConfigError(
            f"action {column.name!r} has the pair {wanted!r}, which is no state column; set one of "
            f"{listing(names, 20)}, or '' to keep it as recorded"
        )
    if column.kind == "gripper" or column.delta:
        if wanted:
            what = "a gripper" if column.kind == "gripper" else "a difference"
            raise ConfigError(f"action {column.name!r} is {what} and is kept as recorded; take its pair {wanted!r} out")
        return None
    name = column.name if wanted is None else wanted
    if name not in names:
        return None
    state = states[names.index(name)]
    if state.kind != column.kind:
        raise ConfigError(
            f"action {column.name!r} is of kind {column.kind}, but the state {name!r} of kind {state.kind}; state the "
            f"same kind for both, or give the action the pair '' in {FILE} to keep it as recorded"
        )
    if UNKNOWN not in (state.unit, column.unit) and state.unit != column.unit:
        raise ConfigError(
            f"action {column.name!r} is in {column.unit}, but the state {name!r} in {state.unit}; a relative action "
            f"has one unit: state it for both, or give the action the pair '' in {FILE} to keep it as recorded"
        )
    return names.index(name)


def _beside(root: Path) -> Path | None:
    folder = root if root.is_dir() else root.parent
    return folder / FILE if (folder / FILE).is_file() else None


def _read(path: Path) -> _File:
    try:
        found, content = metadata.read(_File, path), files.read_json(path)
    except (OSError, files.DamagedFileError) as error:
        raise DataError(f"{error}; correct the file, or remove it") from None
    _check_keys(_File, content, str(path))
    for part in ("state", "action"):
        for i, entry in enumerate(content.get(part) or ()):
            _check_keys(_Entry, entry, f"{path}: {part}[{i}]")
    return found


def _check_keys(cls: type, content: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a key that nothing reads: a slip would change the meaning without a word."""
    known = [field.name for field in fields(cls)]
    if unknown := [key for key in content if key not in known]:
        hint = did_you_mean(unknown[0], known, otherwise=f" The keys are {', '.join(known)}.")
        raise DataError(f"{where} has the unknown key {brief(unknown[0])}; correct or remove it.{hint}")


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
    if not entries:
        raise DataError(f"{where} is an empty list; leave it out to use all columns")
    out: list[tuple[int, Any]] = []
    for entry in entries:
        number, column = columns[_position(columns, entry.name if entry.column is None else str(entry.column), where)]
        stated = {k: v for k in ("unit", "kind", "delta") if (v := getattr(entry, k)) is not None}
        if not isinstance(column, ActionColumn):
            stated.pop("delta", None)
        if "unit" in stated:
            stated["unit"] = _SHORT.get(stated["unit"], stated["unit"])
        why = f"{FILE}" if stated else column.why
        why = _KEPT if entry.pair == "" else why
        if number in [n for n, _ in out]:
            raise DataError(f"{where}: two entries are of recorded column {number}; list each once")
        out.append((number, replace(column, name=entry.name, why=why, **stated)))
    return out


def _in_unit(columns: list[tuple[int, Any]], unit: str, why: str) -> list[tuple[int, Any]]:
    """Joints, what is of no known kind and, if `unit` is one of angles, angles in `unit`; "" changes nothing."""
    unit = _SHORT.get(unit, unit)
    kinds = ("joint", "other", "euler", "rotation_vector") if unit in TURNS else ("joint", "other")
    out = []
    for number, column in columns:
        if unit and column.kind in kinds:
            still_asked = column.why.startswith(TELLS_NO_KIND)  # the unit does not answer that
            column = replace(column, unit=unit, why=f"{TELLS_NO_KIND}; unit: {why}" if still_asked else why)
        out.append((number, column))
    return out


def _with_grippers(columns: list[tuple[int, Any]], names: set[str]) -> list[tuple[int, Any]]:
    """Those of `names` are grippers and no others, which are then what their name tells, or what most columns are."""
    why = "data.columns.grippers"
    others: list[Any] = [c for _, c in columns if c.kind != "gripper"]
    usual = max(others, key=lambda c: sum(c.kind == other.kind for other in others), default=None)
    out: list[tuple[int, Any]] = []
    for number, column in columns:
        if column.name in names:
            unit = column.unit if column.kind == "gripper" else UNKNOWN
            column = replace(column, kind="gripper", unit=unit, why=why)
        elif column.name not in names and column.kind == "gripper":
            kind = kind_of(column.name, gripper=False)
            like = next((c for c in others if c.kind == kind), usual)
            column = replace(column, kind=like.kind if like else "other", unit=like.unit if like else UNKNOWN, why=why)
        out.append((number, column))
    return out


def questions(columns: Columns, stored: bool = False) -> list[str]:
    """What a guess leaves open, each with what answers it; [] if nothing. `stored`: a corpus holds these columns."""
    remedy = " (of the data that the corpus is made from; then make it again)" if stored else ""
    return [question + remedy for question in _questions(columns)]


def _questions(columns: Columns) -> list[str]:
    out: list[str] = []
    if not columns.action:
        return out
    kept = [c for c in columns.action if c.pair is None and not c.delta and c.kind != "gripper" and c.why != _KEPT]
    if turns := [c.name for c in columns.action if c.why.startswith(TELLS_NO_KIND)]:
        out.append(
            f"{listing(turns, 6)} are a rotation of a kind that names do not tell, so a turn is learnt as a motion; "
            f"say in {FILE}, which lists all columns to use, whether they are euler, rotation_vector or quaternion, in "
            "state and action"
        )
    if unknown := [c.name for c in columns.action if c.unit == UNKNOWN and c.kind in ("joint", "other")]:
        out.append(
            f"the unit of {listing(unknown, 6)} is not stated; set data.columns.unit (degrees, radians, -100..100), or "
            f'"unit" in {FILE} for this data set alone'
        )
    otherwise = "they are learnt as differences" if columns.relative else "they are kept as recorded, like all columns"
    grippers = [c.name for c in columns.action if c.kind == "gripper"]
    if not grippers and any(c.kind != "position" for c in columns.action):
        out.append(f"no action column is a gripper; name those that are in data.columns.grippers, else {otherwise}")
    elif any(c.why.startswith(UNNAMED) for c in columns.action):
        out.append(
            "columns have no names, so the last one is taken for the only gripper; name all grippers by their "
            f"numbers, as in data.columns.grippers=('{len(columns.action) - 1}',), or if there is none, give all kinds "
            f"in {FILE}"
        )
    elif grippers:
        for side in sorted({_side(c.name) for c in columns.action} - {_side(name) for name in grippers} - {""}):
            out.append(f"no gripper is found on the {side}; if there is one, name all in data.columns.grippers")
    if kept and not columns.relative:
        out.append(
            "no action column has a state column of the same name, so all actions are kept as recorded; if they are "
            f"absolute targets of the state's columns, pair them in {FILE}, which lists all columns to use"
        )
    elif kept:
        names = listing([c.name for c in kept], 6)
        out.append(
            f"no state column has the name of action {names}, so it is kept as recorded; if it is a target of one, "
            f"pair it in {FILE}, which lists all columns to use"
        )
    return out


def _side(name: str) -> str:
    """ "left", "right" or ""."""
    return next((side for side in ("left", "right") if side in name.lower()), "")


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
    inside = np.concatenate([np.arange(len(e)) < len(e) - 1 for e in read])[:-1]  # steps within an episode
    if not inside.any():
        return []
    odd = []
    for i in columns.relative:
        a, s, column = action[:, i], state[:, i], columns.action[i]
        if column.kind in ("quaternion", "rotation_vector"):
            continue
        if column.kind == "euler":
            turn = TURNS[column.unit]
            s = np.unwrap(s, period=turn)
            a = s + (a - s + turn / 2) % turn - turn / 2
        moves = np.diff(s)[inside]
        if min(a.std(), s.std(), moves.std()) < 1e-6:
            continue
        far = np.abs(a - s).mean() > 10 * np.abs(np.diff(a)[inside]).mean()
        like_moves = _correlation(a[:-1][inside], moves) > max(0.3, _correlation((a - s)[:-1][inside], moves))
        if _correlation(a, s) < 0.5 and (far or like_moves):
            odd.append(column.name or str(i))
    if not odd:
        return []
    return [
        f"action {listing(odd, 6)} does not follow the state, but looks like its changes from step to step; if actions "
        "are recorded as differences, set data.columns.actions=differences"
    ]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of them is constant."""
    return abs(float(np.corrcoef(a, b)[0, 1])) if min(a.std(), b.std()) > 0 else 0.0
