"""msgpack with numpy arrays, the encoding of openpi's clients. Nothing is unpickled.

An array is the map {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}, a numpy scalar
{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}.
"""

import math
import re
from typing import Any

import msgpack
import numpy as np

from rynnvla_jax.deploy.observation import MessageError
from rynnvla_jax.errors import shorten

# An observation is one flat map of a few arrays. A byte can claim an empty map of 64 bytes, so that without these
# limits a message would take many times its size once unpacked.
_MAX_CONTAINERS = 64
_MAX_LENGTH = 256  # entries of one list or map
_MAX_AXES = 8
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


def pack(value: Any) -> bytes:
    """Maps, lists, text, numbers and numpy arrays of numbers -> one message. Raises TypeError for anything else."""
    return msgpack.packb(value, default=_pack_numpy)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`, for untrusted data. Arrays are read-only views into `data`.

    Raises:
      MessageError: not msgpack, an inconsistent array, or too many or too long maps and lists.
    """
    containers = 0

    def counted(value):
        nonlocal containers
        containers += 1
        if containers > _MAX_CONTAINERS:
            raise MessageError(f"the message has over {_MAX_CONTAINERS} maps and lists; send one flat map of arrays")
        return value

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda value: _unpack_numpy(counted(value)),
            list_hook=counted,
            max_array_len=_MAX_LENGTH,
            max_map_len=_MAX_LENGTH,
            max_ext_len=0,
        )
    except MessageError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise MessageError(f"the message cannot be unpacked ({shorten(error, 200)}); send one msgpack map") from error


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and not _DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"{value.dtype} cannot be sent; send numbers or bool")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent; send maps, lists, text, numbers and numpy arrays")


def _unpack_numpy(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
        if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > _MAX_AXES:
            raise MessageError("an array has no data or no shape; send both")
        if not all(type(edge) is int and edge >= 0 for edge in shape):
            raise MessageError(f"an array's shape is {str(shape)[:100]}; send sizes of at least 0")
        if (needed := math.prod(shape) * dtype.itemsize) != len(data):
            raise MessageError(f"an array of {dtype} {shape} needs {needed} bytes but {len(data)} were sent")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        number = value.get(b"data")
        if not isinstance(number, bool | int | float):
            raise MessageError(f"a numpy scalar contains {type(number).__name__}; send a number")
        try:
            return _dtype(value).type(number)
        except OverflowError as error:
            raise MessageError(f"a numpy scalar does not fit its type ({error})") from error
    return value


def _dtype(value: dict) -> np.dtype:
    name = value.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise MessageError(f"an array's dtype is {str(name)[:100]!r}; send numbers or bool, for example '|u1' or '<f4'")
    return np.dtype(name)
