"""An observation of a robot, as arguments of `act` and as a message. numpy only."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from rynnvla_jax.columns import UNKNOWN, Column, Columns, describe, difference
from rynnvla_jax.config import VIEW, ConfigError
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.errors import did_you_mean

# Keys of a message; openpi's names where openpi has one.
KEYS = {
    "front": "observation/image",  # uint8 [H, W, 3] RGB
    "wrist": "observation/wrist_image",  # the same; absent for a policy without a wrist camera
    "state": "observation/state",  # float [state_dim], raw; absent for a policy without a state
    "instruction": "prompt",  # str
    "columns": "observation/columns",  # map, optional: `Columns.to_json` of the robot; others are refused
}
_OPTIONAL = ("wrist", "columns")
_EXTRA = re.compile(rf"observation/views/({VIEW})")  # of an extra view: as the front camera's
MAX_EDGE = 4096  # pixels
MAX_TEXT = 1000  # characters; attention is quadratic in tokens


NO_VIEWS: Mapping[str, np.ndarray] = MappingProxyType({})


class MessageError(PolicyError):
    """A message that is not an observation; the message names the key at fault and the remedy."""


class Observation(NamedTuple):
    """Arguments of `act`, in its order."""

    front: np.ndarray  # uint8[H, W, 3] RGB
    wrist: np.ndarray | None  # the same; None for a policy without a wrist camera
    state: np.ndarray | None  # float[state_dim], raw; None for a policy without a state
    instruction: str
    columns: Columns | None = None  # of the robot; None: the caller vouches for the meaning of state and targets
    extra_views: Mapping[str, np.ndarray] = NO_VIEWS  # by name of data.extra_views, as `front`

    @property
    def frames(self) -> dict[str, np.ndarray]:
        """The frames that are given, by view."""
        wrist = {} if self.wrist is None else {"wrist": self.wrist}
        return {"front": self.front, **wrist, **self.extra_views}


class Acts(Protocol):
    """The interface of a policy: `policy.Policy`, `remote.RemotePolicy`, or another project's policy.

    One that knows how its data were recorded has a `recording`, too.
    """

    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray | None,
        instruction: str,
        columns: Columns | None = None,
        extra_views: Mapping[str, np.ndarray] = NO_VIEWS,
    ) -> np.ndarray:
        """Absolute targets float[C, A] for the next C steps. Raises PolicyError."""
        ...


def check_columns(policy: Columns, robot: Columns | None) -> None:
    """Raises PolicyError when state and targets of a robot mean something else than the policy learnt."""
    differ = difference(policy, robot) if robot is not None else ""
    if differ and UNKNOWN in differ:
        raise PolicyError(
            f"the policy and the robot differ in what columns mean: {differ} (the policy's first); where the policy's "
            "data did not state a unit, set data.columns.unit and train again, or give the robot's columns the unit "
            "'unknown' if you know that it is the same"
        )
    if differ:
        raise PolicyError(
            f"the policy and the robot differ in what columns mean: {differ} (the policy's first); convert the state "
            "and the returned targets, or use a policy that was trained on this robot's data"
        )


def checked_state(state: Any, columns: Sequence[Column]) -> np.ndarray:
    """A robot's raw state as float32 [S], finite, of the policy's state `columns`; empty where these are none.

    Raises PolicyError.
    """
    expected = f"float[{len(columns)}] ({describe(columns)})"
    if not columns:
        if state is not None and np.size(state):
            raise PolicyError("state is given but this policy reads none; pass None")
        return np.zeros(0, np.float32)
    if state is None:
        raise PolicyError(f"state is missing; give {expected}")
    try:
        raw = np.asarray(state, np.float32)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"state is not numbers ({error}); give {expected}") from error
    if raw.shape != (len(columns),):
        raise PolicyError(f"state has shape {raw.shape}; give {expected}")
    if not np.isfinite(raw).all():
        raise PolicyError(f"state is not finite at index {np.flatnonzero(~np.isfinite(raw)).tolist()}; check the robot")
    return raw


def view_key(view: str) -> str:
    """The key of a camera's frame in a message."""
    return KEYS[view] if view in ("front", "wrist") else f"observation/views/{view}"


