"""LeRobot data sets, v3.0, v2.1 and v2.0, read with PyArrow and PyAV; LeRobot itself is not needed.

Robot: key `rynnvla_unit` of meta/info.json where present, else "lerobot:<robot_type>". LeRobot's joint calibration
changed in mid-2025 (signs and 90 degree offsets), which the files do not show: name it in `rynnvla_columns.json`.

Source: LeRobot data set formats v2.0, v2.1 and v3.0. The metadata of published data sets are often wrong, so they are
checked against the rows and the videos, and LeRobot's own statistics are not used.
"""

import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import parquet_files, parquet_pictures
from data_pipelines.column_guess import guess
from data_pipelines.columns import Meaning, flat_names, resolve
from data_pipelines.episode import DataError, Episode, Episodes, Frames
from data_pipelines.parquet_pictures import ParquetPictures
from data_pipelines.sources import lerobot_format
from data_pipelines.sources.exclude import LEAVE_OUT, left_in
from data_pipelines.sources.lerobot_format import EpisodeLine, Info, Task
from data_pipelines.sources.lerobot_segments import Segment, placed
from data_pipelines.video import ClipRequest, Header, open_clips, read_headers
from rynnvla_jax import metadata
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig, LeRobotConfig
from rynnvla_jax.errors import listing
from rynnvla_jax.metadata import T
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import bucket_cache, files


