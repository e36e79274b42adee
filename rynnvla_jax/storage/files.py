"""Atomic writes of files and folders, their sums, and reading with errors that name the file.

A new file is first written as `.NAME.XXXXXXXX.partial` in the same folder. It is flushed to the disk, renamed, and the
folder is flushed too. A kill leaves the old file, or the new one, and perhaps a partial file; `contents` leaves
those out and `remove_partial` deletes them. In a bucket an object appears whole or not at all: what a library writes to
a file is written to a local one, then uploaded. Paths are pathlib's, or `buckets.BucketPath`s, which have its methods.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from rynnvla_jax.storage import hub

P = TypeVar("P", bound=Path)
T = TypeVar("T")

LEASE = "lease.json"  # see lease.py
_BLOCK = 2**16
_SILENT = 5.0  # seconds without a word while another process holds a lock
_COPIES = 8  # files of a folder that are copied at the same time
_PARTIAL = re.compile(r"\..+\.([0-9a-f]{8}\.partial|\d+)")  # with a process's number: of older versions
_ALMOST_BUCKET = re.compile(r"(gs|s3):/")  # also what a Path makes of gs://BUCKET
_NOT_JSON = (ValueError, RecursionError)  # the latter: lists in lists, thousands deep


_LFS = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = "is a Git LFS pointer, not the file: run `git lfs pull` in its folder"


class Listed(NamedTuple):
    """Of a file: its size in bytes, and when it changed, in seconds of Unix time."""

    size: int
    changed: float


class DamagedFileError(ValueError):
    """A file or a line that is not JSON, named in the message. `unfinished`: it is a last line without its end."""

    def __init__(self, what: str, reason: Exception, unfinished: bool = False):
        super().__init__(f"{what} is not JSON ({reason})")
        self.reason, self.unfinished = reason, unfinished


# Where


def place(text: str | os.PathLike) -> Path:
    """The path that a user wrote, with the home directory for "~" where there is one; a `BucketPath` for gs:// and s3://.

    Raises BucketError for another store, for gs:/BUCKET, and where its client is not installed; HubError for a name on
    the Hugging Face Hub, which only some keys and commands take.
    """
    if hub.is_name(text):
        raise hub.HubError(f"{text}: no name on the Hub can be used here; give a path, or download it (`hf download`)")
    if not is_bucket(text) and not _ALMOST_BUCKET.match(os.fspath(text)):
        return Path(os.path.expanduser(text))
    from rynnvla_jax.storage import buckets  # imported here: its packages are extras

    buckets.require(text)
    return cast(Path, buckets.BucketPath(text))


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path has the form STORE://..., and is not a name on the Hugging Face Hub."""
    return "://" in os.fspath(path) and not hub.is_name(path)


def check(path: str | os.PathLike, write: bool = False) -> None:
    """Before anything slow: raises BucketError, within seconds, for a bucket that cannot be read or written."""
    if is_bucket(path):
        from rynnvla_jax.storage import buckets

        buckets.check(path, write)


