"""Copies of objects on this machine, for readers that need whole files: of one object, or of all below a prefix.

    ${RYNNVLA_CACHE:-~/.cache/rynnvla_jax}/buckets/DIGEST/      of one URL
        gs/BUCKET/PREFIX/...        the copies; named as in the bucket
        about.json                  its URL, and the bytes that its objects have
        fetch.lock, use.lock        see below

A copy has the size and time of its `buckets.Version`, by which a changed object is noticed and fetched again, and
indices of files (`data_pipelines.sources.index`) stay valid. A file appears when it is complete. Of the processes of a
machine one fetches: it holds fetch.lock. Each keeps a shared lock on use.lock as long as it lives, so no copy that a
living process has opened makes room for another. The copies of other URLs do, those first whose last use is longest
ago, when all together would take more than RYNNVLA_CACHE_GB gigabytes (100). Locks are the kernel's: a killed process
holds none.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from rynnvla_jax.progress import Bar, progress_bar
from rynnvla_jax.storage import files, hub

if TYPE_CHECKING:  # its packages are extras
    from rynnvla_jax.storage.buckets import BucketPath, Version

T = TypeVar("T")

LIMIT_GB = 100.0
PATIENCE = 600.0  # seconds that a store which does not answer is waited for
_PAUSE = 5.0  # between two tries
_ROUNDS = 3  # of an object that changes while it is fetched
_THREADS = 16
_UNITS = (1, 10**6, 10**9)  # ns in which file systems keep times


class CacheError(OSError):
    """A copy that cannot be made; the message says what to do."""


def copy(path: Path, show: bool = True) -> Path:
    """The local copy of an object, or of all objects below a prefix, made or renewed if needed; a local path as it is.

    `show`: a progress bar on stderr. The copy stays while this process lives.

    Raises:
      CacheError: it does not fit, or its folder cannot be written.
      FileNotFoundError: there is no such object.
      BucketError: the store refuses, or did not answer for PATIENCE seconds.
    """
    if not files.is_bucket(path):
        return path
    url = str(path)
    entry = _root() / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        entry.mkdir(parents=True, exist_ok=True)
        _use(entry)
    except OSError as error:
        raise CacheError(
            f"{entry} cannot be made ({error.strerror}); set RYNNVLA_CACHE to a folder that can be written"
        ) from None
    target = entry / url.replace("://", "/", 1)
    with files.locked(entry / "fetch.lock", said=f"waiting for another process of this machine that copies {path}"):
        _renew(cast("BucketPath", path), entry, target, show)
    return target


def named(text: str) -> str:
    """`text` with the paths of copies replaced by those of their objects, also on the Hub, for messages and names."""
    return hub.named(_in_text(str(_root())).sub(r"\1://", text))


@functools.cache
def _in_text(root: str) -> re.Pattern:
    return re.compile(re.escape(root) + r"/[0-9a-f]{24}/(gs|s3)/")


def _root() -> Path:
    base = Path(os.environ.get("RYNNVLA_CACHE") or "~/.cache/rynnvla_jax").expanduser()
    return Path(os.path.abspath(base)) / "buckets"


# Locks

_held: dict[Path, int] = {}  # use.lock -> its open file


def _use(entry: Path) -> None:
    path = entry / "use.lock"
    if path not in _held or not path.exists():  # the cache may have been deleted by hand
        _held.pop(path, None)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(file, fcntl.LOCK_SH)
        if _held.setdefault(path, file) != file:  # another thread was faster
            os.close(file)
    os.utime(path)


# Fetching


def _renew(path: "BucketPath", entry: Path, target: Path, show: bool) -> None:
    """Makes `target` a copy of `path`. For the holder of fetch.lock."""
    partial = entry / "partial"
    for _ in range(_ROUNDS):
        wanted = _patiently(path.versions)
        if not wanted:
            raise FileNotFoundError(2, os.strerror(2), str(path))
        if odd := next((name for name in wanted if {"..", "."} & set(name.split("/"))), None):
            raise CacheError(f"{path}/{odd} has no name of a file; rename the object")
        missing = {name: v for name, v in wanted.items() if _differs(target / name if name else target, v)}
        if not missing:
            _drop_others(target, wanted)
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        partial.mkdir()
        _make_room(path, entry, sum(v.size for v in wanted.values()), sum(v.size for v in missing.values()))
        _fetch(path, target, partial, missing, show)
        shutil.rmtree(partial, ignore_errors=True)
    raise CacheError(f"{path} changes while it is read; wait until whoever writes it has finished")


def _fetch(path: "BucketPath", target: Path, partial: Path, missing: "dict[str, Version]", show: bool) -> None:
    def one(numbered: "tuple[int, tuple[str, Version]]", bar: Bar) -> None:
        number, (name, version) = numbered
        aside, place = partial / str(number), target / name if name else target
        with contextlib.suppress(FileNotFoundError), files.naming(place):  # it was removed since: the next round sees
            _patiently(lambda: _download(path / name if name else path, aside, version))
            place.parent.mkdir(parents=True, exist_ok=True)
            os.utime(aside, ns=(version.time_ns, version.time_ns))
            aside.replace(place)
        bar.update(version.size)

    total = sum(version.size for version in missing.values())
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with progress_bar(total=total, desc=f"{path.name}: copy", unit="B", scale=True, show=show) as bar:
            for _ in pool.map(lambda item: one(item, bar), enumerate(missing.items())):
                pass
    finally:
        pool.shutdown(cancel_futures=True)


def _download(path: "BucketPath", aside: Path, version: "Version") -> None:
    """Raises BucketError where fewer bytes came."""
    from rynnvla_jax.storage import buckets

    path.download(aside, version.size)
    if (found := aside.stat().st_size) != version.size:
        raise buckets.BucketError(f"{path} has {version.size} bytes, but {found} came; start again")


def _patiently(work: Callable[[], T]) -> T:
    """Tries again while the store does not answer, for PATIENCE seconds."""
    from rynnvla_jax.storage import buckets

    began = time.monotonic()
    while True:
        try:
            return work()
        except buckets.BucketError as error:
            if not buckets.passing(error) or time.monotonic() - began > PATIENCE:
                raise
        time.sleep(_PAUSE)


def _differs(copy: Path, version: "Version") -> bool:
    try:
        state = os.stat(copy)
    except OSError:
        return True
    times = (version.time_ns - version.time_ns % unit for unit in _UNITS)
    return state.st_size != version.size or state.st_mtime_ns not in times


def _drop_others(target: Path, wanted: "dict[str, Version]") -> None:
    """Removes copies of objects that are no longer in the bucket."""
    for folder, _, names in os.walk(target):
        inside = os.path.relpath(folder, target).replace(os.sep, "/")
        for name in names:
            if (name if inside == "." else f"{inside}/{name}") not in wanted:
                os.unlink(os.path.join(folder, name))


# Room


def _make_room(path: "BucketPath", entry: Path, size: int, missing: int) -> None:
    """Notes that `entry` takes `size` bytes, of which `missing` will be fetched, after removing others if needed.

    Raises CacheError where that is not enough.
    """
    limit = _limit()
    if size > limit:
        raise CacheError(
            f"{path} has {size / 1e9:.3g} GB, and copies of buckets may take {limit / 1e9:.3g} GB; "
            "set RYNNVLA_CACHE_GB to more, and, where that does not fit, RYNNVLA_CACHE to a folder of a larger disk"
        )
    with files.locked(entry.parent / "room.lock"):
        others = {other: _bytes(other) for other in entry.parent.iterdir() if other != entry and other.is_dir()}
        over = sum(others.values()) + size - limit
        for other in sorted(others, key=_last_use):
            if over > 0:
                over -= _remove(other, others[other], over)
        if over > 0:
            raise CacheError(
                f"{path} has {size / 1e9:.3g} GB, but other copies of buckets in {entry.parent} that are in use leave "
                f"{max(0, size - over) / 1e9:.3g} of {limit / 1e9:.3g} GB; set RYNNVLA_CACHE_GB to more, or "
                "RYNNVLA_CACHE to another folder"
            )
        if (free := shutil.disk_usage(entry).free) < missing:
            raise CacheError(
                f"{path}: {missing / 1e9:.3g} GB are to be copied, but the disk of {entry} has {free / 1e9:.3g} GB "
                "free; make room, or set RYNNVLA_CACHE to a folder of a larger disk"
            )
        files.write_json(entry / "about.json", {"url": str(path), "bytes": size})


def _limit() -> float:
    """In bytes."""
    text = os.environ.get("RYNNVLA_CACHE_GB") or str(LIMIT_GB)
    try:
        return float(text) * 1e9
    except ValueError:
        raise CacheError(f"RYNNVLA_CACHE_GB is {text!r}, which is no number of gigabytes; correct it") from None


def _bytes(entry: Path) -> int:
    try:
        return int(files.read_json(entry / "about.json")["bytes"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0  # a process was killed before it fetched anything


def _last_use(entry: Path) -> float:
    with contextlib.suppress(OSError):
        return (entry / "use.lock").stat().st_mtime
    return 0.0


def _remove(entry: Path, held: int, needed: float) -> int:
    """Removes files of an entry of `held` bytes, unless a process uses it, until `needed` are free; how many are."""
    freed = 0
    with files.locked(entry / "use.lock", wait=False) as unused:
        if not unused or not held:
            return 0
        for folder, _, names in os.walk(entry):
            for path in (Path(folder, name) for name in names if Path(folder) != entry):
                if freed < needed:
                    freed += path.stat().st_size
                    path.unlink()
        freed = freed if freed >= needed else held  # what was never fetched, too
        about = files.read_json(entry / "about.json")
        files.write_json(entry / "about.json", {**about, "bytes": max(0, held - freed)})
    return freed
