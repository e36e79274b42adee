"""Finds every fault of a LeRobot data set, v3.0 or v2.1; `sources/lerobot.py` stops at the first one.

Metadata, rows and videos are read directly. All cameras are checked, whether a stage uses them or not.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import DataError
from data_pipelines.inspect.summary import column_names
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.rows import Location, Rows
from data_pipelines.inspect.validate.videos import Segment, check_videos
from data_pipelines.sources.lerobot import ACTION, STATE
from rynnvla_jax.config import DataConfig
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

_COLUMNS = ("episode_index", "frame_index", "index", "timestamp", "task_index", STATE, ACTION)
_TYPES = {STATE: pa.list_(pa.float32()), ACTION: pa.list_(pa.float32()), "timestamp": pa.float64()}  # else int64
_DRIFT = 0.75  # frames that a segment's start may be off before it means another frame


@dataclass(frozen=True, eq=False)
class _EpisodeMetadata:
    """An episode as described in row `row` of the metadata `file`; `videos`: (path, from, to) by camera, in seconds."""

    file: Path
    row: int
    index: int
    length: int
    first: int
    data: Path
    videos: dict[str, tuple[Path, float, float]]

    @property
    def name(self) -> str:
        return _name(self.index)


def _name(index: object) -> str:
    return f"episode_{index:06d}" if type(index) is int else f"episode {index!r}"


def _is_number(value: object, fraction: bool) -> bool:
    """Whether a metadata value is a valid number of rows (not negative) or, if `fraction`, of seconds."""
    if not isinstance(value, int | float) or type(value) not in ((int, float) if fraction else (int,)):
        return False  # by `type`, since a bool is an int to isinstance
    return math.isfinite(value) and 0 <= value < 2**40


def check(root: Path, config: DataConfig, findings: Findings, progress: bool) -> None:
    """Adds to `findings`. Raises DataError when meta/info.json cannot be used, so that nothing can be checked."""
    info = _info(root)
    _check_features(root, info, config, findings)
    v3 = str(info["codebase_version"]).startswith("v3.")
    metadata = _metadata_v3(root, info, findings) if v3 else _metadata_v21(root, info, findings)
    tasks = _tasks(root, v3, findings)
    findings.looked_at["episodes"] += sum(s.name not in findings.left_out for s in metadata)
    _check_metadata(root, info, metadata, findings)
    rows = Rows(findings, column_names(f"lerobot:{root}", info["features"][ACTION]["shape"][0]))
    used = _check_rows(root, info, metadata, tasks, rows, findings, progress)
    _check_totals(root, info, metadata, tasks, findings)
    _check_files(root, metadata, findings)
    if unused := sorted(tasks.keys() - used):
        findings.warn("task", root / "meta", None, f"no row uses task_index {listing(unused, 5)}")
    rows.finish()
    _check_declared(root, metadata, rows, v3)
    fps = float(info["fps"])
    check_videos(findings, _segments(metadata, fps, findings), fps, root.name, not v3, progress)


def _info(root: Path) -> dict:
    """meta/info.json, valid enough for all other checks. Raises DataError."""
    path = root / "meta" / "info.json"
    try:
        info = files.read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again") from None
    for key, kind in (("codebase_version", str), ("fps", (int, float)), ("features", dict), ("data_path", str)):
        if not isinstance(info, dict) or not isinstance(info.get(key), kind):
            raise DataError(f"{path} lacks {key}; copy the data set again")
    version = info["codebase_version"]
    if not version.startswith("v3.") and version != "v2.1":
        raise DataError(f"{path}: version {version} is not supported; convert the data set to v3.0 with LeRobot")
    if not 0 < info["fps"] < 1e4:
        raise DataError(f"{path}: fps is {info['fps']!r}; it must be above 0 and below 10000")
    for key, feature in info["features"].items():
        if not isinstance(feature, dict):
            raise DataError(f"{path}: feature {key} is {feature!r}; copy it again")
    for key in (STATE, ACTION):
        shape = info["features"].get(key, {}).get("shape")
        if not isinstance(shape, list) or [type(n) for n in shape] != [int]:
            raise DataError(f"{path}: feature {key} must be a vector; this data set cannot be used")
    chunk = info.get("chunks_size", 1000)
    if type(chunk) is not int or chunk < 1:
        raise DataError(f"{path}: chunks_size is {chunk!r}; it must be a whole number of at least 1")
    for key in ("data_path", "video_path") if _cameras(info) else ("data_path",):
        try:
            str.format(info.get(key), video_key="", chunk_index=0, file_index=0, episode_index=0, episode_chunk=0)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError):
            raise DataError(
                f"{path}: {key} is {info.get(key)!r}, which is not a valid path template; correct it"
            ) from None
    return info


def _cameras(info: dict) -> list[str]:
    return [key for key, feature in info["features"].items() if feature.get("dtype") == "video"]


def _check_features(root: Path, info: dict, config: DataConfig, findings: Findings) -> None:
    path = root / "meta" / "info.json"
    state, action = (info["features"][key]["shape"][0] for key in (STATE, ACTION))
    if state != action:
        message = f"{STATE} has {state} values and {ACTION} has {action}; relative actions need the same joints in both"
        findings.error("column", path, None, message)
    images = [key for key, feature in info["features"].items() if feature.get("dtype") == "image"]
    for key in images:
        findings.error("camera", path, None, f"{key} is stored as images; record it as video, or convert it to video")
    cameras = _cameras(info) + images
    for view in ("front", "wrist"):
        key = getattr(config, view)
        if key not in cameras and key != getattr(DataConfig(), view):  # the user did not ask for the default
            message = (
                f"data.{view} is {key!r}, which is not a camera of this data set; "
                f"it has {', '.join(cameras) or 'no cameras'}"
            )
            say = findings.error if view == "front" else findings.warn  # training can do without a wrist camera
            say("camera", path, None, message)


# --- metadata ----------------------------------------------------------------------------------------------------


def _table(path: Path, findings: Findings, columns: list[str], names=()) -> pa.Table | None:
    """The columns of a parquet file; None, with a finding, when it is absent, unreadable or lacks one."""
    try:
        with pq.ParquetFile(path) as file:
            if lacking := [c for c in columns if c not in file.schema_arrow.names]:
                findings.error("column", path, None, f"column {', '.join(lacking)} is missing", names)
                return None
            return file.read(columns)
    except FileNotFoundError:
        findings.error("file reference", path, None, "this file is missing, but the metadata refer to it", names)
    except (pa.ArrowException, OSError) as error:
        findings.error("file", path, None, f"cannot be read ({shorten(error)})", names)
    return None


def _json_lines(path: Path, findings: Findings, keys: tuple[str, ...]) -> list[tuple[int, dict]]:
    """(line number, object) of the lines that can be used."""
    try:
        lines = list(files.json_lines(path))
    except OSError as error:
        findings.error("file", path, None, f"cannot be read ({shorten(error)})")
        return []
    out = []
    for i, value in lines:
        if isinstance(value, files.DamagedFileError):
            findings.error("file", path, i, str(value))
        elif not isinstance(value, dict) or any(k not in value for k in keys):
            findings.error("file", path, i, f"lacks {' or '.join(keys)}")
        elif wrong := [k for k in keys if k != "task" and not _is_number(value[k], False)]:
            findings.error("metadata", path, i, f"{wrong[0]} is {value[wrong[0]]!r}")
        else:
            out.append((i, value))
    return out


def _metadata_v3(root: Path, info: dict, findings: Findings) -> list[_EpisodeMetadata]:
    cameras = _cameras(info)
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += ["dataset_from_index", "dataset_to_index"]
    for key in cameras:
        columns += [f"videos/{key}/{n}" for n in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        findings.error("file reference", root / "meta" / "episodes", None, "holds no parquet file")
    metadata = []
    for file in paths:
        table = _table(file, findings, columns)
        for i, row in enumerate(table.to_pylist() if table else []):
            name = _name(row["episode_index"])
            if wrong := [c for c in columns if not _is_number(row[c], c.endswith("timestamp"))]:
                message = f"{name}: {wrong[0]} is {row[wrong[0]]!r}"
                findings.error("metadata", file, i, message, [name] if wrong[0] != "episode_index" else [])
                continue
            videos = {}
            for key in cameras:
                numbers = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
                path = root / info["video_path"].format(video_key=key, **numbers)
                videos[key] = (path, row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"])
            data = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            first, end = row["dataset_from_index"], row["dataset_to_index"]
            if end - first != row["length"]:
                message = f"{name}: dataset_from_index .. dataset_to_index span {end - first} rows, but length is"
                findings.error("metadata", file, i, f"{message} {row['length']}", [name])
            metadata.append(_EpisodeMetadata(file, i, row["episode_index"], row["length"], first, root / data, videos))
    return sorted(metadata, key=lambda s: s.index)


def _metadata_v21(root: Path, info: dict, findings: Findings) -> list[_EpisodeMetadata]:
    file = root / "meta" / "episodes.jsonl"
    lines = _json_lines(file, findings, ("episode_index", "length"))
    metadata, first = [], 0
    for i, row in sorted(lines, key=lambda line: line[1]["episode_index"]):
        index, length = row["episode_index"], row["length"]
        numbers = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
        end = length / float(info["fps"])
        videos = {k: (root / info["video_path"].format(video_key=k, **numbers), 0.0, end) for k in _cameras(info)}
        metadata.append(
            _EpisodeMetadata(file, i, index, length, first, root / info["data_path"].format(**numbers), videos)
        )
        first += length
    return metadata


def _tasks(root: Path, v3: bool, findings: Findings) -> dict[int, str]:
    if v3:
        path = root / "meta" / "tasks.parquet"
        table = _table(path, findings, ["task_index"])
        if table is None:
            return {}
        names = pq.read_schema(path).names
        text = next((c for c in ("task", "__index_level_0__") if c in names), None)
        if text is None:
            findings.error("column", path, None, "the column with the task text is missing")
            return {}
        indices, texts = (pq.read_table(path, columns=[c])[c].to_pylist() for c in ("task_index", text))
        rows = list(zip(range(len(indices)), indices, texts, strict=True))
    else:
        path = root / "meta" / "tasks.jsonl"
        rows = [(i, r["task_index"], r["task"]) for i, r in _json_lines(path, findings, ("task_index", "task"))]
    tasks: dict[int, str] = {}
    for i, index, text in rows:
        if not _is_number(index, False):
            findings.error("metadata", path, i, f"task_index is {index!r}")
            continue
        if not str(text or "").strip():
            findings.error("instruction", path, i, f"task_index {index} has an empty text")
        if index in tasks:
            findings.error("task", path, i, f"task_index {index} occurs twice")
        tasks[index] = str(text or "")
    return tasks


def _check_metadata(root: Path, info: dict, metadata: list[_EpisodeMetadata], findings: Findings) -> None:
    for s, times in ((s, n) for s, n in _repeated(metadata)):
        findings.error("episode_index", s.file, s.row, f"{s.name} occurs {times} times", [s.name])
    first = 0
    for expected, s in enumerate(metadata):
        before = metadata[expected - 1].index if expected else -1
        if s.index > before + 1:
            gap = f"{before + 1}" if s.index == before + 2 else f"{before + 1} .. {s.index - 1}"
            findings.error("episode_index", s.file, s.row, f"{s.name} comes next, so episodes {gap} are missing")
        if s.first != first:
            message = f"{s.name}: dataset_from_index is {s.first} but the episodes before it have {first} rows"
            findings.error("metadata", s.file, s.row, message)
        first = s.first + s.length
        if s.length < 1:
            findings.error("metadata", s.file, s.row, f"{s.name} has length {s.length}", [s.name])
    if not metadata:
        findings.error("metadata", root / "meta", None, "the metadata describe no episode")


def _repeated(metadata: list[_EpisodeMetadata]) -> list[tuple[_EpisodeMetadata, int]]:
    counts = Counter(s.index for s in metadata)
    last = {s.index: s for s in metadata}
    return [(last[index], n) for index, n in counts.items() if n > 1]


def _check_totals(
    root: Path, info: dict, metadata: list[_EpisodeMetadata], tasks: dict[int, str], findings: Findings
) -> None:
    paths = {path for s in metadata for path, _, _ in s.videos.values()}
    for key, counted in (
        ("total_episodes", len(metadata)),
        ("total_frames", sum(s.length for s in metadata)),
        ("total_tasks", len(tasks)),
        ("total_videos", len(paths)),
    ):
        if info.get(key) is not None and info[key] != counted:
            message = f"{key} is {info[key]} but the data set has {counted}; correct it"
            findings.error("totals", root / "meta" / "info.json", None, message)


def _check_files(root: Path, metadata: list[_EpisodeMetadata], findings: Findings) -> None:
    """Finds files that the metadata do not refer to; missing files are found when they are read."""
    named = {s.data for s in metadata} | {path for s in metadata for path, _, _ in s.videos.values()}
    for folder, suffix in (("data", "parquet"), ("videos", "mp4")):
        for path in sorted((root / folder).rglob(f"*.{suffix}")):
            if path not in named:
                findings.warn("file reference", path, None, "the metadata do not refer to this file")


def _check_declared(root: Path, metadata: list[_EpisodeMetadata], rows: Rows, v3: bool) -> None:
    """Checks the ranges of LeRobot's own statistics of the whole data set; v2.1 has them per episode only."""
    path = root / "meta" / "stats.json"
    if not v3 or not path.is_file():
        return
    try:
        stats = files.read_json(path)
        low = {k: np.asarray(stats[k]["min"], np.float64) for k in (STATE, ACTION)}
        high = {k: np.asarray(stats[k]["max"], np.float64) for k in (STATE, ACTION)}
    except (ValueError, KeyError, TypeError):
        return  # not used by training; nothing is declared then
    rows.declared("state", low[STATE], high[STATE], "meta/stats.json")
    rows.declared("action", low[ACTION], high[ACTION], "meta/stats.json")


