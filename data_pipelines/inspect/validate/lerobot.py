"""Finds every fault of a LeRobot data set, v3.0 or v2; `sources/lerobot.py` stops at the first one.

Metadata, rows and videos are read directly. All cameras that have pictures are checked; of those that training does not
use (data.front, data.wrist) faults are warnings. Files that only left-out episodes use are not read.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines import parquet_files, parquet_pictures
from data_pipelines.columns import Meaning
from data_pipelines.cut_off import COPY
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.audit import Audit, check_pairs
from data_pipelines.inspect.validate.episodes import decode
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.pictures import Look
from data_pipelines.inspect.validate.rows import Location, Rows
from data_pipelines.inspect.validate.videos import Segment, check_videos
from data_pipelines.parquet_pictures import ParquetPictures
from data_pipelines.sources import lerobot_format, lerobot_segments
from data_pipelines.sources.lerobot import meaning_of
from data_pipelines.sources.lerobot_format import Info
from data_pipelines.video import read_headers
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, DataConfig, LeRobotConfig
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.metadata import Count, Index, MetadataError, checked, shown
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files

_WAITING = 64  # files whose pictures wait for a thread
_DRIFT = 0.75  # frames that a segment's start may be off before it means another frame


@dataclass(frozen=True, eq=False)
class _EpisodeMetadata:
    """An episode as described in row `row` of the metadata `file`; `videos`: (path, from, to) by camera, in seconds."""

    file: Path
    row: int
    index: int
    length: int
    data: Path
    videos: dict[str, tuple[Path, float, float]]

    @property
    def name(self) -> str:
        return _name(self.index)


_UNKNOWN = -1


def _name(index: object) -> str:
    return f"episode_{index:06d}" if type(index) is int else f"episode {index!r}"


def check(root: Path, config: DataConfig, findings: Findings, progress: bool) -> None:
    """Adds to `findings`. Raises DataError when meta/info.json cannot be used, so that nothing can be checked."""
    names = config.lerobot
    info = lerobot_format.read_info(root, names)
    _check_features(root, info, config, findings)
    used_cameras = _used(info, config)
    # Episodes whose metadata cannot be read, _UNKNOWN for any: what follows from that is no further fault.
    broken: set[int] = set()
    if info.v3:
        metadata = _metadata_v3(root, info, used_cameras, broken, findings)
    else:
        metadata = _metadata_v2(root, info, broken, findings)
    pictures = _check_cameras(root, info, metadata, config, findings)
    tasks = _tasks(root, info, findings)
    findings.looked_at["episodes"] += sum(s.name not in findings.left_out for s in metadata)
    _check_metadata(root, metadata, broken, findings)
    meaning = _meaning(root, info, config, findings)
    cameras = {key for s in metadata for key in s.videos} | set(pictures)
    rows, audit = Rows(findings, meaning.columns), Audit(findings, meaning.columns, root, config, len(cameras))
    audit.lengths |= {s.name: s.length for s in metadata if s.name not in findings.left_out}
    used = _check_rows(root, info, names, metadata, broken, tasks, meaning, rows, audit, findings, progress)
    if not broken:
        _check_totals(root, info, metadata, tasks, findings)
        _check_files(root, metadata, findings)
    if (unused := sorted(tasks.keys() - used)) and not broken:
        findings.warn("task", root / "meta", None, f"no row uses task_index {listing(unused, 5)}")
    rows.finish()
    if info.v3:  # v2.1 has statistics per episode only
        _check_declared(root, info, names, meaning, rows)
    _check_pictures(root, pictures, used_cameras, metadata, audit, findings, progress)
    segments, in_order = _segments(metadata, info.fps, used_cameras, findings)
    check_videos(findings, segments, info.fps, root.name, not info.v3, audit, progress, in_order, bool(broken))
    audit.finish()


def _meaning(root: Path, info: Info, config: DataConfig, findings: Findings) -> Meaning:
    """What training takes the columns for, or else unnamed columns, with a finding."""
    try:
        meaning = meaning_of(root, info, config)
    except (DataError, ConfigError) as error:
        findings.error("column", root / "meta" / "info.json", None, str(error))
        widths = info.width(config.lerobot.state), info.width(config.lerobot.action)
        return Meaning(Columns.unstated("", *widths, range(widths[1])), *(tuple(range(width)) for width in widths))
    check_pairs(root / "meta" / "info.json", meaning.columns, findings)
    return meaning


def _used(info: Info, config: DataConfig) -> set[str]:
    """The cameras that training opens; all of them where data.front names none, so that a user may still choose."""
    cameras = info.cameras("video", "image")
    named = info.camera_keys(config).values()
    return {key for key in named if key in cameras} if config.front in cameras else set(cameras)


def _check_features(root: Path, info: Info, config: DataConfig, findings: Findings) -> None:
    path = root / "meta" / "info.json"
    cameras = info.cameras("video") + info.cameras("image")
    for view, key in info.camera_keys(config).items():
        if key not in cameras and key != getattr(DataConfig(), view, ""):  # the user did not ask for the default
            setting = f"data.extra_views names {view!r}" if view in config.extra_views else f"data.{view} is {key!r}"
            message = f"{setting}, which is not a camera of this data set; it has {', '.join(cameras) or 'no cameras'}"
            say = findings.warn if view == "wrist" else findings.error  # training can do without a wrist camera
            say("camera", path, None, message)


def _check_cameras(
    root: Path, info: Info, metadata: list[_EpisodeMetadata], config: DataConfig, findings: Findings
) -> list[str]:
    """Leaves out of `metadata` the cameras that no stage uses and that have no file: a warning each.

    Returns the cameras that are stored in the data files.
    """
    first = next((s.data for s in metadata if s.data.is_file()), None)
    pictures = []
    for key in info.cameras("video", "image"):
        in_rows = info.features[key].dtype == "image"
        if in_rows:
            there = first is not None and _has_column(first, key)
        else:
            there = any(key in s.videos and s.videos[key][0].is_file() for s in metadata)
        if there or key in info.camera_keys(config).values():
            pictures += [key] * in_rows
            continue
        message = f"{key} is declared but has no pictures; data.front, data.wrist and data.extra_views do not use it"
        findings.warn("camera", root / "meta" / "info.json", None, message)
        for s in metadata:
            s.videos.pop(key, None)
    return pictures


def _has_column(path: Path, key: str) -> bool:
    try:
        return key in parquet_files.column_names(path)
    except DataError:
        return True  # reported with the rows


# --- metadata ----------------------------------------------------------------------------------------------------


def _table(
    path: Path, findings: Findings, columns: Iterable[str], names: Sequence[str] = (), optional: Sequence[str] = ()
) -> pa.Table | None:
    """The columns of a parquet file; None, with a finding, when it is absent, unreadable or lacks one."""
    if not path.is_file():
        message = f"this file is missing, but the metadata refer to it; {COPY}"
        findings.error("file reference", path, None, message, names)
        return None
    try:
        present = parquet_files.column_names(path)
        if lacking := [c for c in columns if c not in present]:
            message = f"column {', '.join(lacking)} is missing; {parquet_files.LACKING}"
            findings.error("column", path, None, message, names)
            return None
        return parquet_files.read_table(path, list(columns), optional)
    except DataError as error:
        findings.error("file", path, None, str(error), names)
    return None


def _described(
    path: Path,
    fields: Mapping[str, Any],
    rows: Iterable[tuple[int, Any]],
    findings: Findings,
    broken: set[int] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, {field: value}) of the rows that are as described; the others are findings, and episodes `broken`."""
    for i, row in rows:
        try:
            yield i, checked(fields, row, _name(row.get("episode_index")) if isinstance(row, dict) else "the row")
        except MetadataError as error:
            index = row.get("episode_index") if isinstance(row, dict) else None
            # No episode to leave out: the reader needs every row of the metadata to know which there are.
            findings.error("metadata", path, i, f"{error}; correct it, or copy the file again")
            if broken is not None:
                broken.add(index if type(index) is int else _UNKNOWN)


