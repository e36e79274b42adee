"""Pictures (PNG, JPEG) stored in a column of a Parquet file, decoded on request.

Memory does not grow with the file: of a column, PyArrow holds two or three pages, each of at most 1024 pictures as it
writes them, and this module 16 rows.

A column holds the bytes of a file, or {"bytes", "path"} as the `datasets` package writes it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import parquet_files
from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import picture

_OPEN_FILES = 2  # columns per thread: a front and a wrist camera
_ROWS = 16  # read at once: what is kept of a column
_BUFFER = 2**20  # bytes of the file
_local = threading.local()


@dataclass(frozen=True)
class ParquetPictures:
    """`count` pictures of `height` x `width` pixels: rows from `first` on of `column` of the Parquet file at `path`."""

    path: str
    column: str
    first: int
    count: int
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB, in the order of `indices` (0 is row `first`).

        Raises DataError naming the file, column and row of what is no picture or has another size.
        """
        wanted = [int(i) for i in indices]
        if outside := [i for i in wanted if not 0 <= i < self.count]:
            raise IndexError(f"{self.path}: {self.column} {outside[0]} is outside the episode's {self.count} rows")
        out = np.zeros((len(wanted), self.height, self.width, 3), np.uint8)
        for i in sorted(set(wanted)):
            found = _decoded(self.path, self.column, self.first + i)
            if found.shape != out.shape[1:]:
                size = f"{found.shape[0]} x {found.shape[1]} pixels, others {self.height} x {self.width}"
                raise DataError(f"{self.path}: {self.column} at row {self.first + i} has {size}; leave the episode out")
            out[[k for k, w in enumerate(wanted) if w == i]] = found
        return out


def size(path: Path, column: str, row: int) -> tuple[int, int]:
    """(height, width) of one picture. Raises DataError."""
    height, width, _ = _decoded(str(path), column, row).shape
    return height, width


def check_column(path: Path, column: str) -> None:
    """Raises DataError unless the file has a column of that name whose type can hold pictures."""
    if column not in (schema := parquet_files.schema(path)).names:
        raise DataError(
            f"{path} lacks column {column}; copy it again if the original has it, else choose another camera"
        )
    kind = schema.field(column).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not pa.types.is_binary(content) and not pa.types.is_large_binary(content):
        raise DataError(f"{path}: {column} is {kind}, not pictures (bytes, or a struct with bytes); write it again")


def close_files() -> None:
    """Closes the columns that this thread holds open."""
    readers = getattr(_local, "readers", {})
    while readers:
        readers.popitem()[1].close()


def _decoded(path: str, column: str, row: int) -> np.ndarray:
    name = f"{path}: {column} at row {row}"
    value = _reader(path, column).read(row)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{name} holds no bytes of a picture; store the picture itself, or leave the episode out")
    try:
        return picture(content, name)
    except ConfigError as error:
        raise DataError(f"{error}, or leave the episode out") from None


def _reader(path: str, column: str) -> "_Reader":
    if not hasattr(_local, "readers"):
        _local.readers = OrderedDict()
    readers, key = _local.readers, (path, column)
    if key in readers:
        readers.move_to_end(key)
    else:
        readers[key] = _Reader(path, column)
        if len(readers) > _OPEN_FILES:
            readers.popitem(last=False)[1].close()
    return readers[key]


class _Reader:
    """One open column. Rows are read in order within a row group; going back starts the group again."""

    def __init__(self, path: str, column: str):
        self._path, self._column = path, column
        check_column(Path(path), column)
        self._file = parquet_files.reader(Path(path), pre_buffer=False, buffer_size=_BUFFER)
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum(np.array(groups, np.int64))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group = -1
        self._first, self._rows = 0, pa.array([])  # the rows that are held, and the number of the first

    def close(self) -> None:
        self._file.close()

    def read(self, row: int) -> object:
        """The value of one row. Raises DataError."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group >= len(self._ends):
            raise DataError(f"{self._path} has no row {row}, so it was changed; start again")
        try:
            if group != self._group or row < self._first:
                self._batches = self._file.iter_batches(_ROWS, [group], [self._column], use_threads=False)
                self._first, self._rows = int(self._ends[group - 1]) if group else 0, pa.array([])
                self._group = group
            while row >= self._first + len(self._rows):
                self._first += len(self._rows)
                batch = next(self._batches)
                batch.validate(full=True)  # offsets of a damaged page are not checked as it is read
                self._rows = batch.column(0)
            return self._rows[row - self._first].as_py()
        except Exception as error:  # PyArrow raises errors of many kinds for damaged bytes
            self._group = -1
            where = f"{self._path}: {self._column} at row {row}"
            raise DataError(f"{where} cannot be read ({shorten(error)}); copy it again") from None
