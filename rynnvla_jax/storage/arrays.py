"""Safe reading of `.npy` files."""

import os

import numpy as np

from rynnvla_jax.errors import shorten


class DamagedArrayError(ValueError):
    """A file that is not one whole array of numbers; the message names it."""


def map_array(path: str | os.PathLike) -> np.ndarray:
    """The array in a .npy file, mapped from disk, not loaded. Nothing is unpickled.

    Raises FileNotFoundError, other OSErrors, or DamagedArrayError naming the file.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise DamagedArrayError(f"{os.fspath(path)} is not a whole .npy file of numbers ({shorten(error)})") from None