def _json_lines(path: Path, findings: Findings) -> list[tuple[int, Any]]:
    """(line number, value) of the lines that are JSON."""
    try:
        lines = list(files.json_lines(path))
    except OSError as error:
        findings.error("file", path, None, f"cannot be read ({shorten(error)})")
        return []
    for i, value in lines:
        if isinstance(value, files.DamagedFileError):
            findings.error("file", path, i, str(value))
    return [(i, value) for i, value in lines if not isinstance(value, files.DamagedFileError)]


def _metadata_v3(
    root: Path, info: Info, used: set[str], broken: set[int], findings: Findings
) -> list[_EpisodeMetadata]:
    cameras = info.cameras("video")
    fields = lerobot_format.EPISODE_COLUMNS | {"dataset_from_index": Count, "dataset_to_index": Count}
    fields |= lerobot_format.video_columns(cameras, "to_timestamp")
    paths = lerobot_format.episode_tables(root)
    if not paths:
        findings.error("file reference", root / "meta" / "episodes", None, "holds no parquet file")
    lacking: dict[str, list[tuple[Path, int, str, str]]] = defaultdict(list)  # by camera
    metadata = []
    for file in paths:
        try:
            found = lerobot_format.episode_rows(file, fields)
        except DataError as error:
            findings.error("file", file, None, str(error))
            broken.add(_UNKNOWN)
            continue
        for i, row in _described(file, fields, enumerate(found), findings, broken):
            name = _name(row["episode_index"])
            videos = {}
            for key in cameras:
                if empty := lerobot_format.lacking_video(row, key):
                    lacking[key].append((file, i, name, empty))
                    continue
                numbers = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
                path = info.path(root, "video_path", video_key=key, **numbers)
                start, end = (row[f"videos/{key}/{n}"] for n in ("from_timestamp", "to_timestamp"))
                videos[key] = (path, start, start + row["length"] / info.fps if end is None else end)
            data = info.path(root, "data_path", **{n: row[f"data/{n}"] for n in ("chunk_index", "file_index")})
            first, end = row["dataset_from_index"], row["dataset_to_index"]
            if end - first != row["length"]:
                message = f"{name}: dataset_from_index .. dataset_to_index span {end - first} rows, but length is"
                findings.error("metadata", file, i, f"{message} {row['length']}", [name])
            metadata.append(_EpisodeMetadata(file, i, row["episode_index"], row["length"], data, videos))
    for key, empties in lacking.items():
        if len(empties) == len(metadata):
            continue  # no episode has this camera
        say = findings.error if key in used else findings.warn
        for file, i, name, empty in empties:
            say("metadata", file, i, f"{empty} is empty, so {name} has no video of {key}", [name])
    return sorted(metadata, key=lambda s: s.index)


