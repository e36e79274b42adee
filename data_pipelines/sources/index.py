"""Index of facts that a source needs about each file before training; found once and kept between starts.

Every data set has one file of JSON lines under ${XDG_CACHE_HOME:-~/.cache}/rynnvla_jax/index, which is only appended
to. A line is valid while its file has the same size and modification time; an incomplete line, left by a killed
process, is ignored and its file read again. Nothing is written into the data set.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.episode import DataError
from data_pipelines.sources.exclude import DamagedEpisodesError
from data_pipelines.video import close_files, whole_clip
from rynnvla_jax.errors import brief
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import bucket_cache, files

Row = dict[str, Any]  # JSON values

_LONGEST = 1000  # characters of a path
_THREADS = 8
_BATCH = 32  # files that a thread takes at a time; a killed process loses at most this many per thread
_ENOUGH = 20  # damaged files after which the search stops


def find_files(root: Path, suffixes: Collection[str]) -> list[str]:
    """Names, relative to `root`, of the files with these endings ("/" between folders), in natural order."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}); correct its permissions") from None

    names = []
    for folder, _, names_in in os.walk(root, onerror=unreadable):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        names += [
            f if inside == "." else f"{inside}/{f}"
            for f in names_in
            if os.path.splitext(f)[1].lower() in suffixes and not f.startswith("._")  # macOS's, beside the real ones
        ]
    return sorted(names, key=_natural)


def _natural(name: str) -> list:
    parts: list = re.split(r"([0-9]+)", name)  # text, number, text, ...
    parts[1::2] = map(int, parts[1::2])
    return parts


def index_files(
    key: str, root: Path, names: Sequence[str], read: Callable[[Path], Row], progress: bool = True
) -> list[Row]:
    """One row per file, in the order of `names` (relative to `root`, or absolute).

    Args:
      key: identifies the content of the rows and how they were found; rows with another key are not used.
      read: checks one file and returns its row. Raises DataError; called in several threads.

    Raises DamagedEpisodesError, by the names of files, with the first damaged one and the number of others. Intact
    files are not read again.
    """
    if (odd := next((n for n in names if not n.isprintable() or len(n) > _LONGEST), None)) is not None:
        raise DataError(f"{root}: {brief(odd)} cannot be the name of a file here; rename it, or correct what lists it")
    path = _cache_file(key, root)
    known = _known(path)
    rows: list[Row] = []
    faults: dict[str, tuple[Path, str]] = {}

    def look(batch: Sequence[str]) -> list[tuple[str, Any, Row | DataError, bool]]:
        return [_look(root, name, known.get(name), read) for name in batch]

    _prepare(path)
    pool = ThreadPoolExecutor(_THREADS)
    batches = [names[i : i + _BATCH] for i in range(0, len(names), _BATCH)]
    try:
        with (
            progress_bar(total=len(names), desc=f"{root.name}: index", show=progress) as bar,
        ):
            for found in pool.map(look, batches):
                new = []
                for name, stat, row, is_new in found:
                    if isinstance(row, DataError):
                        faults[name] = root / name, str(row)
                    else:
                        rows.append(row)
                        if is_new:
                            new.append([name, stat.st_size, stat.st_mtime_ns, row])
                files.append_lines(path, new)
                bar.update(len(found))
                if len(faults) >= _ENOUGH:
                    break
    finally:
        pool.shutdown(cancel_futures=True)
    if faults:
        raise DamagedEpisodesError(faults, "or more other files" if len(faults) >= _ENOUGH else "other files")
    return rows


def index_videos(root: Path, names: Sequence[str], progress: bool = True) -> list[Row]:
    """Rows `frames`, `fps`, `height`, `width` of videos; checks that the last frame decodes. Raises DataError."""
    return index_files("video 2", root, names, _video, progress)


def _video(path: Path) -> Row:
    try:
        clip = whole_clip(path)
    finally:
        close_files()
    return {"frames": clip.count, "fps": clip.fps, "height": clip.height, "width": clip.width}


def _look(
    root: Path, name: str, known: tuple[int, int, Row] | None, read: Callable[[Path], Row]
) -> tuple[str, os.stat_result | None, Row | DataError, bool]:
    try:
        stat = os.stat(os.path.join(root, name))  # no Path: there may be a million
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        fault = DataError(f"{root / name} {what}; copy the data set again, or leave it out with data.exclude")
        return name, None, fault, False
    if known and known[:2] == (stat.st_size, stat.st_mtime_ns):
        return name, stat, known[2], False
    try:
        return name, stat, read(root / name), True
    except DataError as error:
        return name, stat, error, False


def _cache_file(key: str, root: Path) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(f"{key}\0{bucket_cache.named(str(root.resolve()))}".encode()).hexdigest()[:24]
    return base / "rynnvla_jax" / "index" / f"{key.split()[0]}-{digest}.jsonl"


def _known(path: Path) -> dict[str, tuple[int, int, Row]]:
    return {name: (size, time, row) for name, size, time, row in _lines(path)}


def _lines(path: Path) -> Iterator[list]:
    if not path.exists():
        return
    for _, entry in files.json_lines(
        path
    ):  # some incomplete after a kill, or with two processes on one network file system
        if isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], dict):
            yield entry


def _prepare(path: Path) -> None:
    """Makes the cache ready for whole lines to be added."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append_lines(path, [])
    except OSError as error:
        raise DataError(f"index {path} cannot be written ({error}); set XDG_CACHE_HOME to a writable folder") from None