@dataclass(frozen=True)
class _Record:
    """Metadata of one episode: (path, start in seconds) by view; of a view without a video, what says so."""

    index: int
    length: int
    data: Path
    videos: dict[str, tuple[Path, float] | str]


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes in order. Raises DataError naming the faulty file, ConfigError for cameras that do not exist."""
    names = config.lerobot
    info = lerobot_format.read_info(root, names)
    cameras = _camera_keys(root, info, config, views)
    keys = {view: key for view, key in cameras.items() if info.features[key].dtype == "video"}
    records = _records_v3(root, info, keys) if info.v3 else _records_v2(root, info, keys)
    tasks = _tasks(root, info)
    if not records:
        raise DataError(f"{root} contains no episode; record episodes or correct data.source")
    records.sort(key=lambda r: r.index)
    _check_counts(root, info, records)
    if views is None:  # a camera may be declared without ever having been recorded
        keys = {view: key for view, key in keys.items() if any(_recorded(r.videos[view]) for r in records)}
        cameras = {view: key for view, key in cameras.items() if view in keys or info.features[key].dtype == "image"}
    source = f"lerobot:{root}"
    keep = left_in(source, [_name(r) for r in records], config)
    kept = [records[i] for i in keep]
    headers = read_headers(_videos(root, kept, keys, config), root.name, progress)
    requests = _clip_requests(root, records, set(keep), keys, headers, info.fps)
    clips = iter(open_clips(requests, headers, root.name, progress))
    pictures = {view: _Pictures(key) for view, key in cameras.items() if view not in keys}
    rows = _Rows(info, names)
    tables = [rows.of(record, info.fps) for record in progress_bar(kept, desc=f"{root.name}: episodes", show=progress)]
    largest = np.max([np.abs(table[names.state]).max(0) for table, _ in tables], axis=0)
    meaning = meaning_of(root, info, config, largest)
    episodes = []
    for record, (table, first) in zip(kept, tables, strict=True):
        task_ids, text_of = np.unique(table["task_index"], return_inverse=True)
        missing = [t for t in task_ids.tolist() if t not in tasks]
        if missing:
            raise DataError(
                f"{record.data}: task_index {missing[0]} is not in {root}/meta/tasks; add it, or {LEAVE_OUT}"
            )
        videos: dict[str, Frames] = {view: next(clips) for view in keys}
        videos |= {view: found.of(record, first) for view, found in pictures.items()}
        episodes.append(
            Episode(
                name=_name(record),
                texts=tuple(tasks[t] for t in task_ids.tolist()),
                text_of=text_of.astype(np.int32),
                fps=info.fps,
                state=np.ascontiguousarray(table[names.state][:, meaning.state]),
                action=np.ascontiguousarray(table[names.action][:, meaning.action]),
                columns=meaning.columns,
                views={view: videos[view] for view in cameras},
            )
        )
    parquet_pictures.close_files()
    rows.report(root, len(episodes))
    return Episodes.of(episodes, source, partial(_files, root, kept))


def _files(root: Path, records: Sequence[_Record]) -> Iterator[Path]:
    """Those of the rows, and those that say which rows are used."""
    yield from sorted(path for path in (root / "meta").rglob("*") if path.is_file())
    yield from dict.fromkeys(record.data for record in records)


def _videos(root: Path, records: Sequence[_Record], keys: dict[str, str], config: DataConfig) -> list[Path]:
    """The files of these episodes. Raises DataError for an episode that lacks one."""
    found = []
    for record in records:
        for view, key in keys.items():
            video = record.videos[view]
            if isinstance(video, str):
                raise DataError(
                    f"{video}, so {_name(record)} has no video of {key}; leave the episode out with data.exclude, "
                    f"whose file `rynnvla data validate lerobot:{root} --fix OUT.json{_cameras(config)}` writes"
                )
            found.append(video[0])
    return found


def _cameras(config: DataConfig) -> str:
    """The options of a command that looks at the cameras of this config: without them faults of others are warnings."""
    default = DataConfig()
    keys = {key: getattr(config, key) for key in ("front", "wrist", "extra_views")}
    options = (f"--config.data.{key}={value}" for key, value in keys.items() if value != getattr(default, key))
    return "".join(f" {shlex.quote(option)}" for option in options)


def _recorded(video: tuple[Path, float] | str) -> bool:
    return not isinstance(video, str) and video[0].is_file()


def _name(record: _Record) -> str:
    return f"episode_{record.index:06d}"


def _camera_keys(root: Path, info: Info, config: DataConfig, views: tuple[str, ...] | None) -> dict[str, str]:
    cameras = info.cameras("video", "image")
    keys = info.camera_keys(config)
    if views is None:
        return {view: key for view, key in keys.items() if key in cameras}
    for view in views:
        if keys[view] not in cameras:
            has = f"its cameras are {listing(cameras, 20)}" if cameras else "it has no cameras"
            if view in config.extra_views:
                raise ConfigError(f"data.extra_views names {view!r}, which {root} does not have; leave it out: {has}")
            free = [key for key in cameras if key not in [keys[v] for v in views]]  # of no other view
            set_it = f"set --config.data.{view} to one of {listing(free, 20)}" if free else has
            if view == "wrist":
                set_it += f"{', or' if free else ';'} {ONE_CAMERA}"
            elif cameras and not free:
                set_it = f"set --config.data.{view} to one of {listing(cameras, 20)}, and {ONE_CAMERA}"
            raise ConfigError(f"data.{view} is {keys[view]!r}, which {root} does not have; {set_it}")
    return {view: keys[view] for view in views}


def meaning_of(root: Path, info: Info, config: DataConfig, largest: np.ndarray | None = None) -> Meaning:
    """Guessed from names, robot and the `largest` state by column, and overridden as the user says. Raises as both."""
    where = f"{root}/meta/info.json"
    keys = config.lerobot.state, config.lerobot.action
    state, action = (flat_names(info.features[key].names, info.width(key), key, where) for key in keys)
    widths = (info.width(keys[0]), info.width(keys[1]))
    unnamed = ("", "") if widths[0] == widths[1] else ("state_", "action_")
    return resolve(guess(info.robot, state, action, widths, largest, unnamed), config.columns, root)


def _check_counts(root: Path, info: Info, records: Sequence[_Record]) -> None:
    """Raises DataError when an episode is described twice, or info.json counts others than there are."""
    if twice := [index for index, n in Counter(r.index for r in records).items() if n > 1]:
        raise DataError(f"{root}/meta/episodes: episode {twice[0]} is listed twice; keep one entry")
    for name, stated, counted in (
        ("total_episodes", info.total_episodes, len(records)),
        ("total_frames", info.total_frames, sum(r.length for r in records)),
    ):
        if stated is not None and stated != counted:
            raise DataError(f"{root}/meta/info.json: {name} is {stated} but the episodes have {counted}; correct it")


def _lines(path: Path, cls: type[T]) -> list[T]:
    try:
        return [
            metadata.parse(cls, row, f"{path} line {number + 1}") for number, row in enumerate(files.read_lines(path))
        ]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy the data set again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; correct it, or copy the file again") from None


def _records_v3(root: Path, info: Info, keys: dict[str, str]) -> list[_Record]:
    paths = lerobot_format.episode_tables(root)
    if not paths:
        raise DataError(f"{root}/meta/episodes contains no parquet file; copy the data set again")
    records = []
    columns = lerobot_format.EPISODE_COLUMNS | lerobot_format.video_columns(list(keys.values()))
    for file in paths:
        for i, found in enumerate(lerobot_format.episode_rows(file, columns)):
            row = _checked(columns, found, f"{file} row {i}")
            videos: dict[str, tuple[Path, float] | str] = {}
            for view, key in keys.items():
                if empty := lerobot_format.lacking_video(row, key):
                    videos[view] = f"{file} row {i}: {empty} is empty"
                    continue
                numbers = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
                path = info.path(root, "video_path", video_key=key, **numbers)
                videos[view] = (path, row[f"videos/{key}/from_timestamp"])
            numbers = {n: row[f"data/{n}"] for n in ("chunk_index", "file_index")}
            data = info.path(root, "data_path", **numbers)
            records.append(_Record(row["episode_index"], row["length"], data, videos))
    return records


def _checked(columns: dict[str, Any], row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return metadata.checked(columns, row, where)
    except metadata.MetadataError as error:
        raise DataError(f"{error}; correct it, or copy the file again") from None


def _records_v2(root: Path, info: Info, keys: dict[str, str]) -> list[_Record]:
    records = []
    for episode in _lines(root / "meta" / "episodes.jsonl", EpisodeLine):
        index = episode.episode_index
        videos: dict[str, tuple[Path, float] | str] = {
            view: (info.path_v2(root, "video_path", index, video_key=key), 0.0) for view, key in keys.items()
        }
        records.append(_Record(index, episode.length, info.path_v2(root, "data_path", index), videos))
    return records


def _tasks(root: Path, info: Info) -> dict[int, str]:
    """The instructions by task_index."""
    if info.v3:
        path = root / "meta" / "tasks.parquet"
        text = lerobot_format.task_column(path)
        rows = parquet_files.rows(path, {"task_index": metadata.Index, text: metadata.Text})
        found = [Task(row["task_index"], row[text]) for row in rows]
    else:
        path = root / "meta" / "tasks.jsonl"
        found = _lines(path, Task)
    tasks: dict[int, str] = {}
    for task in found:
        if task.task_index in tasks:
            raise DataError(f"{path}: task_index {task.task_index} occurs twice; keep one text for each")
        tasks[task.task_index] = task.task
    return tasks


def _clip_requests(
    root: Path,
    records: Sequence[_Record],
    keep: set[int],
    keys: dict[str, str],
    headers: Mapping[Path, Header],
    fps: float,
) -> list[ClipRequest]:
    """One request per view of each episode to keep, by episode and then by view."""
    files: dict[Path, list[tuple[int, Segment]]] = defaultdict(list)
    for i, record in enumerate(records):
        for path, seconds in dict.fromkeys(v for v in record.videos.values() if not isinstance(v, str)):
            files[path].append((i, Segment(seconds, record.length, i in keep)))
    places: dict[Path, tuple[dict[int, int], bool]] = {}
    for path, segments in files.items():
        if path not in headers:  # no episode to keep is in it
            continue
        found = placed([s for _, s in segments], headers[path].frames, fps)
        places[path] = {i: first for (i, _), first in zip(segments, found.firsts, strict=True)}, found.in_order
        end = 0
        for i, first in places[path][0].items():
            if i in keep and first < end:
                raise DataError(
                    f"{root}: episode {records[i].index} starts at frame {first} of {path}, inside the episode before "
                    f"it; correct from_timestamp in meta/episodes, or {LEAVE_OUT}"
                )
            end = first + records[i].length if i in keep else end
    requests = []
    for i in sorted(keep):
        for view in keys:
            video = records[i].videos[view]
            if not isinstance(video, str):  # `_videos` has refused those
                firsts, in_order = places[video[0]]
                requests.append(ClipRequest(video[0], firsts[i], records[i].length, fps, in_order))
    return requests


class _Pictures:
    """A camera that is stored as pictures in the data files. The first picture's size is that of all."""

    def __init__(self, key: str):
        self._key = key
        self._path: Path | None = None
        self._size: tuple[int, int] | None = None

    def of(self, record: _Record, first: int) -> ParquetPictures:
        """Those of an episode whose rows begin at row `first` of its file. Raises DataError."""
        if record.data != self._path:
            parquet_pictures.check_column(record.data, self._key)
            self._path = record.data
        self._size = self._size or parquet_pictures.size(record.data, self._key, first)
        return ParquetPictures(str(record.data), self._key, first, record.length, *self._size)


