"""LeRobot data sets, v3.0 and v2.1, read with PyArrow and PyAV; LeRobot itself is not needed.

Unit: key `rynnvla_unit` of meta/info.json where present, else "lerobot:<robot_type>". LeRobot's joint calibration
changed in mid-2025 (signs and 90 degree offsets), which the files do not show: add `rynnvla_unit` to old data sets.

Source: LeRobot data set formats v2.1 and v3.0. The metadata of published data sets are often wrong, so they are checked
against the rows and the videos, and LeRobot's own statistics are not used.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.sources.exclude import left_in
from data_pipelines.video import ClipRequest, open_clips
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

STATE, ACTION = "observation.state", "action"
_COLUMNS = (STATE, ACTION, "timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class _Record:
    """Metadata of one episode: `first` row in the whole data set, and (path, start in seconds) by view."""

    index: int
    length: int
    first: int
    data: Path
    videos: dict[str, tuple[Path, float]]


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes in order. Raises DataError naming the faulty file, ConfigError for cameras that do not exist."""
    info = _read_info(root)
    version = str(info["codebase_version"])
    keys = _camera_keys(root, info, config, views)
    if version.startswith("v3."):
        records, tasks = _records_v3(root, info, keys), _tasks_v3(root)
    elif version == "v2.1":
        records, tasks = _records_v21(root, info, keys), _tasks_v21(root)
    else:
        raise DataError(
            f"{root}/meta/info.json: version {version} is not supported; convert the data set to v3.0 with LeRobot"
        )
    if not records:
        raise DataError(f"{root} contains no episode; record episodes or correct data.source")
    records.sort(key=lambda r: r.index)
    for name, stated, counted in (
        ("total_episodes", info.get("total_episodes"), len(records)),
        ("total_frames", info.get("total_frames"), sum(r.length for r in records)),
    ):
        if stated is not None and stated != counted:
            raise DataError(f"{root}/meta/info.json: {name} is {stated} but the episodes have {counted}; correct it")
    absolute = _absolute_columns(info)
    unit = str(info.get("rynnvla_unit") or f"lerobot:{info.get('robot_type') or 'unknown'}")
    fps = float(info["fps"])
    source = f"lerobot:{root}"
    keep = left_in(source, [_name(r) for r in records], config)
    records, requests = _clip_requests(records, set(keep), keys, fps, root)
    clips = open_clips([r for per_view in requests for r in per_view], root.name, progress)
    rows = _Rows(info, root)
    episodes = []
    for i, record in enumerate(progress_bar(records, desc=f"{root.name}: episodes", show=progress)):
        table = rows.of(record, fps)
        task_ids, text_of = np.unique(table["task_index"], return_inverse=True)
        missing = [t for t in task_ids.tolist() if t not in tasks]
        if missing:
            raise DataError(f"{record.data}: task_index {missing[0]} is not in {root}/meta/tasks; add it")
        episodes.append(
            Episode(
                name=_name(record),
                texts=tuple(tasks[t] for t in task_ids.tolist()),
                text_of=text_of.astype(np.int32),
                fps=fps,
                state=table[STATE],
                action=table[ACTION],
                unit=unit,
                absolute=absolute,
                views={view: clips[i * len(keys) + v] for v, view in enumerate(keys)},
            )
        )
    return Episodes.of(episodes, source)


def _name(record: _Record) -> str:
    return f"episode_{record.index:06d}"


def _read_info(root: Path) -> dict:
    path = root / "meta" / "info.json"
    try:
        info = files.read_json(path)
    except FileNotFoundError:
        raise DataError(f"{root} is not a LeRobot data set: meta/info.json is missing; correct data.source") from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; copy it again") from None
    for key in ("codebase_version", "fps", "features", "data_path"):
        if key not in info:
            raise DataError(f"{path} lacks {key}; copy the data set again")
    widths = []
    for key in (STATE, ACTION):
        feature = info["features"].get(key)
        if feature is None or len(feature["shape"]) != 1:
            raise DataError(f"{path}: feature {key} must be a vector; this data set cannot be used")
        widths.append(feature["shape"][0])
    if widths[0] != widths[1]:
        raise DataError(
            f"{path}: {STATE} has {widths[0]} values and {ACTION} has {widths[1]}; "
            "relative actions need the same joints in both"
        )
    return info


def _camera_keys(root: Path, info: dict, config: DataConfig, views: tuple[str, ...] | None) -> dict[str, str]:
    cameras = [k for k, f in info["features"].items() if f["dtype"] in ("video", "image")]
    known = {view: getattr(config, view) for view in ("front", "wrist")}
    keys = {view: known[view] for view in (known if views is None else views)}
    if views is None:
        keys = {view: key for view, key in keys.items() if key in cameras}
    for view, key in keys.items():
        if key not in cameras:
            raise ConfigError(
                f"data.{view} is {key!r}, which {root} does not have; it has {', '.join(cameras) or 'no cameras'}"
            )
        if info["features"][key]["dtype"] != "video":
            raise DataError(f"{root}: {key} is stored as images; record it as video, or convert it to video")
    return keys


def _absolute_columns(info: dict) -> tuple[int, ...]:
    """Columns named gripper; without names, the last column, as in every SO100 data set."""
    names = info["features"][ACTION].get("names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if not names:
        return (info["features"][ACTION]["shape"][0] - 1,)
    return tuple(i for i, name in enumerate(names) if "gripper" in str(name).lower())


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy the data set again") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({shorten(error)}); copy it again") from None


def _read_lines(path: Path) -> list[dict]:
    try:
        return files.read_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy the data set again") from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; copy it again") from None


