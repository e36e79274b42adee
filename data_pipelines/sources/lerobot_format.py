"""The files of a LeRobot data set, v3.0, v2.1 and v2.0: what each must contain. The reader and `validate` share this.

    meta/info.json                            `Info`
    meta/episodes/chunk-000/file-000.parquet  v3.0: `episode_columns`, a row per episode
    meta/episodes.jsonl                       v2.1 and v2.0: `EpisodeLine`
    meta/tasks.parquet, meta/tasks.jsonl      `Task`
    data/.../*.parquet                        `read_rows`

v2.0 differs from v2.1 in its statistics only (meta/stats.json, not meta/episodes_stats.jsonl), which are not used.

Source: LeRobot data set formats v2.0, v2.1 and v3.0.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from data_pipelines import parquet_files
from data_pipelines.episode import DataError
from rynnvla_jax import metadata
from rynnvla_jax.config import DataConfig, LeRobotConfig
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.metadata import Between, Count, Entries, Index, Name, Text
from rynnvla_jax.storage import files

NUMBERS: dict[str, type[np.int64] | type[np.float64]] = {
    "episode_index": np.int64,
    "timestamp": np.float64,
    "task_index": np.int64,
}
# Not every converter writes these; where they are, they are checked.
OPTIONAL: dict[str, type[np.int64]] = {"frame_index": np.int64, "index": np.int64}
_CAMERA = "observation.images."
_LONGEST = 1000  # characters of a path
_FIELD_FORMAT = re.compile(r"(0?\d)?d?")
_TEMPLATE_FIELDS = {
    "v3": {"data_path": ("chunk_index", "file_index"), "video_path": ("video_key", "chunk_index", "file_index")},
    "v2": {
        "data_path": ("episode_chunk", "episode_index", "chunk_index", "file_index"),
        "video_path": ("video_key", "episode_chunk", "episode_index", "chunk_index", "file_index"),
    },
}
# What a converter may call the state or the action, where it does not use LeRobot's own name.
_LIKE = {"state": ("state", "qpos", "proprio"), "action": ("action",)}

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

    def camera_keys(self, config: DataConfig) -> dict[str, str]:
        """The key of every view that the config names, whether or not the data set has it."""
        extra = {v: v if v in self.features else f"{_CAMERA}{v}" for v in config.extra_views}
        return {"front": config.front, "wrist": config.wrist, **extra}

    def path(self, root: Path, template: str, **numbers: Any) -> Path:
        """The file that "data_path" or "video_path" means. Raises DataError for none, or one outside `root`."""
        if not getattr(self, template):
            raise DataError(f"{root}/meta/info.json: {template} is null, but videos are used; correct it")
        path = Path(getattr(self, template).format(**numbers))
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{root}/meta/info.json: {template} leads to {path}, outside the data set; correct it")
        return root / path

    def path_v2(self, root: Path, template: str, index: int, **more: str) -> Path:
        """The file of one episode of a v2 data set, which may also be numbered as v3.0 does. Raises as `path`."""
        chunk, number = divmod(index, self.chunks_size)
        numbers = {"episode_chunk": chunk, "episode_index": index, "chunk_index": chunk, "file_index": number}
        return self.path(root, template, **numbers, **more)


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


def read_info(root: Path, names: LeRobotConfig) -> Info:
    """meta/info.json. Raises DataError naming the field that cannot be used, or a feature of `names` that is absent."""
    path, info = root / "meta" / "info.json", read_features(root)
    keys = {"state": names.state, "action": names.action}
    if absent := {which: key for which, key in keys.items() if key not in info.features}:
        remedies = "; ".join(_other_feature(info, which) for which in absent)
        raise DataError(f"{path} has no feature {' and no feature '.join(absent.values())}; {remedies}")
    for which, key in keys.items():
        if not _is_vector(info.features[key]):
            raise DataError(f"{path}: feature {key} must be a vector; {_other_feature(info, which)}")
    fields = _TEMPLATE_FIELDS["v3" if info.v3 else "v2"]
    for template in ("data_path", "video_path"):
        if template == "video_path" and info.video_path is None:
            continue  # matters once a video is used
        if not _fillable(getattr(info, template), fields[template]):
            raise DataError(
                f"{path}: {template} is {metadata.shown(getattr(info, template))}, not a path with "
                f"{', '.join(f'{{{f}}}' for f in fields[template])}; correct it"
            )
    return info


def read_features(root: Path) -> Info:
    """meta/info.json, whatever its features are called. Raises DataError naming the field that cannot be used."""
    path = root / "meta" / "info.json"
    try:
        info = metadata.read(Info, path)
    except FileNotFoundError:
        raise DataError(f"{root} is not a LeRobot data set: meta/info.json is missing; correct data.source") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    except files.DamagedFileError as error:
        rate = " to the videos' frame rate (ffprobe FILE.mp4 prints it)" if f"{path}: fps is" in str(error) else ""
        raise DataError(f"{error}; correct it{rate}, or copy the data set again") from None
    if not info.v3 and info.codebase_version not in ("v2.1", "v2.0"):
        raise DataError(
            f"{path}: version {shorten(info.codebase_version, 50)} is not supported; "
            "convert the data set to v3.0 with LeRobot"
        )
    return info


def likely(info: Info, which: str) -> list[str]:
    """Features that may be the "state" or "action", by their names."""
    vectors = [k for k, f in info.features.items() if _is_vector(f) and k not in (*NUMBERS, *OPTIONAL)]
    return [k for k in vectors if any(word in k.lower().split(".")[-1] for word in _LIKE[which])]


def _is_vector(feature: Feature) -> bool:
    return len(feature.shape) == 1 and feature.shape[0] > 0 and feature.dtype.startswith(("float", "int"))


def _other_feature(info: Info, which: str) -> str:
    """The remedy where the feature of the "state" or "action" is absent: the one that must be it, or all vectors."""
    vectors = [k for k, f in info.features.items() if _is_vector(f) and k not in (*NUMBERS, *OPTIONAL)]
    if len(found := likely(info, which)) == 1:
        return f"{found[0]} is the only feature like it: set --config.data.lerobot.{which}={found[0]}"
    if not vectors:
        return "it has no feature that is a vector, so this data set cannot be used"
    return f"set --config.data.lerobot.{which} to one of {listing(found or vectors, 20)}"


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


EPISODE_COLUMNS: dict[str, Any] = {
    "episode_index": Index,
    "length": Count,
    "data/chunk_index": Index,
    "data/file_index": Index,
}


def video_columns(cameras: Sequence[str], *times: str) -> dict[str, Any]:
    """The columns of meta/episodes with the videos of these cameras; an episode without a camera has None there."""
    columns: dict[str, Any] = {}
    for key in cameras:
        columns |= {f"videos/{key}/{n}": Index | None for n in ("chunk_index", "file_index")}
        columns |= {f"videos/{key}/{n}": Seconds | None for n in ("from_timestamp", *times)}
    return columns


def episode_rows(path: Path, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of meta/episodes, not checked yet. A column of a video may be absent; its values are None.

    pandas writes a column of whole numbers with an empty value as floats with a NaN. Raises DataError.
    """
    videos = [c for c in columns if c.startswith("videos/")]
    needed = [c for c in columns if c not in videos]
    rows = parquet_files.read_table(path, needed, videos).to_pylist()
    for row in rows:
        for name in videos:
            value = row.setdefault(name, None)
            if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
                row[name] = None if math.isnan(value) else int(value)
    return rows


