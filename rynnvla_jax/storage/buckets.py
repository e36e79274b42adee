"""Paths in buckets, gs://BUCKET/... and s3://BUCKET/..., and whether a bucket can be used.

A bucket has no folders, links, locks, appends or renames of many files at once; one object appears whole or not at all.
gs:// can hold everything, s3:// what is only read, corpora and exports (Orbax cannot save there).

Sources: fsspec (gcsfs, s3fs) for files; google-cloud-storage for conditional writes ("request preconditions").
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import secrets
import stat as stat_bits
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is installed etils would use its client for gs://

import fsspec
import fsspec.config
from etils.epath.gpath import PosixGPath

from rynnvla_jax.errors import shorten

# What other processes write and delete would not be seen; also for the file systems that Orbax makes.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

PROBE = ".probe-"  # begins the name of the object that `check` writes, which a kill may leave
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the stack of every try of what is tried again

SECONDS = 10  # that the first answer of a store may take
_RANGE = 32 * 2**20  # bytes of one request of a download
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


class BucketError(OSError):
    """A bucket that cannot be used; the message says why and what to do."""


class Version(NamedTuple):
    """Of an object: its size in bytes, and when it was written, in ns of Unix time. Below a second these differ between
    versions, so that a file with this size and time is a copy of this version."""

    size: int
    time_ns: int


class BucketPath(PosixGPath):
    """An object, or the objects below a prefix, with pathlib's methods; errors are OSErrors that name it."""

    @property
    def _files(self) -> Any:
        return filesystem(str(self))

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: objects need no folder."""

    def rmdir(self) -> None:
        """Nothing: a folder is gone with its last object."""

    def exists(self) -> bool:
        with _named(self):
            return self._files.exists(str(self))

    def is_dir(self) -> bool:
        with _named(self):
            return self._files.isdir(str(self))

    def is_file(self) -> bool:
        with _named(self):
            return self._files.isfile(str(self))

    def stat(self) -> Any:
        """`st_size` in bytes, `st_mtime` in Unix seconds (0 of a folder), `st_mode`."""
        with _named(self):
            return _stat(self._files.info(str(self)))

    def listed(self) -> Iterator[tuple["BucketPath", Any]]:
        """The objects directly in this folder, each with its `stat`; none where there is no folder."""
        with _named(self, missing_ok=True):
            for info in self._files.ls(str(self), detail=True):
                if info["type"] != "directory" and (name := PurePosixPath(info["name"]).name):
                    yield self / name, _stat(info)

    def iterdir(self) -> Iterator["BucketPath"]:
        with _named(self):
            found = [item["name"] for item in self._files.ls(str(self), detail=True)]
        names = [PurePosixPath(name).name for name in found if not name.endswith("/")]
        return iter([self / name for name in names if name])

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        with _named(self):
            found = self._files.glob(f"{self}/{pattern}")
        return iter([BucketPath(f"{self._uri_scheme}://{name}") for name in found])

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        return self.glob(f"**/{pattern}")

    def open(self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None, **_: Any) -> Any:
        with _named(self):
            return super().open(mode, encoding=encoding, errors=errors)

    def read_bytes(self) -> bytes:
        """By one request."""
        with _named(self):
            return self._files.cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> int:
        """By one request, if it is less than 50 MB."""
        with _named(self):
            self._files.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode("utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        with _named(self, missing_ok):
            self._files.rm_file(str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        with _named(self, missing_ok):
            self._files.rm(str(self), recursive=True)

    def replace(self, target: Any) -> Any:
        """Copies, then deletes; of a folder object by object, so a kill leaves parts of both."""
        with _named(self):
            self._files.mv(str(self), str(target), recursive=self._files.isdir(str(self)))
        return target

    rename = replace

    def copy(self, target: Any) -> None:  # type: ignore[override]
        """Within one store, which the bytes do not leave."""
        with _named(self):
            self._files.cp_file(str(self), str(target))

    def files(self) -> list["BucketPath"]:
        """All objects below this prefix, at any depth."""
        return [path for path, _ in self.walk()]

    def walk(self) -> list[tuple["BucketPath", Any]]:
        """All objects below this prefix with their `stat`, a request per 1000."""
        with _named(self):
            found = self._files.find(str(self), detail=True)
        return [(BucketPath(f"{self._uri_scheme}://{name}"), _stat(info)) for name, info in found.items()]

    def versions(self) -> dict[str, Version]:
        """All objects below this prefix by relative name; of an object itself {"": Version}. A request per 1000."""
        with _named(self):
            found = self._files.find(str(self), detail=True)
        root = "/".join(self.parts[2:])
        return {name[len(root) :].lstrip("/"): _version(info) for name, info in found.items() if name[-1:] != "/"}

    def upload(self, source: str | os.PathLike) -> None:
        """A local file; the object appears when it is complete."""
        with _named(self):
            self._files.put_file(os.fspath(source), str(self))

    def download(self, target: str | os.PathLike, size: int | None = None) -> None:
        """To a local file; by one request per 32 MB where the size is known."""
        size = self.stat().st_size if size is None else size
        with open(target, "wb") as file:
            for start in range(0, size, _RANGE):
                with _named(self):
                    part = self._files.cat_file(str(self), start=start, end=min(start + _RANGE, size))
                file.write(part)


def _version(info: dict[str, Any]) -> Version:
    changed = info.get("mtime") or info["LastModified"]
    mark = zlib.crc32(str(info.get("generation") or info.get("ETag")).encode()) % 10**6
    return Version(int(info["size"]), int(changed.timestamp()) * 10**9 + mark * 1000)  # file systems keep microseconds


def passing(error: BaseException) -> bool:
    """Whether what a store refused may work later: not without the object, permission or credentials."""
    cause = error.__cause__ or error
    code = getattr(cause, "code", None)
    if isinstance(cause, FileNotFoundError | PermissionError) or (isinstance(code, int) and 400 <= code < 500):
        return code in (408, 429)
    return True


def _stat(info: dict[str, Any]) -> Any:
    """What fsspec says of an object, as `os.stat` would."""
    changed = info.get("mtime") or info.get("LastModified")
    folder = info["type"] == "directory"
    return SimpleNamespace(
        st_size=info.get("size") or 0,
        st_mtime=changed.timestamp() if changed and not folder else 0,
        st_mode=stat_bits.S_IFDIR if folder else stat_bits.S_IFREG,
    )


@contextlib.contextmanager
def _named(path: Any, missing_ok: bool = False) -> Iterator[None]:
    """What the clients raise becomes an OSError with the path: theirs have none, or are no OSErrors."""
    try:
        yield
    except FileNotFoundError:
        if not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError, BucketError):
        raise
    except ImportError:
        raise
    except Exception as error:
        code = getattr(error, "code", None)  # gcsfs writes ", 503" when a store sends no words
        said = shorten(error)
        said = f"the store answered {code}" if said == f", {code}" else said
        raise BucketError(f"{path}: {said}; `rynnvla doctor --bucket {name(path)}` tells what to do") from error


def scheme(path: str | os.PathLike) -> str:
    """ "gs" or "s3". Raises BucketError for another store."""
    store, found, _ = os.fspath(path).partition("://")
    if not found or store not in _PACKAGES:
        raise BucketError(f"{path} cannot be used; paths in a bucket begin with gs:// or s3://")
    return store


def name(path: str | os.PathLike) -> str:
    """gs://BUCKET or s3://BUCKET of a path."""
    return "/".join(os.fspath(path).split("/")[:3])