def _metadata_v2(root: Path, info: Info, broken: set[int], findings: Findings) -> list[_EpisodeMetadata]:
    file = root / "meta" / "episodes.jsonl"
    fields = {"episode_index": Index, "length": Count}
    found = len(findings.found)
    readable = _json_lines(file, findings)
    if len(findings.found) > found:
        broken.add(_UNKNOWN)
    lines = list(_described(file, fields, readable, findings, broken))
    metadata = []
    for i, row in sorted(lines, key=lambda line: line[1]["episode_index"]):
        index, length = row["episode_index"], row["length"]
        end = length / info.fps
        videos = {
            key: (info.path_v2(root, "video_path", index, video_key=key), 0.0, end) for key in info.cameras("video")
        }
        metadata.append(_EpisodeMetadata(file, i, index, length, info.path_v2(root, "data_path", index), videos))
    return metadata


def _tasks(root: Path, info: Info, findings: Findings) -> dict[int, str]:
    lines: Iterable[tuple[int, Any]]
    if info.v3:
        path = root / "meta" / "tasks.parquet"
        try:
            text = lerobot_format.task_column(path)
        except DataError as error:
            findings.error("file", path, None, str(error))
            return {}
        table = _table(path, findings, ["task_index", text])
        lines = enumerate(table.to_pylist() if table else [])
    else:
        path, text = root / "meta" / "tasks.jsonl", "task"
        lines = _json_lines(path, findings)
    tasks: dict[int, str] = {}
    for i, row in _described(path, {"task_index": Index, text: Any}, lines, findings):
        index, spoken = row["task_index"], row[text]
        if not isinstance(spoken, str | None):
            findings.error("instruction", path, i, f"task_index {index} is {shown(spoken)}, not a text")
        elif not (spoken or "").strip():
            findings.error("instruction", path, i, f"task_index {index} has an empty text")
        if index in tasks:
            findings.error("task", path, i, f"task_index {index} occurs twice")
        tasks[index] = spoken if isinstance(spoken, str) else ""
    return tasks


