"""The files of a LeRobot data set, v3.0 and v2.1: what each must contain. The reader and `validate` share this module.

    meta/info.json                            `Info`
    meta/episodes/chunk-000/file-000.parquet  v3.0: `episode_columns`, a row per episode
    meta/episodes.jsonl                       v2.1: `EpisodeLine`
    meta/tasks.parquet, meta/tasks.jsonl      `Task`
    data/.../*.parquet                        `read_rows`

Source: LeRobot data set formats v2.1 and v3.0.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from data_pipelines import parquet_files
from data_pipelines.episode import DataError
from rynnvla_jax import metadata
from rynnvla_jax.errors import shorten
from rynnvla_jax.metadata import Between, Count, Entries, Index, Name, Text
from rynnvla_jax.storage import files

STATE, ACTION = "observation.state", "action"
NUMBERS: dict[str, type[np.int64] | type[np.float64]] = {
    "episode_index": np.int64,
    "frame_index": np.int64,
    "index": np.int64,
    "timestamp": np.float64,
    "task_index": np.int64,
}
_LONGEST = 1000  # characters of a path
_FIELD_FORMAT = re.compile(r"(0?\d)?d?")
_TEMPLATE_FIELDS = {
    "v3": {"data_path": ("chunk_index", "file_index"), "video_path": ("video_key", "chunk_index", "file_index")},
    "v2": {
        "data_path": ("episode_chunk", "episode_index"),
        "video_path": ("video_key", "episode_chunk", "episode_index"),
    },
}

Seconds = Annotated[float, Between(0, 2**31)]


@dataclass(frozen=True)
class Feature:
    """What info.json says of one column. `names` has several forms, see
    `data_pipelines.columns.flat_names`."""

    dtype: Name
    shape: Annotated[list[Annotated[int, Between(0, 2**31)]], Entries(0, 8)]
    names: Any = None


@dataclass(frozen=True)
class Info:
    """meta/info.json, of which only this is used."""

    codebase_version: str
    fps: Annotated[float, Between(1e-3, 1e4)]
    features: dict[Name, Feature]
    data_path: str
    video_path: str | None = None
    chunks_size: Annotated[int, Between(1, 2**31)] = 1000
    total_episodes: Count | None = None
    total_frames: Count | None = None
    total_tasks: Count | None = None
    total_videos: Count | None = None
    robot_type: Name | None = None
    rynnvla_unit: Name | None = None

    @property
    def v3(self) -> bool:
        return self.codebase_version.startswith("v3.")

    @property
    def robot(self) -> str:
        """The robot and its calibration."""
        return self.rynnvla_unit or f"lerobot:{self.robot_type or 'unknown'}"

    def width(self, key: str) -> int:
        """Values of the state or the action."""
        return self.features[key].shape[0]

    def cameras(self, *dtypes: str) -> list[str]:
        """Keys of the features that are stored as one of `dtypes`, "video" or "image"."""
        return [key for key, feature in self.features.items() if feature.dtype in dtypes]

    def path(self, root: Path, template: str, **numbers: Any) -> Path:
        """The file that "data_path" or "video_path" means. Raises DataError for one outside `root`."""
        path = Path(getattr(self, template).format(**numbers))
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{root}/meta/info.json: {template} leads to {path}, outside the data set; correct it")
        return root / path


@dataclass(frozen=True)
class EpisodeLine:
    """One line of meta/episodes.jsonl."""

    episode_index: Index
    length: Count


@dataclass(frozen=True)
class Task:
    """One instruction."""

    task_index: Index
    task: Text


def read_info(root: Path) -> Info:
    """meta/info.json. Raises DataError naming the field that cannot be used."""
    path = root / "meta" / "info.json"
    try:
        info = metadata.read(Info, path)
    except FileNotFoundError:
        raise DataError(f"{root} is not a LeRobot data set: meta/info.json is missing; correct data.source") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; correct it, or copy the data set again") from None
    if not info.v3 and info.codebase_version != "v2.1":
        raise DataError(
            f"{path}: version {shorten(info.codebase_version, 50)} is not supported; "
            "convert the data set to v3.0 with LeRobot"
        )
    for key in (STATE, ACTION):
        if key not in info.features or len(info.features[key].shape) != 1 or not info.width(key):
            raise DataError(f"{path}: feature {key} must be a vector; this data set cannot be used")
    fields = _TEMPLATE_FIELDS["v3" if info.v3 else "v2"]
    for template in ("data_path", "video_path") if info.cameras("video") else ("data_path",):
        if not _fillable(getattr(info, template), fields[template]):
            raise DataError(
                f"{path}: {template} is {metadata.shown(getattr(info, template))}, not a path with "
                f"{', '.join(f'{{{f}}}' for f in fields[template])}; correct it"
            )
    return info


def _fillable(template: str | None, known: tuple[str, ...]) -> bool:
    """Whether only known fields are in the template, and none asks for more than some digits."""
    try:
        parts = list(string.Formatter().parse(template or ""))
    except ValueError:
        return False
    if not template or not template.isprintable() or len(template) > _LONGEST:
        return False
    return all(
        name in known and not conversion and (not width or (name != "video_key" and _FIELD_FORMAT.fullmatch(width)))
        for _, name, width, conversion in parts
        if name is not None
    )


def episode_columns(cameras: list[str]) -> dict[str, Any]:
    """The columns of meta/episodes that are read, with the videos of these cameras."""
    columns: dict[str, Any] = {
        "episode_index": Index,
        "length": Count,
        "data/chunk_index": Index,
        "data/file_index": Index,
        "dataset_from_index": Count,
    }
    for key in cameras:
        columns |= {f"videos/{key}/{n}": Index for n in ("chunk_index", "file_index")}
        columns[f"videos/{key}/from_timestamp"] = Seconds
    return columns


def episode_tables(root: Path) -> list[Path]:
    """The parquet files of meta/episodes, in order."""
    return sorted((root / "meta" / "episodes").glob("*/*.parquet"))


def task_column(path: Path) -> str:
    """The column of tasks.parquet with the text. Raises DataError if there is none."""
    names = parquet_files.column_names(path)
    # LeRobot makes the text the index of a pandas table, which pandas writes under the second name.
    text = next((c for c in ("task", "__index_level_0__") if c in names), None)
    if text is None or "task_index" not in names:
        raise DataError(f"{path} lacks the task text or task_index; copy it again")
    return text


def read_rows(path: Path, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The columns of a data file: `NUMBERS` [N], and STATE and ACTION float32 [N, width].

    Raises DataError naming the column and the first row at fault.
    """
    table = parquet_files.read_table(path, [*NUMBERS, *widths])
    try:
        return columns(table, widths)
    except parquet_files.ColumnError as error:
        raise DataError(f"{path}: {error}; correct it, or copy the file again") from None


def columns(table: pa.Table, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """`read_rows` of a table that is read already. Raises ColumnError."""
    out = {name: parquet_files.scalars(table, name, dtype) for name, dtype in NUMBERS.items()}
    return out | {name: parquet_files.vectors(table, name, width) for name, width in widths.items()}
