"""Relative action chunks, their statistics, normalisation and back.

Source: arXiv 2509.15212, section 3.3. Actions are targets whose meaning `columns.Columns` states; a chunk holds
differences, except for the columns that are kept as recorded (grippers, and what has no state column of its own).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.columns import Columns, principal, without_jumps
from rynnvla_jax.config import PERCENTILES, ConfigError
from rynnvla_jax.storage import files

# A column that moves less than this carries nothing: it is centred, not divided by noise.
_CONSTANT = 1e-6
_ARRAYS = ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state")

_Percent = Annotated[float, metadata.Between(0, 100)]
_KINDS = {
    **dict.fromkeys(_ARRAYS, list[float]),
    "percentile_range": tuple[_Percent, _Percent],
}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one data set: relative actions over all rows of all chunks [A], state over all steps [S]; float64.

    `rel_min_action` and `rel_max_action` are the two `percentiles`. `columns` states what the columns mean.
    """

    rel_min_action: np.ndarray
    rel_max_action: np.ndarray
    rel_mean_action: np.ndarray
    rel_std_action: np.ndarray
    mean_state: np.ndarray
    std_state: np.ndarray
    columns: Columns
    percentiles: tuple[float, float] = PERCENTILES

    def to_json(self, path: str | Path) -> None:
        """Writes the public code's keys plus `columns` and `percentile_range`."""
        values: dict[str, Any] = {name: getattr(self, name).tolist() for name in _ARRAYS}
        values.update(columns=self.columns.to_json(), percentile_range=list(self.percentiles))
        files.write_json(files.place(path), values)

    @classmethod
    def from_json(cls, path: str | Path) -> "Statistics":
        """Raises ConfigError naming the file, the key and the remedy when a key is missing or has the wrong width."""
        try:
            values = files.read_json(files.place(path))
        except FileNotFoundError:
            raise ConfigError(
                f"statistics {path} do not exist; copy the training run's statistics.json to this path"
            ) from None
        except files.DamagedFileError as error:
            raise ConfigError(f"statistics {error}; copy the file again") from None
        except OSError as error:
            raise ConfigError(f"statistics {path} cannot be read ({error.strerror}); copy the file again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"statistics {path} are not a JSON object; copy the file again")
        for key in _ARRAYS:
            if key not in values:
                raise ConfigError(f"statistics {path} lack {key}; compute the statistics again")
        columns = values.get("columns")
        if columns is None:
            columns = _old_columns(values, f"statistics {path}")
        try:
            values = {"percentile_range": PERCENTILES, **values}  # older files and public ones have none
            values = metadata.checked(_KINDS, values, f"statistics {path}")
        except metadata.MetadataError as error:
            raise ConfigError(f"{error}; correct it, or compute them again") from None
        arrays = {name: np.asarray(values[name], np.float64) for name in _ARRAYS}
        for name in _ARRAYS:
            same = "mean_state" if name.endswith("_state") else "rel_mean_action"
            if (
                arrays[name].ndim != 1
                or arrays[name].shape != arrays[same].shape
                or not np.isfinite(arrays[name]).all()
            ):
                raise ConfigError(
                    f"statistics {path}: {name} is not a finite list as long as {same}; compute them again"
                )
        meaning = Columns.from_json(columns, f"statistics {path}: columns")
        for what, stated, name in (("state", meaning.state, "mean_state"), ("action", meaning.action, _ARRAYS[0])):
            if len(stated) != len(arrays[name]):
                raise ConfigError(
                    f"statistics {path}: columns describes {len(stated)} columns of {what} but {name} has "
                    f"{len(arrays[name])}; correct columns, or compute the statistics again"
                )
        return cls(**arrays, columns=meaning, percentiles=values["percentile_range"])


def _old_columns(values: dict[str, Any], where: str) -> dict[str, Any]:
    """What files of version 0.1 say of their columns: `unit`, which named the robot, and `absolute_columns`."""
    if "unit" not in values or "absolute_columns" not in values:
        raise ConfigError(
            f'{where} lack columns, the meaning of state and action; copy "columns" from what `rynnvla data stats '
            "SOURCE --json` prints for the data they were computed from"
        )
    try:
        kinds = {"unit": metadata.Name, "absolute_columns": list[metadata.Index]}
        found = metadata.checked(kinds, values, where)
    except metadata.MetadataError as error:
        raise ConfigError(f"{error}; correct it, or compute them again") from None
    widths = [len(values[name]) if isinstance(values[name], list) else 0 for name in ("mean_state", "rel_mean_action")]
    kept = found["absolute_columns"]
    if any(column >= widths[1] for column in kept):
        raise ConfigError(f"{where}: absolute_columns {kept} are outside the action; correct them")
    return Columns.unstated(found["unit"], widths[0], widths[1], kept).to_json()


def relative_chunk(action: np.ndarray, state: np.ndarray, start: int, chunk: int, columns: Columns) -> np.ndarray:
    """float32 [<= chunk, A]: row 0 is `action - state`, row k is `action[k] - action[k - 1]`, shorter at the end.

    `action` [N, A] and `state` [N, S] mean what `columns` says; columns that are kept hold the action itself.
    """
    return relative_chunks(action, state, np.array([start]), min(chunk, len(action) - start), columns)[0]


def relative_chunks(
    action: np.ndarray,
    state: np.ndarray,
    starts: np.ndarray,
    chunk: int,
    columns: Columns,
    origin: np.ndarray | None = None,
    world_to_camera: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [B, chunk, A]: the chunks of `relative_chunk` at all `starts` int [B], bit for bit.

    Steps after the last one of `action` [N, A] repeat it. `origin` [N, A] is where each step's motion starts, if that
    is not the state. With `world_to_camera` [N, 3, 3] each xyz triple is a displacement in the camera frame of the
    chunk's first step.
    """
    # Rounded to float32 before the subtraction, as in the public code: the chunks are the same to the last bit.
    steps = np.minimum(starts[:, None] + np.arange(chunk), len(action) - 1)
    rows = np.asarray(action[steps], np.float32)
    if columns.relative:
        first = columns.origin(state[starts]) if origin is None else origin[starts]
        path = without_jumps(np.concatenate([np.asarray(first, np.float32)[:, None], rows], axis=1), columns.action)
        relative = path[:, 1:] - path[:, :-1]
        relative[..., list(columns.kept)] = rows[..., list(columns.kept)]
        rows = relative
    if world_to_camera is None:
        return rows
    points = rows.reshape(*rows.shape[:2], -1, 3)
    axes = world_to_camera[starts][:, None, None]  # [B, 1, 1, 3, 3]
    # Added up in the order of x, y, z, whatever the number of chunks: the same bits in a batch and alone.
    turned = points[..., 0, None] * axes[..., 0] + points[..., 1, None] * axes[..., 1]
    return (turned + points[..., 2, None] * axes[..., 2]).reshape(rows.shape).astype(np.float32)


def pad_chunk(rows: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """([chunk, A] zero-padded at the end, is_pad bool [chunk])."""
    padded = np.zeros((chunk, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded, np.arange(chunk) >= len(rows)


def normalize_actions(x: np.ndarray, statistics: Statistics, mode: str = "mean_std") -> np.ndarray:
    """Relative actions [..., A] in the data's unit -> float32 [..., A].

    "mean_std" gives zero mean and unit deviation, "min_max" takes the two percentiles to -1..1; nothing is clipped.
    Source: public code; departure: constant columns become 0 instead of NaN.
    """
    offset, spread = _action_affine(statistics, mode)
    return ((np.asarray(x) - offset) / _divisor(spread)).astype(np.float32)


def unnormalize_actions(x: np.ndarray, statistics: Statistics, mode: str = "mean_std") -> np.ndarray:
    """Inverse of `normalize_actions`, float32 [..., A]. A constant column comes back as its constant."""
    return _unnormalize(np.asarray(x), statistics, mode).astype(np.float32)


def normalize_state(x: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Raw state [..., S] -> float32 of zero mean and unit deviation, whatever the mode of the actions."""
    return ((np.asarray(x) - statistics.mean_state) / _divisor(statistics.std_state)).astype(np.float32)


def decode_chunk(
    normalized: np.ndarray, state: np.ndarray, statistics: Statistics, mode: str = "mean_std"
) -> np.ndarray:
    """Normalised relative actions [C, A] and the raw current state [S] -> targets float32 [C, A].

    Un-normalises, sums the relative columns up and adds the state; columns that are kept are only un-normalised. Angles
    are within half a turn, quaternions have length 1.
    """
    chunk = _unnormalize(np.asarray(normalized, np.float64), statistics, mode)
    columns = statistics.columns
    return absolute(chunk, columns.origin(np.asarray(state, np.float64)), columns).astype(np.float32)


def absolute(relative: np.ndarray, origin: np.ndarray, columns: Columns) -> np.ndarray:
    """Relative chunks [..., C, A] in the data's unit and where they start [..., A] (`Columns.origin`) -> targets
    float64 [..., C, A], angles and quaternions as in `decode_chunk`."""
    # Summed in float64, so that the rounding of 20 steps does not add up.
    relative = np.asarray(relative, np.float64)
    out = np.cumsum(relative, axis=-2) + np.asarray(origin, np.float64)[..., None, :]
    out[..., list(columns.kept)] = relative[..., list(columns.kept)]
    return principal(out.reshape(-1, out.shape[-1]), columns.action).reshape(out.shape)


def _action_affine(statistics: Statistics, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(offset, spread) of the relative actions."""
    if mode == "mean_std":
        return statistics.rel_mean_action, statistics.rel_std_action
    if mode == "min_max":
        half = (statistics.rel_max_action - statistics.rel_min_action) / 2
        return (statistics.rel_min_action + statistics.rel_max_action) / 2, half
    raise ConfigError(f"normalisation is {mode!r}; choose 'mean_std' or 'min_max'")


def _divisor(spread: np.ndarray) -> np.ndarray:
    return np.where(spread > _CONSTANT, spread, 1.0)


def _unnormalize(x: np.ndarray, statistics: Statistics, mode: str) -> np.ndarray:
    offset, spread = _action_affine(statistics, mode)
    # What never moved in the data must not move by the decoder's noise.
    return x * np.where(spread > _CONSTANT, spread, 0.0) + offset