def lacking_video(row: Mapping[str, Any], key: str) -> str | None:
    """The first column without a value, where the episode of this row has no video of camera `key`."""
    names = [f"videos/{key}/{n}" for n in ("chunk_index", "file_index", "from_timestamp")]
    return next((name for name in names if row[name] is None), None)


def episode_tables(root: Path) -> list[Path]:
    """The parquet files of meta/episodes, in order."""
    found = (root / "meta" / "episodes").glob("*/*.parquet")
    return sorted(path for path in found if not path.name.startswith("._"))  # macOS's, beside the real ones


def task_column(path: Path) -> str:
    """The column of tasks.parquet with the text. Raises DataError if there is none."""
    names = parquet_files.column_names(path)
    # LeRobot makes the text the index of a pandas table, which pandas writes under the second name.
    text = next((c for c in ("task", "__index_level_0__") if c in names), None)
    if text is None or "task_index" not in names:
        raise DataError(f"{path} lacks the task text or task_index; {parquet_files.LACKING}")
    return text


def read_rows(path: Path, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The columns of a data file: `NUMBERS` [N], `OPTIONAL` [N] where present, state and action float32 [N, width].

    `widths` are those of the state and the action, by name. Raises DataError naming the column and the first row at
    fault.
    """
    table = parquet_files.read_table(path, [*NUMBERS, *widths], list(OPTIONAL))
    try:
        return columns(table, widths)
    except parquet_files.ColumnError as error:
        raise DataError(f"{path}: {error}; correct it, or copy the file again") from None


def columns(table: pa.Table, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """`read_rows` of a table that is read already. Raises ColumnError."""
    numbers = NUMBERS | {name: dtype for name, dtype in OPTIONAL.items() if name in table.column_names}
    out = {name: parquet_files.scalars(table, name, dtype) for name, dtype in numbers.items()}
    return out | {name: parquet_files.vectors(table, name, width) for name, width in widths.items()}


def jump(before: tuple[int, int] | None, episode: int, index: np.ndarray) -> int | None:
    """The first row at which `index` [N] of an episode does not count on, or None.

    `before`: the (episode, last `index`) that was read before; it says something about the next episode only.
    """
    start = before[1] + 1 if before and before[0] + 1 == episode else index[0]
    wrong = np.flatnonzero(index != start + np.arange(len(index)))
    return int(wrong[0]) if len(wrong) else None
