"""Safe reading of HDF5 files from other sources: numbers and texts only; links into other files are not followed."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.cut_off import remedy
from data_pipelines.episode import DataError
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

_OPEN_FILES = 4  # per thread
_FAULTS = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError)  # what h5py raises for damaged content
# No filter of HDF5's own compresses further; what was never stored reads as zeros of any number.
_COMPRESSION = 1100
_PLAIN = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM)
_LONGEST = 2**20  # bytes of an attribute
_local = threading.local()


@contextmanager
def opened(path: Path | str) -> Iterator[h5py.File]:
    """The file, open for reading. Raises DataError naming it when the file, or the part that is read, is damaged."""
    try:
        with h5py.File(path, "r", locking=False) as content:
            yield content
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(files.damage(path, f"cannot be read ({shorten(error)}); {remedy(path)}")) from None


def numbers(content: h5py.File, name: str) -> h5py.Dataset:
    """The dataset `name`. Raises DataError when it is missing, is not numeric or is stored in another file."""
    path, found = content.filename, _find(content, name)
    if found is None:
        raise DataError(f"{path} lacks {name}; copy it again if the original has it, or leave it out with data.exclude")
    if isinstance(found, h5py.SoftLink | h5py.ExternalLink):
        raise DataError(f"{path}: {name} is a link, and links are not followed; store the data itself")
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} is not numeric; copy it again")
    if found.external or found.is_virtual:
        raise DataError(f"{path}: {name} is stored in another file, which is not read; store the data itself")
    claimed, stored = found.size * found.dtype.itemsize, found.id.get_storage_size()
    if claimed > 2**20 + _COMPRESSION * stored:
        raise DataError(f"{path}: {name} claims {claimed} bytes but stores {stored}; copy it again")
    return found


def has(content: h5py.File, name: str) -> bool:
    """Whether an object called `name` exists; `numbers` then checks its type."""
    return _find(content, name) is not None


def _find(content: h5py.File, name: str) -> object:
    """The object `name`, or the link that leads away from it, or None."""
    node = content
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            return link
        node = node[part]
    return node


def members(content: h5py.File, name: str) -> list[str]:
    """Names of what is in the group `name`, in any order; [] where there is no such group."""
    found = _find(content, name)
    return list(found) if isinstance(found, h5py.Group) else []


def texts(content: h5py.File, name: str, group: str = "") -> tuple[str, ...]:
    """The texts of attribute `name` of the file or a group, one or several; () when it is missing or empty.

    Raises DataError for a type that is no text and no number: with a damaged one HDF5's library ends the process.
    """
    node = _find(content, group) if group else content
    if not isinstance(node, h5py.Group):
        return ()
    if name in node.attrs:
        attribute = node.attrs.get_id(name)
        if attribute.get_type().get_class() not in _PLAIN or attribute.get_storage_size() > _LONGEST:
            raise DataError(f"{content.filename}: attribute {name} is no text; write it again")
    values = np.asarray(node.attrs.get(name, ()), object).reshape(-1)
    plain = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    return tuple(v.strip() for v in plain if v.strip())


def close_files() -> None:
    """Closes the files that `rows` holds open in this thread."""
    kept = _local.__dict__.get("files", {})
    while kept:
        kept.popitem()[1].close()


def rows(path: str, name: str, indices: Sequence[int]) -> np.ndarray:
    """Rows of a dataset in the order of `indices`; the file stays open in this thread. Raises DataError."""
    kept = _local.__dict__.setdefault("files", OrderedDict())
    try:
        if path not in kept:
            kept[path] = h5py.File(path, "r", locking=False)
            if len(kept) > _OPEN_FILES:
                kept.popitem(last=False)[1].close()
        kept.move_to_end(path)
        dataset = numbers(kept[path], name)
        return np.stack([dataset[i] for i in indices])
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{path}: {name} cannot be read ({shorten(error)}); copy it again") from None


@dataclass(frozen=True)
class StoredFrames:
    """The frames of one episode in the dataset `key` of a file, uint8 [count, H, W, 3]; `bottom_first`: the first row
    of pixels is the lowest.
    """

    path: str
    key: str
    count: int
    height: int
    width: int
    bottom_first: bool = False

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] in the order of `indices`. Raises IndexError outside the episode, DataError as `rows`."""
        wanted = [int(i) for i in indices]
        if outside := [i for i in wanted if not 0 <= i < self.count]:
            raise IndexError(f"{self.path}: frame {outside[0]} is outside the episode's {self.count} frames")
        if not wanted:
            return np.zeros((0, self.height, self.width, 3), np.uint8)
        found = rows(self.path, self.key, wanted)
        return np.ascontiguousarray(found[:, ::-1]) if self.bottom_first else found