def _check_metadata(root: Path, metadata: list[_EpisodeMetadata], broken: set[int], findings: Findings) -> None:
    for s, times in ((s, n) for s, n in _repeated(metadata)):
        findings.error("episode_index", s.file, s.row, f"{s.name} occurs {times} times; keep one entry")
    for expected, s in enumerate(metadata):
        before = metadata[expected - 1].index if expected else -1
        if s.index > before + 1 and not broken:
            gap = f"{before + 1}" if s.index == before + 2 else f"{before + 1} .. {s.index - 1}"
            findings.warn("episode_index", s.file, s.row, f"{s.name} comes next, so episodes {gap} are missing")
        if s.length < 1:
            findings.error("metadata", s.file, s.row, f"{s.name} has length {s.length}", [s.name])
    if not metadata and not broken:
        findings.error("metadata", root / "meta", None, "the metadata describe no episode")


def _repeated(metadata: list[_EpisodeMetadata]) -> list[tuple[_EpisodeMetadata, int]]:
    counts = Counter(s.index for s in metadata)
    last = {s.index: s for s in metadata}
    return [(last[index], n) for index, n in counts.items() if n > 1]


def _check_totals(
    root: Path, info: Info, metadata: list[_EpisodeMetadata], tasks: dict[int, str], findings: Findings
) -> None:
    paths = {path for s in metadata for path, _, _ in s.videos.values()}
    for key, counted in (
        ("total_episodes", len(metadata)),
        ("total_frames", sum(s.length for s in metadata)),
        ("total_tasks", len(tasks)),
        ("total_videos", len(paths)),
    ):
        stated = getattr(info, key)
        if stated is not None and stated != counted:
            message = f"{key} is {stated} but the data set has {counted}; correct it"
            # Training reads the first two and stops.
            say = findings.error if key in ("total_episodes", "total_frames") else findings.warn
            say("totals", root / "meta" / "info.json", None, message)


def _check_files(root: Path, metadata: list[_EpisodeMetadata], findings: Findings) -> None:
    """Finds files that the metadata do not refer to; missing files are found when they are read."""
    named = {s.data for s in metadata} | {path for s in metadata for path, _, _ in s.videos.values()}
    for folder, suffix in (("data", "parquet"), ("videos", "mp4")):
        for path in sorted((root / folder).rglob(f"*.{suffix}")):
            if path not in named and not path.name.startswith("._"):
                findings.warn("file reference", path, None, "the metadata do not refer to this file")