# --- rows --------------------------------------------------------------------------------------------------------


def _check_rows(
    root: Path,
    info: dict,
    metadata: list[_EpisodeMetadata],
    tasks: dict,
    rows: Rows,
    findings: Findings,
    progress: bool,
) -> set[int]:
    """Checks every data file; returns the task indices in use."""
    by_file: dict[Path, list[_EpisodeMetadata]] = defaultdict(list)
    for s in metadata:
        by_file[s.data].append(s)
    used: set[int] = set()
    bar = progress_bar(by_file.items(), desc=f"{root.name}: rows", unit="file", show=progress)
    for path, episodes in bar:
        columns = _read_rows(path, info, [s.name for s in episodes], findings)
        if columns is None:
            continue
        findings.looked_at["rows"] += len(columns["index"])
        used |= set(np.unique(columns["task_index"]).tolist())
        known = {s.index for s in episodes}
        for index in np.unique(columns["episode_index"]).tolist():
            if index not in known:
                at = int(np.argmax(columns["episode_index"] == index))
                message = f"row of episode {index}, but the metadata do not assign this episode to this file"
                findings.error("episode_index", path, at, message)
        for s in episodes:
            if s.name in findings.left_out:
                continue
            _check_episode(s, columns, float(info["fps"]), tasks, rows, findings)
    return used


