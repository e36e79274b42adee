"""Safe reading of parquet files from other programs: tables, their columns and rows, with errors that name the file."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.cut_off import remedy
from data_pipelines.episode import DataError
from rynnvla_jax import metadata
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

T = TypeVar("T")

# A row group of this size is no longer read piece by piece; the pages of a damaged file claim any size.
_LARGEST = 2**34

# Many a converter never wrote what it left out.
LACKING = "copy it again if the original has it, else write the file again with it"


class ColumnError(ValueError):
    """A column that cannot be used, in a sentence without the file's name; `row` is the first row at fault, if one."""

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


def read_table(path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """The table, or only these columns of it, and those of `optional` that it has.

    Raises DataError for a file that is missing, damaged or lacks one of `columns`.
    """

    def read(file: pq.ParquetFile) -> pa.Table:
        if lacking := [c for c in columns or () if c not in file.schema_arrow.names]:
            raise DataError(f"{path} lacks column {', '.join(lacking)}; {LACKING}")
        groups = (file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if not all(0 <= size < _LARGEST for size in groups):
            raise DataError(f"{path} claims more than {_LARGEST} bytes in one row group; copy it again")
        wanted = columns and [*columns, *(c for c in optional if c in file.schema_arrow.names)]
        table = file.read(wanted)
        table.validate(full=True)  # offsets and texts of a damaged page are not checked as it is read
        return table

    return _opened(path, read)


def column_names(path: Path) -> list[str]:
    """The names of the columns. Raises DataError for a file that is missing or damaged."""
    return schema(path).names


def schema(path: Path) -> pa.Schema:
    """Names and types of the columns. Raises DataError for a file that is missing or damaged."""
    return _opened(path, lambda file: file.schema_arrow)


def reader(path: Path, **options: Any) -> pq.ParquetFile:
    """The open file, to be closed by the caller, with PyArrow's `options`. Raises DataError."""
    try:
        return pq.ParquetFile(path, **options)
    except Exception as error:
        raise _damage(path, error) from None


def rows(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows as {column: value}, of the columns described by `fields` (see `rynnvla_jax.metadata`).

    Raises DataError naming the file, the row (from 0) and the column at fault.
    """
    found = read_table(path, list(fields)).to_pylist()
    try:
        return [metadata.checked(fields, row, f"{path} row {i}") for i, row in enumerate(found)]
    except metadata.MetadataError as error:
        raise DataError(f"{error}; correct it, or copy the file again") from None


def scalars(table: pa.Table, name: str, dtype: type[np.int64] | type[np.float64]) -> np.ndarray:
    """A column of numbers, `dtype` [N]. Raises ColumnError for any other column."""
    kind = pa.from_numpy_dtype(dtype)
    return _whole(table, name, kind).to_numpy(zero_copy_only=False)


def vectors(table: pa.Table, name: str, width: int) -> np.ndarray:
    """A column of `width` numbers a row, float32 [N, width]. Raises ColumnError.

    Every row is checked: two rows of wrong widths may have as many numbers together as they should.
    """
    column = _whole(table, name, pa.list_(pa.float32()))
    widths = np.diff(column.offsets.to_numpy())
    if len(wrong := np.flatnonzero(widths != width)):
        where = "per row" if (widths == widths[0]).all() else f"at row {wrong[0]}"
        message = f"{name} has {widths[wrong[0]]} values {where} but meta/info.json states {width}"
        raise ColumnError(f"{message} ({len(wrong)} such rows)", int(wrong[0]))
    values = column.flatten()
    if values.null_count:
        row = int(np.argmax(values.is_null())) // width
        raise ColumnError(f"{name} has an empty value at row {row}", row)
    return values.to_numpy(zero_copy_only=False).reshape(-1, width)


def _whole(table: pa.Table, name: str, kind: pa.DataType) -> Any:
    """A column as one array of `kind` without nulls."""
    inner = table[name].type
    while pa.types.is_list(inner) or pa.types.is_fixed_size_list(inner) or pa.types.is_large_list(inner):
        inner = inner.value_type
    try:
        if not pa.types.is_integer(inner) and not pa.types.is_floating(inner):  # a text can be cast to a number, too
            raise NotImplementedError
        found = table[name].cast(kind).combine_chunks()
    except (pa.ArrowException, NotImplementedError):
        raise ColumnError(f"{name} is {table[name].type}, not {kind}") from None
    if found.null_count:
        row = int(np.argmax(found.is_null()))
        raise ColumnError(f"{name} has no value at row {row} ({found.null_count} such rows)", row)
    return found


def _opened(path: Path, read: Callable[[pq.ParquetFile], T]) -> T:
    try:
        source = io.BytesIO(path.read_bytes()) if files.is_bucket(path) else path
        with pq.ParquetFile(source) as file:
            return read(file)
    except DataError:
        raise
    except Exception as error:
        raise _damage(path, error) from None


def _damage(path: Path, error: Exception) -> DataError:
    """PyArrow raises errors of many kinds for damaged bytes."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist; copy the data set again")
    return DataError(files.damage(path, f"cannot be read ({shorten(error)}); {remedy(path)}"))