def _check_declared(root: Path, info: Info, names: LeRobotConfig, meaning: Meaning, rows: Rows) -> None:
    """Checks the ranges of LeRobot's own statistics of the whole data set."""
    path = root / "meta" / "stats.json"
    limits = {"min": list[float], "max": list[float]}
    try:
        stats = checked({names.state: limits, names.action: limits}, files.read_json(path), str(path))
    except (OSError, files.DamagedFileError):
        return  # not used by training; nothing is declared then
    for name, key, used in (("state", names.state, meaning.state), ("action", names.action, meaning.action)):
        low, high = (np.array(stats[key][end], np.float64) for end in ("min", "max"))
        if len(low) == len(high) == info.width(key):
            rows.declared(name, low[list(used)], high[list(used)], "meta/stats.json")


# --- rows --------------------------------------------------------------------------------------------------------


def _check_rows(
    root: Path,
    info: Info,
    names: LeRobotConfig,
    metadata: list[_EpisodeMetadata],
    broken: set[int],
    tasks: dict,
    meaning: Meaning,
    rows: Rows,
    audit: Audit,
    findings: Findings,
    progress: bool,
) -> set[int]:
    """Checks every data file; returns the task indices in use, which are all where a file was not read."""
    by_file: dict[Path, list[_EpisodeMetadata]] = defaultdict(list)
    for s in metadata:
        by_file[s.data].append(s)
    used: set[int] = set()
    before: tuple[int, int] | None = None
    jumps: list[tuple[str, Path, int]] = []
    for path in [p for p, parts in by_file.items() if not {s.name for s in parts} - findings.left_out]:
        del by_file[path]  # nothing of it is left
        used |= tasks.keys()
    bar = progress_bar(by_file.items(), desc=f"{root.name}: rows", unit="file", show=progress)
    for path, episodes in bar:
        columns = _read_rows(path, info, names, meaning, [s.name for s in episodes], findings)
        if columns is None:
            used |= tasks.keys()
            continue
        findings.looked_at["rows"] += len(columns["episode_index"])
        used |= set(np.unique(columns["task_index"]).tolist())
        known = {s.index for s in episodes}
        for index in np.unique(columns["episode_index"]).tolist():
            if index not in known | broken and _UNKNOWN not in broken:
                at = int(np.argmax(columns["episode_index"] == index))
                message = f"row of episode {index}, but the metadata do not assign this episode to this file"
                findings.error("episode_index", path, at, message)
        for s in episodes:
            if s.name in findings.left_out:
                continue
            _check_episode(s, columns, info.fps, names, tasks, rows, audit, findings)
            where = np.flatnonzero(columns["episode_index"] == s.index)
            if "index" in columns and len(where):
                index = columns["index"][where]
                if (row := lerobot_format.jump(before, s.index, index)) is not None:
                    jumps.append((s.name, path, int(where[row])))
                before = s.index, int(index[-1])
    if jumps:
        name, path, at = jumps[0]
        message = (
            f"index does not count on in {len(jumps)} episodes, first in {name}, as after deleting or merging some"
        )
        findings.warn("index", path, at, f"{message}; it is not used", [name for name, _, _ in jumps])
    return used


def _read_rows(
    path: Path, info: Info, keys: LeRobotConfig, meaning: Meaning, names: list[str], findings: Findings
) -> dict[str, np.ndarray] | None:
    """The checked columns of a file, of state and action those in use; None, with a finding, when it cannot be used."""
    widths = {key: info.width(key) for key in (keys.state, keys.action)}
    table = _table(path, findings, [*lerobot_format.NUMBERS, *widths], names, list(lerobot_format.OPTIONAL))
    if table is None:
        return None
    try:
        columns = lerobot_format.columns(table, widths)
    except parquet_files.ColumnError as error:
        findings.error("column", path, error.row, str(error), names)
        return None
    used = {keys.state: meaning.state, keys.action: meaning.action}
    return columns | {key: columns[key][:, indices] for key, indices in used.items()}