def _read_rows(path: Path, info: dict, names: list[str], findings: Findings) -> dict[str, np.ndarray] | None:
    table = _table(path, findings, list(_COLUMNS), names)
    if table is None:
        return None
    out = {}
    for name in _COLUMNS:
        try:
            column = table[name].combine_chunks().cast(_TYPES.get(name, pa.int64()))
        except pa.ArrowException:
            message = f"{name} is {table[name].type}, not {_TYPES.get(name, pa.int64())}"
            findings.error("column", path, None, message, names)
            return None
        if column.null_count:
            message = f"{column.null_count} rows have no value of {name}"
            findings.error("column", path, int(np.argmax(column.is_null())), message, names)
            return None
        if name in (STATE, ACTION):
            width = info["features"][name]["shape"][0]
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(values) != width * len(table):
                got = len(values) / max(1, len(table))
                message = f"{name} has {got:g} values per row but meta/info.json states {width}"
                findings.error("column", path, None, message, names)
                return None
            out[name] = values.reshape(-1, width)
        else:
            out[name] = column.to_numpy(zero_copy_only=False)
    return out


def _check_episode(
    s: _EpisodeMetadata, columns: dict[str, np.ndarray], fps: float, tasks: dict, rows: Rows, findings: Findings
) -> None:
    where = np.flatnonzero(columns["episode_index"] == s.index)
    if len(where) != s.length:
        message = f"{s.name} has {len(where)} rows but the metadata state {s.length}"
        findings.error("row count", s.data, where[0] if len(where) else None, message, [s.name])
    if not len(where):
        return
    if len(apart := np.flatnonzero(np.diff(where) != 1)):
        at = where[apart[0]] + 1
        findings.error("episode_index", s.data, at, f"the rows of {s.name} are not consecutive", [s.name])
    row = {name: column[where] for name, column in columns.items()}
    steps = np.arange(len(where))
    for check, column, expected, slack in (
        ("frame_index", "frame_index", steps, 0),
        ("index", "index", s.first + steps, 0),
        ("timestamp", "timestamp", steps / fps, 0.5 / fps),
    ):
        # Not "more than": a NaN is wrong, too.
        wrong = np.flatnonzero(~(np.abs(row[column] - expected) <= slack))
        if len(wrong):
            at = wrong[0]
            message = f"{s.name}: {column} is {row[column][at]:.6g}, not {expected[at]:.6g}, at step {at}"
            findings.error(check, s.data, where[at], f"{message} ({len(wrong)} steps in total)", [s.name])
    unknown = np.flatnonzero(~np.isin(row["task_index"], list(tasks)))
    if len(unknown):
        at = unknown[0]
        message = f"{s.name}: task_index {row['task_index'][at]} has no text in meta/tasks, at step {at}"
        findings.error("task", s.data, where[at], message, [s.name])
    empty = [i for i in np.unique(row["task_index"]).tolist() if i in tasks and not tasks[i].strip()]
    if empty:
        message = f"{s.name} uses task_index {empty[0]}, whose instruction is empty"
        findings.error("instruction", s.data, where[0], message, [s.name])
    rows.add(Location(s.name, s.data, int(where[0])), row[STATE], row[ACTION])