class _Rows:
    """Rows of episodes from parquet files, one file in memory at a time."""

    def __init__(self, info: Info, names: LeRobotConfig):
        self._widths = {key: info.width(key) for key in (names.state, names.action)}
        self._before: tuple[int, int] | None = None  # the last episode, and the `index` of its last row
        self._jumps = 0
        self._path: Path | None = None
        self._table: dict[str, np.ndarray] = {}

    def of(self, record: _Record, fps: float) -> tuple[dict[str, np.ndarray], int]:
        """(checked columns of one episode, state and action float32 [N, width]; its first row in the file)."""
        if record.data != self._path:
            self._table, self._path = lerobot_format.read_rows(record.data, self._widths), record.data
        where = np.flatnonzero(self._table["episode_index"] == record.index)
        rows = {name: column[where] for name, column in self._table.items()}
        label = f"{record.data}: episode {record.index}"
        if len(where) != record.length or record.length < 1:
            raise DataError(
                f"{label} has {len(where)} rows but meta/episodes states {record.length}; correct one of them, or "
                f"{LEAVE_OUT}"
            )
        if (np.diff(where) != 1).any():
            raise DataError(f"{label}: its rows are not next to each other; sort them by frame_index, or re-record it")
        if "frame_index" in rows and (rows["frame_index"] != np.arange(record.length)).any():
            raise DataError(f"{label}: frame_index is not 0..{record.length - 1} in order; sort or re-record it")
        if "index" in rows:
            self._jumps += lerobot_format.jump(self._before, record.index, rows["index"]) is not None
            self._before = record.index, int(rows["index"][-1])
        # The first stamp may be any: some recorders start the clock before the first frame. Not "more than": a NaN is
        # wrong, too.
        times = rows["timestamp"] - rows["timestamp"][0]
        if not (np.abs(times - np.arange(record.length) / fps) <= 0.5 / fps).all():
            raise DataError(
                f"{label}: time stamps are not frame_index / {fps:g} fps; correct the fps of meta/info.json or the "
                f"stamps, or {LEAVE_OUT}"
            )
        for key in self._widths:
            if not np.isfinite(rows[key]).all():
                bad = int(np.flatnonzero(~np.isfinite(rows[key]).all(1))[0])
                raise DataError(f"{label}: {key} is not finite at frame {bad}; {LEAVE_OUT}")
        return rows, int(where[0])

    def report(self, root: Path, episodes: int) -> None:
        """Says on stderr in how many episodes `index` jumps, which deleted and merged episodes leave behind."""
        if self._jumps:
            print(
                f"{bucket_cache.named(f'lerobot:{root}')}: column index does not count on in {self._jumps} of "
                f"{episodes} episodes, as after deleting or merging some; it is not used",
                file=sys.stderr,
            )
