"""Writes LeRobot v3.0 data sets: each episode into its own folder, then all of them into shared files.

Source: the layout of LeRobot 0.4's own recordings. Departs from them where they are wrong: statistics of images are
over the pixels of every tenth frame, and quantiles over all rows instead of averaged over episodes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rynnvla_jax.storage import files
from rynnvla_jax.storage.mp4 import Mp4Writer

STATE, ACTION = "observation.state", "action"
_IMAGES = "observation.images."
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_SAMPLED = 10  # every so many frames count in the statistics of images
_DATA_MB, _VIDEO_MB, _FILES_A_CHUNK = 100, 200, 1000
# Key frames for random access; no B-frames, so that clips join without encoding again. One thread, and no macroblock
# tree, so that bytes repeat: with it, on AVX-512, the same frames came out otherwise in one of ten episodes.
H264 = {"crf": "20", "preset": "veryfast", "g": "30", "bf": "0", "threads": "1", "mbtree": "0"}
_TICKS = 15360  # of the mp4 clock, a second


@dataclass(frozen=True)
class Robot:
    """What all episodes share. `names` are of the numbers in state and action."""

    type: str
    names: tuple[str, ...]
    cameras: tuple[str, ...]
    size: int  # pixels a side
    fps: int


class EpisodeWriter:
    """One episode in `folder`: rows.npz and one video per camera. A context manager; complete after its exit."""

    def __init__(self, folder: Path, robot: Robot):
        self._folder, self._robot = folder, robot
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._histograms = np.zeros((len(robot.cameras), 3, 256), np.int64)
        self._videos = [Mp4Writer(folder / f"{c}.mp4", robot.fps, H264, _mp4()) for c in robot.cameras]

    def __enter__(self) -> "EpisodeWriter":
        return self

    def add(self, state: np.ndarray, action: np.ndarray, images: Mapping[str, np.ndarray]) -> None:
        """One step: float32 [A] twice, and uint8 [size, size, 3] by camera."""
        count = len(self._states)
        for i, camera in enumerate(self._robot.cameras):
            self._videos[i].add(images[camera])
            if count % _SAMPLED == 0:
                for channel in range(3):
                    self._histograms[i, channel] += np.bincount(images[camera][..., channel].ravel(), minlength=256)
        self._states.append(np.asarray(state, np.float32))
        self._actions.append(np.asarray(action, np.float32))

    def __len__(self) -> int:
        return len(self._states)

    def __exit__(self, *error) -> None:
        for video in self._videos:
            video.__exit__(*error)
        np.savez(self._folder / "rows.npz", state=self._states, action=self._actions, histograms=self._histograms)


def assemble(folders: Sequence[Path], texts: Sequence[str], out: Path, robot: Robot) -> None:
    """The data set of the episodes in `folders`, with their instructions; meta/info.json comes last."""
    episodes = [dict(np.load(folder / "rows.npz")) for folder in folders]
    lengths = np.array([len(e["state"]) for e in episodes])
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    tasks = list(dict.fromkeys(texts))
    rows = [
        {
            STATE: e["state"],
            ACTION: e["action"],
            "timestamp": (np.arange(n) / robot.fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, i),
            "index": firsts[i] + np.arange(n),
            "task_index": np.full(n, tasks.index(text)),
        }
        for i, (e, n, text) in enumerate(zip(episodes, lengths.tolist(), texts, strict=True))
    ]
    table = []
    for i, text in enumerate(texts):
        first, last = int(firsts[i]), int(firsts[i + 1])
        row = {"episode_index": i, "tasks": [text], "length": last - first}
        table.append({**row, "dataset_from_index": first, "dataset_to_index": last})
    _write_data(rows, table, out)
    for camera in robot.cameras:
        _write_videos([folder / f"{camera}.mp4" for folder in folders], lengths, camera, table, out, robot.fps)
    histograms = [e["histograms"] for e in episodes]
    for i, row in enumerate(table):
        for key, statistics in _statistics([rows[i]], [histograms[i]], robot).items():
            row.update({f"stats/{key}/{name}": value for name, value in statistics.items()})
        row.update({"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    pq.write_table(pa.Table.from_pylist(table), _made(out / "meta/episodes/chunk-000/file-000.parquet"))
    _write_tasks(tasks, out)
    files.write_json(_made(out / "meta/stats.json"), _statistics(rows, histograms, robot), indent=4)
    files.write_json(out / "meta/info.json", _info(robot, len(texts), int(firsts[-1]), len(tasks)), indent=4)


def _write_data(rows: list[dict[str, np.ndarray]], table: list[dict], out: Path) -> None:
    """Writes Parquet files with one row group per episode; records their positions in `table`."""
    width = rows[0][STATE].shape[1]
    vector = pa.list_(pa.float32(), width)
    schema = pa.schema(
        [(STATE, vector), (ACTION, vector), ("timestamp", pa.float32())]
        + [(name, pa.int64()) for name in ("frame_index", "episode_index", "index", "task_index")]
    )
    sizes = [sum(column.nbytes for column in row.values()) for row in rows]
    for chunk_and_file, members in _grouped(sizes, _DATA_MB):
        with pq.ParquetWriter(_made(out / "data" / _file(chunk_and_file, "parquet")), schema) as writer:
            for i in members:
                columns = [
                    pa.FixedSizeListArray.from_arrays(column.ravel(), width) if column.ndim == 2 else pa.array(column)
                    for column in rows[i].values()
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                table[i].update({"data/chunk_index": chunk_and_file[0], "data/file_index": chunk_and_file[1]})


def _write_videos(clips: list[Path], lengths: np.ndarray, camera: str, table: list[dict], out: Path, fps: int) -> None:
    """Concatenates the clips of one camera without decoding them; records their positions in `table`."""
    key = f"{_IMAGES}{camera}"
    for chunk_and_file, members in _grouped([file.stat().st_size for file in clips], _VIDEO_MB):
        path = _made(out / "videos" / key / _file(chunk_and_file, "mp4"))
        start = 0  # frames
        writer = av.open(str(path), "w", options=_mp4())
        stream = None
        for i in members:
            with av.open(str(clips[i])) as reader:
                source = reader.streams.video[0]
                assert source.time_base is not None  # we wrote it
                stream = stream or writer.add_stream_from_template(source)
                shift = round(start / fps / source.time_base)
                for packet in reader.demux(source):
                    if packet.dts is None or packet.pts is None:  # the end
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    writer.mux(packet)
            end = start + int(lengths[i])
            named: dict[str, float] = {"chunk_index": chunk_and_file[0], "file_index": chunk_and_file[1]}
            named.update({"from_timestamp": start / fps, "to_timestamp": end / fps})
            table[i].update({f"videos/{key}/{name}": value for name, value in named.items()})
            start = end
        writer.close()  # not after an error: see `storage.mp4`


def _write_tasks(tasks: list[str], out: Path) -> None:
    """The text is the index of a pandas table, as LeRobot looks it up."""
    index = "__index_level_0__"
    columns: list[dict[str, str | None]] = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
    ]
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [{**column, "metadata": None} for column in columns],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks)})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), _made(out / "meta/tasks.parquet"))


def _info(robot: Robot, episodes: int, frames: int, tasks: int) -> dict:
    size = robot.size
    vector = {"dtype": "float32", "shape": [len(robot.names)], "names": list(robot.names)}
    video = {
        "video.height": size,
        "video.width": size,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": robot.fps,
        "video.channels": 3,
        "has_audio": False,
    }
    image = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"], "info": video}
    scalars = {name: "int64" for name in ("frame_index", "episode_index", "index", "task_index")}
    return {
        "codebase_version": "v3.0",
        "robot_type": robot.type,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": _FILES_A_CHUNK,
        "data_files_size_in_mb": _DATA_MB,
        "video_files_size_in_mb": _VIDEO_MB,
        "fps": robot.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            STATE: vector,
            ACTION: vector,
            **{f"{_IMAGES}{camera}": image for camera in robot.cameras},
            **{
                name: {"dtype": dtype, "shape": [1], "names": None}
                for name, dtype in {"timestamp": "float32", **scalars}.items()
            },
        },
    }


def _statistics(rows: list[dict], histograms: list[np.ndarray], robot: Robot) -> dict[str, dict]:
    """{feature: {min, max, mean, std, count, quantiles}} over several episodes."""
    out = {}
    for key in rows[0]:
        values = np.concatenate([row[key] for row in rows])
        values = values[:, None] if values.ndim == 1 else values
        wide = values.astype(np.float64)
        out[key] = {
            "min": values.min(0).tolist(),
            "max": values.max(0).tolist(),
            "mean": wide.mean(0).tolist(),
            "std": wide.std(0).tolist(),
            "count": [len(values)],
            **{name: np.quantile(wide, q, axis=0).tolist() for name, q in _QUANTILES.items()},
        }
    frames = sum(-(-len(row["index"]) // _SAMPLED) for row in rows)
    for camera, counts in zip(robot.cameras, np.sum(histograms, axis=0), strict=True):
        out[f"{_IMAGES}{camera}"] = {**_pixel_statistics(counts), "count": [frames]}
    return out


def _pixel_statistics(counts: np.ndarray) -> dict[str, list]:
    """Of histograms int64 [3, 256], with values 0..1 and shape [3, 1, 1]."""
    shades = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ shades
    below = np.cumsum(share, 1)
    values = {
        "min": [shades[np.flatnonzero(c)[0]] for c in counts],
        "max": [shades[np.flatnonzero(c)[-1]] for c in counts],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ shades**2 - mean**2, 0)),
        **{name: [shades[np.searchsorted(b, q - 1e-12)] for b in below] for name, q in _QUANTILES.items()},
    }
    return {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in values.items()}


def _grouped(sizes: Sequence[int], limit_mb: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """((chunk, file), its members in order), each file at most the limit unless one member alone is larger."""
    members: list[int] = []
    number = filled = 0
    for i, size in enumerate(sizes):
        if members and filled + size > limit_mb * 2**20:
            yield divmod(number, _FILES_A_CHUNK), members
            members, number, filled = [], number + 1, 0
        members, filled = [*members, i], filled + size
    yield divmod(number, _FILES_A_CHUNK), members


def _file(chunk_and_file: tuple[int, int], suffix: str) -> str:
    return f"chunk-{chunk_and_file[0]:03d}/file-{chunk_and_file[1]:03d}.{suffix}"


def _mp4() -> dict[str, str]:
    return {"video_track_timescale": str(_TICKS)}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