# --- videos ------------------------------------------------------------------------------------------------------


def _segments(metadata: list[_EpisodeMetadata], fps: float, findings: Findings) -> dict[Path, list[Segment]]:
    """The frames of each file by episode; overlaps are findings. Frames are counted as in the loader."""
    placed: dict[Path, list[tuple[float, _EpisodeMetadata]]] = defaultdict(list)
    odd = []  # these contradict themselves, so an overlap is their fault
    for s in metadata:
        for path, start, end in s.videos.values():
            placed[path].append((start, s))
            if abs((end - start) * fps - s.length) > _DRIFT:
                message = (
                    f"{s.name}: {end - start:.3f} s of {path.name} do not correspond to {s.length} frames "
                    f"at {fps:g} fps"
                )
                findings.warn("video segment", s.file, s.row, message, [s.name])
                odd.append(s)
    out: dict[Path, list[Segment]] = {}
    for path, starts in placed.items():
        end, kept, out[path] = 0, 0, []
        before: _EpisodeMetadata | None = None  # the last episode that can be trusted; it ends at frame `kept`
        for start, s in sorted(starts, key=lambda item: (item[0], item[1].index)):
            first = end if abs(start * fps - end) < _DRIFT else round(start * fps)
            trusted = s.name not in findings.left_out
            if trusted and before is not None and first < kept:
                message = f"{s.name} starts at frame {first} of {path}, inside {before.name}, which ends at {kept}"
                suspects = [x.name for x in (before, s) if x in odd] or [before.name, s.name]
                findings.error("video segment", s.file, s.row, message, suspects)
                continue
            out[path].append(Segment(s.name, first, s.length))
            end = first + s.length
            if trusted:
                kept, before = end, s
    return out