def _check_episode(
    s: _EpisodeMetadata,
    columns: dict[str, np.ndarray],
    fps: float,
    names: LeRobotConfig,
    tasks: dict,
    rows: Rows,
    audit: Audit,
    findings: Findings,
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
    first = row["timestamp"][0]  # may be any time
    expectations: list[tuple[str, np.ndarray, float]] = [("timestamp", first + steps / fps, 0.5 / fps)]
    if "frame_index" in row:
        expectations.insert(0, ("frame_index", steps, 0))
    for column, expected, slack in expectations:
        # Not "more than": a NaN is wrong, too.
        wrong = np.flatnonzero(~(np.abs(row[column] - expected) <= slack))
        if len(wrong):
            at = wrong[0]
            message = f"{s.name}: {column} is {row[column][at]:.6g}, not {expected[at]:.6g}, at step {at}"
            findings.error(column, s.data, where[at], f"{message} ({len(wrong)} steps in total)", [s.name])
    unknown = np.flatnonzero(~np.isin(row["task_index"], list(tasks)))
    if len(unknown):
        at = unknown[0]
        message = f"{s.name}: task_index {row['task_index'][at]} has no text in meta/tasks, at step {at}"
        findings.error("task", s.data, where[at], message, [s.name])
    empty = [i for i in np.unique(row["task_index"]).tolist() if i in tasks and not tasks[i].strip()]
    if empty:
        message = f"{s.name} uses task_index {empty[0]}, whose instruction is empty"
        findings.error("instruction", s.data, where[0], message, [s.name])
    location = Location(s.name, s.data, int(where[0]))
    rows.add(location, row[names.state], row[names.action])
    audit.rows(location, row[names.state], row[names.action], fps)


# --- pictures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pictures:
    """One camera of one episode, decoded: the first row in its file, the size of the first picture (None where that
    cannot be decoded), and the rest as `episodes.decode` finds it."""

    first: int = 0
    size: tuple[int, int] | None = None
    faults: list[tuple[int, str]] = field(default_factory=list)
    digest: bytes | None = None
    look: Look | None = None


def _check_pictures(
    root: Path,
    cameras: list[str],
    used: set[str],
    metadata: list[_EpisodeMetadata],
    audit: Audit,
    findings: Findings,
    progress: bool,
) -> None:
    """Decodes the pictures of `cameras`, which are stored in the data files, several files at a time."""
    by_file: dict[Path, list[_EpisodeMetadata]] = defaultdict(list)
    for s in metadata:
        if s.name not in findings.left_out and s.length > 0:
            by_file[s.data].append(s)
    jobs = [(path, key, episodes) for key in cameras for path, episodes in by_file.items()]
    seen: dict[bytes, tuple[_EpisodeMetadata, str]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with (
        progress_bar(total=len(jobs), desc=f"{root.name}: pictures", unit="file", show=progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for start in range(0, len(jobs), _WAITING):
            batch = jobs[start : start + _WAITING]
            for (path, key, episodes), results in zip(batch, pool.map(_decode, batch), strict=True):
                bar.update()
                say = findings.error if key in used else findings.warn
                for s, found in zip(episodes, results, strict=True):
                    findings.looked_at["frames"] += s.length
                    for step, message in found.faults:
                        say("picture", path, found.first + step, f"{s.name}: {message}", [s.name])
                    if (size := found.size) is not None and size != (usual := sizes.setdefault(key, size)):
                        message = f"{s.name}: {key} has {size[0]} x {size[1]} pixels, before it {usual[0]} x {usual[1]}"
                        say("picture", path, found.first, message, [s.name])
                    if found.digest is None or found.look is None:
                        continue
                    audit.view(s.name, key, found.look, path, found.first)
                    if found.look.empty:
                        continue  # a black picture is the same everywhere
                    other, camera = seen.setdefault(found.digest, (s, key))
                    if (other, camera) != (s, key):
                        message = f"{s.name} has in {key} the same pictures as {other.name} in {camera}"
                        (say if camera in used else findings.warn)("duplicate", path, found.first, message, [s.name])


def _decode(job: tuple[Path, str, list[_EpisodeMetadata]]) -> list[_Pictures]:
    """The pictures of one camera in one file, by episode: in this order every row group is read once."""
    path, key, episodes = job
    try:
        numbers = parquet_files.scalars(parquet_files.read_table(path, ["episode_index"]), "episode_index", np.int64)
    except (DataError, parquet_files.ColumnError):
        return [_Pictures() for _ in episodes]  # reported with the rows
    out = []
    for s in episodes:
        where = np.flatnonzero(numbers == s.index)
        if not len(where):
            out.append(_Pictures())  # reported with the rows
            continue
        first = int(where[0])
        try:
            size = parquet_pictures.size(path, key, first)
            frames = ParquetPictures(str(path), key, first, min(s.length, len(where)), *size)
            out.append(_Pictures(first, size, *decode(frames, frames.count)))
        except DataError as error:
            out.append(_Pictures(first, None, [(0, str(error))]))
    parquet_pictures.close_files()
    return out


# --- videos ------------------------------------------------------------------------------------------------------


def _segments(
    metadata: list[_EpisodeMetadata], fps: float, used: set[str], findings: Findings
) -> tuple[dict[Path, list[Segment]], set[Path]]:
    """(frames of each file by episode, files whose frames are counted as in the loader); overlaps are findings."""
    placed: dict[Path, list[tuple[float, _EpisodeMetadata]]] = defaultdict(list)
    odd = []  # these contradict themselves, so an overlap is their fault
    views: dict[Path, str] = {}
    for s in metadata:
        for view, (path, start, end) in s.videos.items():
            views[path] = view
            placed[path].append((start, s))
            if abs((end - start) * fps - s.length) > _DRIFT:
                message = (
                    f"{s.name}: {end - start:.3f} s of {path.name} do not correspond to {s.length} frames "
                    f"at {fps:g} fps"
                )
                findings.warn("video segment", s.file, s.row, message, [s.name])
                odd.append(s)
    out: dict[Path, list[Segment]] = {}
    counted = _counted(placed, fps, findings)
    for path, starts in placed.items():
        if path in counted:
            out[path] = [
                Segment(s.name, first, s.length, views[path], views[path] in used)
                for (_, s), first in zip(starts, counted[path], strict=True)
            ]
            continue
        end, kept, out[path] = 0, 0, []
        before: _EpisodeMetadata | None = None  # the last episode that can be trusted; it ends at frame `kept`
        for start, s in sorted(starts, key=lambda item: (item[0], item[1].index)):
            first = end if abs(start * fps - end) < _DRIFT else round(start * fps)
            trusted = s.name not in findings.left_out
            if trusted and before is not None and first < kept:
                message = f"{s.name} starts at frame {first} of {path}, inside {before.name}, which ends at {kept}"
                suspects = [x.name for x in (before, s) if x in odd] or [before.name, s.name]
                say = findings.error if views[path] in used else findings.warn
                say("video segment", s.file, s.row, message, suspects)
                continue
            out[path].append(Segment(s.name, first, s.length, views[path], views[path] in used))
            end = first + s.length
            if trusted:
                kept, before = end, s
    return out, set(counted)


def _counted(
    placed: dict[Path, list[tuple[float, _EpisodeMetadata]]], fps: float, findings: Findings
) -> dict[Path, list[int]]:
    """First frames in the files all of whose frames belong to an episode, in its order."""

    def look(path: Path) -> list[int] | None:
        if all(s.name in findings.left_out for _, s in placed[path]):
            return None  # not read
        try:
            frames = read_headers([path], "", progress=False)[path].frames
        except DataError:
            return None  # found when it is decoded
        segments = [
            lerobot_segments.Segment(start, s.length, s.name not in findings.left_out) for start, s in placed[path]
        ]
        found = lerobot_segments.placed(segments, frames, fps)
        return found.firsts if found.in_order else None

    with ThreadPoolExecutor(8) as pool:
        firsts = dict(zip(placed, pool.map(look, placed), strict=True))
    return {path: found for path, found in firsts.items() if found is not None}