def check_views(policy: tuple[str, ...], frames: Mapping[str, np.ndarray]) -> None:
    """Raises PolicyError when `frames` are not those of the policy's cameras."""
    if missing := [view for view in policy if view not in frames]:
        raise PolicyError(f"{missing[0]} image is missing; this policy was trained with {', '.join(policy)}")
    if extra := [view for view in frames if view not in policy]:
        remedy = "pass None" if extra[0] == "wrist" else "leave it out of extra_views"
        raise PolicyError(f"{extra[0]} image is given but this policy has no {extra[0]} camera; {remedy}")


def frame_shape(text: str) -> tuple[int, int]:
    """ "480x640" -> (height, width). Raises PolicyError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(1 <= int(edge) <= MAX_EDGE for edge in found.groups()):
        raise PolicyError(f"--frame {text} is not HEIGHTxWIDTH of 1 to {MAX_EDGE} pixels, such as 480x640")
    return int(found[1]), int(found[2])


def to_message(observation: Observation) -> dict[str, Any]:
    """The message for a server; values of None are left out."""
    values = {KEYS[k]: v for k, v in observation._asdict().items() if k in KEYS and v is not None}
    values |= {view_key(view): frame for view, frame in observation.extra_views.items()}
    if observation.columns is not None:
        values[KEYS["columns"]] = observation.columns.to_json()
    return values


def from_message(message: Any, stateless: bool = False) -> Observation:
    """The inverse of `to_message`, for untrusted data: types and sizes are checked, values are not. A message for a
    `stateless` policy needs no state.

    Raises:
      MessageError: not a map, an unknown or missing key, a wrong type, or a value that is too large.
    """
    if not isinstance(message, Mapping):
        raise MessageError(f"the message is {type(message).__name__}, expected a map with {_names()}")
    extra = {}
    for key in message:
        if isinstance(key, str) and (view := _EXTRA.fullmatch(key)):
            extra[view[1]] = message[key]
        elif key not in KEYS.values():
            hint = did_you_mean(str(key), KEYS.values(), otherwise=f" The keys are {_names()}.")
            raise MessageError(f"unknown key {str(key)[:100]!r}.{hint}")
    optional = (*_OPTIONAL, *(("state",) if stateless else ()))
    values: dict[str, Any] = {name: message.get(key) for name, key in KEYS.items()}
    if missing := [KEYS[name] for name in KEYS if values[name] is None and name not in optional]:
        raise MessageError(f"the message lacks {', '.join(missing)}; the keys are {_names()}")
    values["extra_views"] = extra
    images = {"front": values["front"], **({} if values["wrist"] is None else {"wrist": values["wrist"]}), **extra}
    for camera, image in images.items():
        _check_image(view_key(camera), image)
    state = values["state"]
    if isinstance(state, list | tuple):
        values["state"] = state = _numbers(state)
    if state is not None and not (isinstance(state, np.ndarray) and state.dtype.kind in "iuf" and state.ndim == 1):
        raise MessageError(f"{KEYS['state']} is {_kind(state)}, expected one list of numbers")
    text, columns = values["instruction"], values["columns"]
    if not isinstance(text, str):
        raise MessageError(f"{KEYS['instruction']} is {_kind(text)}, expected text")
    if len(text) > MAX_TEXT:
        raise MessageError(f"{KEYS['instruction']} has {len(text)} characters, the limit is {MAX_TEXT}; shorten it")
    if columns is not None:
        try:
            values["columns"] = Columns.from_json(columns, KEYS["columns"])
        except ConfigError as error:
            raise MessageError(str(error)) from None
    return Observation(**values)


def _check_image(key: str, image: Any) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise MessageError(f"{key} is {_kind(image)}, expected uint8 [height, width, 3] (RGB, 0..255)")
    if not 1 <= min(image.shape[:2]) <= max(image.shape[:2]) <= MAX_EDGE:
        raise MessageError(
            f"{key} has {image.shape[0]} x {image.shape[1]} pixels, expected 1 to {MAX_EDGE} per edge; resize it"
        )


def _numbers(values: list | tuple) -> np.ndarray:
    if not all(isinstance(v, int | float) for v in values):
        raise MessageError(f"{KEYS['state']} has elements that are not numbers; send a flat list or array of floats")
    try:
        return np.array(values, np.float64)
    except OverflowError as error:
        raise MessageError(f"{KEYS['state']} has a number that cannot be a float ({error}); check the robot") from error


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _names() -> str:
    return ", ".join(f"{key} (optional)" if name in _OPTIONAL else key for name, key in KEYS.items())