def require(path: str | os.PathLike) -> None:
    """Raises BucketError for another store, or where its client is not installed; asks nobody."""
    kind = scheme(path)
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        extra = {"gs": "gcs"}.get(kind, kind)
        raise BucketError(f"{path} needs {_PACKAGES[kind]}: pip install 'rynnvla_jax[{extra}]'")


def filesystem(path: str | os.PathLike) -> Any:
    """The fsspec file system of a path; one object per process. gcsfs looks for credentials here: `check` first."""
    require(path)
    return _filesystem(scheme(path), os.getpid())


@functools.cache
def _filesystem(kind: str, process: int) -> Any:
    return fsspec.filesystem({"gs": "gcs"}.get(kind, kind))


# Conditional writes (gs:// only)


def read_versioned(path: BucketPath) -> tuple[bytes, int] | None:
    """The content of an object and its generation; None when there is none."""
    from google.api_core import exceptions

    blob = _blob(path)
    with _named(path):
        try:
            content = blob.download_as_bytes(timeout=SECONDS, retry=_retry())
        except exceptions.NotFound:
            return None
    return content, int(blob.generation)


def write_if(path: BucketPath, data: bytes, generation: int) -> int | None:
    """Writes an object if it still has this generation (0: there is none). Returns the new one; None: it has not."""
    from google.api_core import exceptions

    blob = _blob(path)
    with _named(path):
        try:
            blob.upload_from_string(data, if_generation_match=generation, timeout=SECONDS, retry=_retry())
        except exceptions.PreconditionFailed:
            return None
    return int(blob.generation)