# One at a time


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, said: str = "") -> Iterator[bool]:
    """Whether this process has the lock `path`, a file of this machine; the kernel's: a killed process holds none.

    `said`: on stderr when waiting for another process takes longer than `_SILENT` seconds.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        timer = threading.Timer(_SILENT, lambda: print(said, file=sys.stderr, flush=True))
        try:
            if said:
                timer.start()
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            timer.cancel()
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        timer.cancel()
        os.close(file)


# Whole or not at all


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The partial path to write a file or a folder at; it is renamed to `path` when the block ends without an error.

    A file replaces an existing one; a folder must not exist or must be empty (OSError), and cannot be in a bucket.
    """
    if is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="rynnvla-") as aside, naming(path):
            yield (partial := Path(aside) / path.name)
            copy(partial, path)
        return
    partial = partial_path(path)
    try:
        with naming(path):
            yield partial
            put(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager around writes by libraries: what they raise on a full disk becomes an OSError with the path.

    Theirs have no path, are RuntimeErrors (array_record), or cannot be sent to another process (PyAV).
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and os.strerror(errno.ENOSPC) in str(error):
            number = errno.ENOSPC
        if number is None or (getattr(error, "filename", None) is not None and type(error).__module__ == "builtins"):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_bytes(path: P, data: bytes) -> None:
    """Writes bytes atomically."""
    if is_bucket(path):
        path.write_bytes(data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: P, text: str) -> None:
    """Writes text atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: P, values: Any, indent: int | None = 1) -> None:
    """Writes JSON atomically, with an end of line."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def partial_path(path: P) -> P:
    """Beside `path`; no other process takes the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def put(partial: P, path: P) -> None:
    """Flushes a partial file or folder to the disk and renames it to `path`, both of this machine."""
    if partial.is_dir():
        for folder, _, names in os.walk(partial):
            for name in names:
                _flush(os.path.join(folder, name))
            _flush(folder)
    else:
        _flush(partial)
    partial.replace(path)
    _flush(path.parent)  # the name, too, is on the disk


def copy(source: Path, target: Path) -> None:
    """Copies one file, from and to this machine or a bucket; a kill may leave a part of a local one."""
    if is_bucket(source) and is_bucket(target) and source.parts[1] == target.parts[1]:  # one store
        source.copy(target)  # type: ignore[attr-defined]  # of BucketPath
    elif is_bucket(source) and is_bucket(target):
        target.write_bytes(source.read_bytes())
    elif is_bucket(target):
        target.upload(source)  # type: ignore[attr-defined]
    elif is_bucket(source):
        source.download(target)  # type: ignore[attr-defined]
    else:
        shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path, last: str = "") -> None:
    """Copies all files of a folder, in threads; the one named `last` when all others are there."""
    local = lambda: (path for path in sorted(source.rglob("*")) if path.is_file())  # noqa: E731
    found = source.files() if is_bucket(source) else local()  # type: ignore[attr-defined]  # of BucketPath
    names = [path.relative_to(source).as_posix() for path in found]

    def take(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source / name, target / name)

    with ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(take, (name for name in names if name != last)))
    for name in names:
        if name == last:
            take(name)


def walk(folder: Path) -> Iterable[tuple[Path, Any]]:
    """All files below a folder, at any depth, each with its `stat`; in a bucket by one listing."""
    if is_bucket(folder):
        return folder.walk()  # type: ignore[attr-defined]  # of BucketPath
    return ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())


def remove(path: P) -> None:
    """Deletes a file or a folder with its content, if it exists."""
    if is_bucket(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # of BucketPath
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(folder: P) -> list[P]:
    """The content of a folder, without its lease and partial files of running or killed writers."""
    return sorted(p for p in folder.iterdir() if not _PARTIAL.fullmatch(p.name) and p.name != LEASE)


def listing(folder: Path) -> dict[str, Listed]:
    """The files directly in a folder by name, {} where there is none; in a bucket by a request per 1000."""
    if is_bucket(folder):
        return {path.name: Listed(s.st_size, s.st_mtime) for path, s in folder.listed()}  # type: ignore[attr-defined]
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        return {e.name: Listed(e.stat().st_size, e.stat().st_mtime) for e in found if e.is_file()}
    return {}


def remove_partial(folder: P) -> None:
    """Deletes partial files of killed writers in a folder, if it exists; only for its single writer."""
    if is_bucket(folder):  # there are none
        return
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _PARTIAL.fullmatch(path.name):
            remove(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_lfs_pointer(content: bytes) -> bool:
    """Whether these first bytes of a file are those of a Git LFS pointer, a text that a clone without LFS leaves."""
    return content.startswith(_LFS)


def damage(path: Path | str, reason: str) -> str:
    """The sentence about a file that cannot be read for `reason`, or because it is a Git LFS pointer: its remedy."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if is_lfs_pointer(file.read(len(_LFS))):
            return f"{path} {LFS_POINTER}"
    return f"{path} {reason}"


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; not for a name that no file can have, or where one may not look."""
    try:
        return path.exists()
    except OSError:
        return False


def _flush(path: os.PathLike | str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# JSON


def read_status(path: P, default: T, valid: Callable[[Any], bool]) -> T:
    """The content of a status file, which never stops a run: `default` while it is absent.

    A damaged file, or one whose content is not `valid`, is renamed to NAME.damaged with a line on stderr.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return default
    except DamagedFileError as error:
        reason = str(error)
    else:
        if valid(content):
            return content
        reason = f"{path} does not have the form of a {path.name}"
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    print(f"{reason}; it was renamed to {aside.name}, and the run goes on without it", file=sys.stderr, flush=True)
    return default


def read_json(path: P) -> Any:
    """Raises DamagedFileError naming the file when it is not JSON, FileNotFoundError when it is absent."""
    content = path.read_bytes()
    try:
        return json.loads(content)
    except _NOT_JSON as error:
        raise DamagedFileError(str(path), _reason(content, error)) from None


def json_lines(path: P) -> Iterator[tuple[int, Any]]:
    """(line number from 0, value) of every line that is not blank; a damaged line's value is its DamagedFileError."""
    for number, _, value in raw_lines(path):
        yield number, value


def raw_lines(path: P) -> Iterator[tuple[int, bytes, Any]]:
    """As `json_lines`, with the bytes of each line between the two."""
    # An object at once: between two requests for its parts a run may have replaced it.
    with io.BytesIO(path.read_bytes()) if is_bucket(path) else path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, line, _value(path, number, line)


def read_lines(path: P) -> list[Any]:
    """The values of a finished JSON-lines file. Raises DamagedFileError naming the first damaged line."""
    return _sound(value for _, value in json_lines(path))


def read_log(path: P) -> list[Any]:
    """The values of a JSON-lines file that a process may be adding to: [] while it is absent.

    An unfinished last line is left out: it is being written, or a kill cut it short.

    Raises DamagedFileError naming the first damaged line.
    """
    values = [value for _, value in json_lines(path)] if path.exists() else []
    return _sound(v for v in values if not (isinstance(v, DamagedFileError) and v.unfinished))


def append_lines(path: P, values: Iterable[Any]) -> None:
    """Appends lines to a JSON-lines file, which is created if needed; an incomplete last line is removed first.

    When a disk is full (OSError) no line is added.
    """
    with path.open("a+b") as file:
        _mend(file)
        file.flush()
        size, rest = file.tell(), "".join(json.dumps(value) + "\n" for value in values).encode()
        try:
            while rest:  # by the system alone: Python would try again to write what it has buffered
                rest = rest[os.write(file.fileno(), rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _mend(file: IO[bytes]) -> None:
    """Removes an incomplete last line; the position is then the end of the file."""
    size = end = file.seek(0, os.SEEK_END)
    last = b""
    while end and b"\n" not in last:  # backwards to where the last line begins; of a whole file one byte is read
        start = max(0, end - (1 if end == size else _BLOCK))
        file.seek(start)
        last, end = file.read(end - start) + last, start
    tail = last.rpartition(b"\n")[2]
    file.seek(0, os.SEEK_END)
    if tail and isinstance(_value(Path(), 0, tail), DamagedFileError):
        file.truncate(size - len(tail))
    elif tail:
        file.write(b"\n")


def _sound(values: Iterable[Any]) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, DamagedFileError):
            raise value
        found.append(value)
    return found


def _value(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except _NOT_JSON as error:
        reason = _reason(line, error)
        return DamagedFileError(f"{path} line {number + 1}", reason, unfinished=not line.endswith(b"\n"))


def _reason(content: bytes, error: Exception) -> Exception:
    return ValueError(f"it {LFS_POINTER}") if is_lfs_pointer(content) else error