def _records_v3(root: Path, info: dict, keys: dict[str, str]) -> list[_Record]:
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{root}/meta/episodes contains no parquet file; copy the data set again")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for key in keys.values():
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    records = []
    for file in paths:
        present = set(_schema(file))
        if missing := [c for c in columns if c not in present]:
            raise DataError(f"{file} lacks column {missing[0]}; copy the data set again")
        for row in _read_table(file, columns).to_pylist():
            videos = {}
            for view, key in keys.items():
                numbers = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index", "from_timestamp")}
                if any(v is None for v in numbers.values()):
                    raise DataError(f"{file}: episode {row['episode_index']} has no video of {key}; remove the episode")
                path = info["video_path"].format(video_key=key, **numbers)
                videos[view] = (root / path, numbers["from_timestamp"])
            data = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            first = row["dataset_from_index"]
            records.append(_Record(row["episode_index"], row["length"], first, root / data, videos))
    return records


def _schema(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({shorten(error)}); copy it again") from None


def _records_v21(root: Path, info: dict, keys: dict[str, str]) -> list[_Record]:
    records, first = [], 0
    for row in sorted(_read_lines(root / "meta" / "episodes.jsonl"), key=lambda r: r["episode_index"]):
        index, length = row["episode_index"], row["length"]
        numbers = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
        videos = {v: (root / info["video_path"].format(video_key=key, **numbers), 0.0) for v, key in keys.items()}
        records.append(_Record(index, length, first, root / info["data_path"].format(**numbers), videos))
        first += length
    return records


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.parquet"
    table = _read_table(path)
    # LeRobot makes the text the index of a pandas table, which pandas writes under the second name.
    text = next((c for c in ("task", "__index_level_0__") if c in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DataError(f"{path} lacks the task text or task_index; copy it again")
    tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    return _checked_tasks(path, tasks)


def _tasks_v21(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.jsonl"
    return _checked_tasks(path, {row["task_index"]: row["task"] for row in _read_lines(path)})


def _checked_tasks(path: Path, tasks: dict[int, str]) -> dict[int, str]:
    empty = [i for i, text in tasks.items() if not str(text or "").strip()]
    if empty:
        raise DataError(f"{path}: task {empty[0]} has no text; add its instruction")
    return tasks


def _clip_requests(
    records: list[_Record], keep: set[int], keys: dict[str, str], fps: float, root: Path
) -> tuple[list[_Record], list[tuple[ClipRequest, ...]]]:
    """The episodes to keep, and one request per view for each.

    Time stamps drift by up to half a frame. Where an episode follows the previous one in the same file, frames are
    counted, which is exact, and the time only confirms it. An episode that is left out is counted but not trusted.
    """
    kept, out = [], []
    counted: dict[Path, int] = {}
    ends: dict[Path, int] = {}  # of the episodes kept
    for i, record in enumerate(records):
        requests = []
        for view in keys:
            path, seconds = record.videos[view]
            end = counted.get(path, 0)
            at = seconds * fps
            first = end if abs(at - end) < 0.75 else round(at)
            if i in keep and first < ends.get(path, 0):
                raise DataError(
                    f"{root}: episode {record.index} starts at frame {first} of {path}, inside the episode before "
                    f"it; correct from_timestamp in meta/episodes"
                )
            counted[path] = first + record.length
            if i in keep:
                ends[path] = counted[path]
            requests.append(ClipRequest(path, first, record.length, fps))
        if i in keep:
            kept.append(record)
            out.append(tuple(requests))
    return kept, out


class _Rows:
    """Rows of episodes from parquet files, one file in memory at a time."""

    def __init__(self, info: dict, root: Path):
        self._widths = {key: info["features"][key]["shape"][0] for key in (STATE, ACTION)}
        self._root = root
        self._path: Path | None = None
        self._table: dict[str, np.ndarray] = {}

    def of(self, record: _Record, fps: float) -> dict[str, np.ndarray]:
        """Checked columns of one episode, state and action float32 [N, width]."""
        if record.data != self._path:
            self._table, self._path = self._read(record.data), record.data
        where = np.flatnonzero(self._table["episode_index"] == record.index)
        rows = {name: column[where] for name, column in self._table.items()}
        label = f"{record.data}: episode {record.index}"
        if len(where) != record.length or record.length < 1:
            raise DataError(
                f"{label} has {len(where)} rows but meta/episodes states {record.length}; correct one of them"
            )
        if (np.diff(where) != 1).any() or (rows["frame_index"] != np.arange(record.length)).any():
            raise DataError(f"{label}: frame_index is not 0..{record.length - 1} in order; sort or re-record it")
        if (rows["index"] != record.first + np.arange(record.length)).any():
            raise DataError(f"{label}: index does not count up from {record.first}; correct the index column")
        if (np.abs(rows["timestamp"] - np.arange(record.length) / fps) > 0.5 / fps).any():
            raise DataError(f"{label}: time stamps are not frame_index / {fps:g} fps; correct fps or the time stamps")
        for key in (STATE, ACTION):
            if not np.isfinite(rows[key]).all():
                bad = int(np.flatnonzero(~np.isfinite(rows[key]).all(1))[0])
                raise DataError(f"{label}: {key} is not finite at frame {bad}; remove the episode")
        return rows

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        table = _read_table(path)
        if missing := [c for c in _COLUMNS if c not in table.column_names]:
            raise DataError(f"{path} lacks column {missing[0]}; copy the data set again")
        out = {}
        for name in _COLUMNS:
            column = table[name].combine_chunks()
            if name not in self._widths:
                out[name] = column.to_numpy(zero_copy_only=False)
                continue
            width = self._widths[name]
            values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32)
            if len(values) != width * len(table):
                got = len(values) / max(1, len(table))
                raise DataError(
                    f"{path}: {name} has {got:g} values per row but meta/info.json states {width}; correct it"
                )
            out[name] = values.reshape(-1, width)
        return out