def delete_if(path: BucketPath, generation: int) -> bool:
    """Deletes an object if it still has this generation."""
    from google.api_core import exceptions

    with _named(path):
        try:
            _blob(path).delete(if_generation_match=generation, timeout=SECONDS, retry=_retry())
        except (exceptions.PreconditionFailed, exceptions.NotFound):
            return False
    return True


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(2 * SECONDS)


def _blob(path: BucketPath) -> Any:
    _, _, bucket, *parts = path.parts
    return _client(os.getpid()).bucket(bucket).blob("/".join(parts))


@functools.cache
def _client(process: int) -> Any:
    from google.cloud import storage

    return storage.Client()


# Before anything is done


def check(path: str | os.PathLike, write: bool = False) -> None:
    """Asks a bucket once, within seconds: whether objects below `path` can be listed; with `write`, one is written,
    read and deleted.

    Raises BucketError saying what is wrong: no client, credentials, network, bucket or permission.
    """
    require(path)
    kind = scheme(path)
    bucket, _, prefix = os.fspath(path).partition("://")[2].partition("/")
    if not bucket:
        raise BucketError(f"{path} names no bucket; write {kind}://BUCKET/FOLDER")
    ask = {"gs": _check_gs, "s3": _check_s3}[kind]
    try:
        ask(bucket, prefix.strip("/"), write)
    except Exception as error:
        raise BucketError(f"{path}: {_reason(kind, bucket, error)}") from None


def _probe(prefix: str) -> str:
    return f"{prefix}/{PROBE}{secrets.token_hex(4)}".lstrip("/")


def _check_gs(bucket: str, prefix: str, write: bool) -> None:
    from google.api_core import exceptions, retry

    options: dict[str, Any] = {"timeout": SECONDS, "retry": retry.Retry(_spoiled, initial=0.2, timeout=SECONDS)}
    try:
        _ask_gs(bucket, prefix, write, options)
    except exceptions.RetryError as error:
        answer = getattr(error.cause, "response", None)
        raise exceptions.from_http_response(answer) if hasattr(answer, "request") else error from None


def _ask_gs(bucket: str, prefix: str, write: bool, options: dict[str, Any]) -> None:
    from google.api_core import exceptions

    found = _client(os.getpid()).bucket(bucket)
    if not write:
        next(iter(found.list_blobs(prefix=prefix, max_results=1, **options)), None)
        return
    blob = found.blob(_probe(prefix))
    with contextlib.suppress(exceptions.PreconditionFailed):  # it was written, and the answer was lost
        blob.upload_from_string(b"probe", if_generation_match=0, **options)
    if blob.download_as_bytes(**options) != b"probe":
        raise TypeError("an object that was written was read back with another content")
    with contextlib.suppress(exceptions.NotFound):
        blob.delete(**options)


