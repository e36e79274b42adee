"""States and actions of all episodes of a source, one step after another in one array that is mapped from disk.

    ${RYNNVLA_CACHE:-~/.cache/rynnvla_jax}/rows/KIND-DIGEST/     of a source and the settings that it is read with
        STAMP.npy     float32 [N, W]: state, action, and where the source has them origin and world_to_camera
        build.lock    held by the process that makes the array; others wait

An example without frames is a few rows, and opening its recording takes most of its time; from here a batch is gathered
at once. STAMP is a digest of the names, sizes and times of the files that the source was read from, so the array of
files that have changed is not found, and is made anew. Besides, the first and the last episode are read and compared.
Nothing here is needed: without space for it, examples are read from their recordings. It can be deleted at any time;
when an array is made, those that were not used for 30 days are.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipelines.episode import DataError, Episode, Episodes
from rynnvla_jax.actions import Statistics, normalize_actions, relative_chunks
from rynnvla_jax.config import DataConfig
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import arrays, bucket_cache, files

T = TypeVar("T")

_VERSION = 1
_UNUSED = 30 * 86400  # seconds after its last use, when an array goes
_THREADS = 8  # that look at files
_TOGETHER = 64  # episodes in memory while the array is written, and files that a thread looks at
# Settings that do not change states and actions. A new one counts until it is named here.
_INDIFFERENT = frozenset(
    ("source", "mixture", "max_damaged", "front", "wrist", "extra_views", "chunk", "normalization", "percentile_range")
    + ("frame_codes", "num_threads", "num_workers", "image")
)


class Rows:
    """The array of one source. `lengths` int64 [n] are the steps of its episodes, `like` is any of them; `kept` are the
    numbers of those that are used (None: all), which are numbered anew."""

    def __init__(self, path: Path, lengths: np.ndarray, like: Episode, kept: np.ndarray | None = None):
        """Raises OSError, DamagedArrayError when there is no such array."""
        self.path, self._whole, self._kept = path, lengths, kept
        used = slice(None) if kept is None else kept
        self.lengths, self._starts = lengths[used], (np.cumsum(lengths) - lengths)[used]
        # No views and texts: this goes to worker processes, which map the array themselves.
        empty = {name: part[:0] for name, part in _each(like).items()}
        self._like = replace(like, name="", texts=(), text_of=like.text_of[:0], views={}, codes={}, **empty)
        self._table = np.asarray(arrays.map_array(path))  # a plain view: np.memmap costs time at every access
        shape = int(lengths.sum()), _width(like)
        if self._table.dtype != np.float32 or self._table.shape != shape:
            raise arrays.DamagedArrayError(f"{path} is {self._table.dtype} {self._table.shape}, not {shape}")
        self._parts = _split(self._table, like)

    def __reduce__(self):
        return Rows, (self.path, self._whole, self._like, self._kept)

    def part(self, kept: np.ndarray) -> "Rows":
        """The rows of the episodes of these numbers."""
        return Rows(self.path, self._whole, self._like, kept)

    def episode(self, number: int) -> Episode:
        """States and actions of an episode, without name, texts and views."""
        start = int(self._starts[number])
        part = slice(start, start + int(self.lengths[number]))
        return replace(self._like, **{name: rows[part] for name, rows in self._parts.items()})

    def chunks(self, episodes: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """`Episode.chunk` of many, float32 [B, length, A]: all of `length` steps, which must be in their episodes."""
        whole, steps = self._parts, self._starts[episodes] + starts
        world = whole.get("origin"), whole.get("world_to_camera")
        return relative_chunks(whole["action"], whole["state"], steps, length, self._like.columns, *world)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Numbers of examples of several sources -> a batch of normalised relative chunks.

    Example i of source s has the number `first[s]` + i; `ends[s]` is the running sum of starts per episode.
    """

    rows: tuple[Rows, ...]
    first: np.ndarray
    ends: tuple[np.ndarray, ...]
    statistics: Statistics
    length: int
    mode: str

    def __call__(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        wanted = np.asarray(numbers, np.int64)
        of = np.searchsorted(self.first, wanted, side="right") - 1
        width = len(self.statistics.rel_mean_action)
        relative = np.empty((len(wanted), self.length, width), np.float32)
        for source in np.unique(of):
            chosen, ends = of == source, self.ends[source]
            number = wanted[chosen] - self.first[source]
            # right: a number that equals a running sum is the first start of the next episode.
            episodes = np.searchsorted(ends, number, side="right")
            starts = number - np.where(episodes, ends[episodes - 1], 0)
            relative[chosen] = self.rows[source].chunks(episodes, starts, self.length)
        return {
            "actions": normalize_actions(relative, self.statistics, self.mode),
            "actions_pad": np.zeros(relative.shape[:2], bool),
            "damaged": np.zeros((len(wanted), 1), np.int32),
            **({"source": of.astype(np.int32)} if len(self.rows) > 1 else {}),
        }


def open_rows(source: Episodes, config: DataConfig, progress: bool = True) -> Rows | None:
    """The rows of a source, which are made if they are not there or not of its files.

    None, with a line on stderr that says why, where that is impossible: the source is not in files, an episode is
    damaged, the disk is full.
    """
    if source.whole is not None and source.kept is not None:  # one array, whatever part of it is used
        rows = open_rows(source.whole, config, progress)
        return rows and rows.part(source.kept)
    if source.files is None:
        return None
    folder = _folder(source, config)
    try:
        with files.naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{_stamp(source, config)}.npy"
            with files.locked(folder / "build.lock", said=f"waiting for another process that makes {path}"):
                return _opened(source, path, max(1, config.num_threads), progress)
    except DataError as error:
        reason, remedy = str(error), "repair the episode, or leave it out with data.exclude"
    except OSError as error:
        reason, remedy = error.strerror or str(error), "set RYNNVLA_CACHE to a folder that can be written and has room"
    print(
        f"{source.source}: states and actions are not kept in {folder} ({reason}), so every example opens its "
        f"recording, which is slower; {remedy}",
        file=sys.stderr,
        flush=True,
    )
    return None


def _opened(source: Episodes, path: Path, threads: int, progress: bool) -> Rows:
    first = source[0]
    try:
        rows = Rows(path, source.lengths, first)
        if all(_same(rows.episode(i), source[i]) for i in (0, len(source) - 1)):
            with contextlib.suppress(OSError):  # another user's
                os.utime(path)
            return rows
    except FileNotFoundError:
        pass
    except arrays.DamagedArrayError as error:
        print(f"{error}; it is made again", file=sys.stderr, flush=True)
    _write(source, first, path, threads, progress)
    for other in path.parent.parent.glob("*/*.npy"):
        changed = other.parent == path.parent and other != path  # its files have
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if changed or time.time() - other.stat().st_mtime > _UNUSED:
                other.unlink()  # a process that reads it keeps it
    return Rows(path, source.lengths, first)


def _write(source: Episodes, first: Episode, path: Path, threads: int, progress: bool) -> None:
    """Raises OSError when there is no space, DataError for an episode that is damaged or unlike `first`."""
    files.remove_partial(path.parent)  # of killed processes; this one has the lock
    shape = int(source.lengths.sum()), _width(first)
    if shutil.disk_usage(path.parent).free < 4 * shape[0] * shape[1]:
        raise OSError(errno.ENOSPC, f"{4 * shape[0] * shape[1] / 1e9:.3g} GB do not fit", str(path.parent))
    with (
        files.replacing(path) as partial,
        partial.open("wb") as file,
        ThreadPoolExecutor(threads) as pool,
        progress_bar(total=len(source), desc=f"{source.source}: rows", unit="episode", show=progress) as bar,
    ):
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for numbers in _parted(range(len(source)), _TOGETHER):
            for number, episode in zip(numbers, pool.map(source.__getitem__, numbers), strict=True):
                if len(episode) != source.lengths[number] or _world(episode).keys() != _world(first).keys():
                    raise DataError(f"{episode.name} was changed during the run; start the run again")
                file.write(_join(episode))  # not by a mapped array: a full disk would end the process
            bar.update(len(numbers))


def _folder(source: Episodes, config: DataConfig) -> Path:
    settings = {key: value for key, value in asdict(config).items() if key not in _INDIFFERENT}
    settings["columns"] = source.columns.to_json()  # which of them are used, too
    name = bucket_cache.named(source.source)
    digest = hashlib.sha256(json.dumps([_VERSION, name, settings], sort_keys=True).encode()).hexdigest()[:24]
    base = Path(os.environ.get("RYNNVLA_CACHE") or "~/.cache/rynnvla_jax").expanduser()
    return Path(os.path.abspath(base)) / "rows" / f"{name.partition(':')[0]}-{digest}"


def _stamp(source: Episodes, config: DataConfig) -> str:
    """Raises OSError for a file that is gone."""
    assert source.files is not None
    digest = hashlib.sha256(source.lengths.astype("<i8").tobytes())
    if config.exclude:
        digest.update(files.place(config.exclude).read_bytes())
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in _parted(source.files(), _TOGETHER * _THREADS * 8):
            for lines in pool.map(_states, _parted(part, _TOGETHER)):
                digest.update(lines)
    return digest.hexdigest()[:24]


def _states(paths: Iterable[str | Path]) -> bytes:
    """A line per file: its name, size and time."""

    def line(path: str | Path) -> str:
        state = path.stat() if files.is_bucket(path) else os.stat(path)  # type: ignore[union-attr]  # a BucketPath
        return f"{path} {state.st_size} {state.st_mtime}\n"

    return "".join(map(line, paths)).encode()


def _parted(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


# The columns of the array


def _world(episode: Episode) -> dict[str, Any]:
    parts = {"origin": episode.origin, "world_to_camera": episode.world_to_camera}
    return {name: part for name, part in parts.items() if part is not None}


def _each(episode: Episode) -> dict[str, Any]:
    return {"state": episode.state, "action": episode.action, **_world(episode)}


def _width(like: Episode) -> int:
    return sum(int(np.prod(part.shape[1:])) for part in _each(like).values())


def _join(episode: Episode) -> bytes:
    parts = [np.asarray(part, "<f4").reshape(len(episode), -1) for part in _each(episode).values()]
    return np.concatenate(parts, axis=1).tobytes()


def _split(table: np.ndarray, like: Episode) -> dict[str, Any]:
    """Views of the columns [N, W]."""
    parts, at = {}, 0
    for name, part in _each(like).items():
        width = int(np.prod(part.shape[1:]))
        parts[name] = table[:, at : at + width].reshape(len(table), *part.shape[1:])
        at += width
    return parts


def _same(one: Episode, other: Episode) -> bool:
    return _join(one) == _join(other)