def _spoiled(error: Exception) -> bool:
    """Whether Google's store answered, with a failure of its own or in part. Where nobody answers is said at once."""
    import requests

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return isinstance(error, requests.exceptions.ChunkedEncodingError | ValueError)


def _check_s3(bucket: str, prefix: str, write: bool) -> None:
    from botocore.config import Config
    from botocore.session import get_session

    limits = Config(connect_timeout=SECONDS, read_timeout=SECONDS, retries={"total_max_attempts": 1})
    client = get_session().create_client("s3", config=limits)
    if not write:
        client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return
    key = _probe(prefix)
    client.put_object(Bucket=bucket, Key=key, Body=b"probe")
    if client.get_object(Bucket=bucket, Key=key)["Body"].read() != b"probe":
        raise TypeError("an object that was written was read back with another content")
    client.delete_object(Bucket=bucket, Key=key)


_CREDENTIALS = {
    "gs": "attach a service account to the machine, or run `gcloud auth application-default login`",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL where "
    "the store is not Amazon's",
}
_NO_CREDENTIALS = {"DefaultCredentialsError", "NoCredentialsError", "Unauthorized", "RefreshError", "NoRegionError"}
_NO_ANSWER = {"ConnectionError", "Timeout", "TransportError", "RetryError", "HTTPClientError", "ServerError"}


def _reason(kind: str, bucket: str, error: Exception) -> str:
    """Why a store refuses; after the last "; " the remedy."""
    names, text = {c.__name__ for c in type(error).__mro__}, _brief(error)
    answer = getattr(error, "response", None)
    code = str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
    if names & _NO_CREDENTIALS or code == "InvalidAccessKeyId":
        remedy = _CREDENTIALS[kind]
        if kind == "gs" and (file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")):
            remedy = f"GOOGLE_APPLICATION_CREDENTIALS is {file}: correct it, or unset it"
        return f"there are no valid credentials ({text}); {remedy}"
    if "NotFound" in names or code in ("NoSuchBucket", "404"):
        return f"the bucket {bucket} does not exist; correct the name, or create it"
    if "Forbidden" in names or code in ("AccessDenied", "403", "SignatureDoesNotMatch"):
        remedy = {"gs": "give the account roles/storage.objectUser on it", "s3": "correct its policy or keys"}[kind]
        if kind == "gs" and "scope" in text.lower():  # of the machine, which is asked before the account's roles
            remedy = "make the machine, or the node pool, with the access scope cloud-platform"
        return f"this account may not use the bucket {bucket} ({text}); {remedy}"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException"):
        return f"the bucket {bucket} is in another region ({text}); set AWS_DEFAULT_REGION to it"
    if names & _NO_ANSWER or code in ("500", "503", "SlowDown", "InternalError", "ServiceUnavailable"):
        return f"no answer ({text}); check the network, a proxy and the endpoint"
    return text


def _brief(error: Exception) -> str:
    """What a client says, without what it says around it: no URL with options, no advice."""
    first = error.args[0] if len(error.args) > 1 and isinstance(error.args[0], str) else error
    text = shorten(first).partition(". To set up ")[0].rstrip(".")
    where = re.search(r"host='([^']+)', port=(\d+)", text)
    why = re.search(r"\[Errno -?\d+\] ([\w ]+)|(Read timed out|timed out)", text)
    if where and why:
        return f"{where[1]}:{where[2]}: {why[1] or why[2]}"
    if said := re.search(r'"message": "(.*?)"', text):  # Google's answer to an upload
        text = said[1]
    text = re.sub(r"(GET|POST|PUT|DELETE) https?://\S+: |/\.probe-[0-9a-f]+", "", text)
    return text.replace("; ", ", ")
