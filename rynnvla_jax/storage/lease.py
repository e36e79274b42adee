"""A lease on a folder: of several copies of one command, on any machines, only one writes into it.

`lease.json` names the process that holds the folder, and changes every RENEW_SECONDS while that process lives. It works
with nothing but whole writes and reads of one file, on file systems that have no locks: NFS, mounted buckets; in a
gs:// bucket every write is conditional on what was read before. Clocks of different machines are never compared:
whoever waits measures with its own how long the file stays the same.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rynnvla_jax.errors import brief
from rynnvla_jax.storage import files

if TYPE_CHECKING:  # its packages are extras
    from rynnvla_jax.storage.buckets import BucketPath

RENEW_SECONDS = 5.0
STALE_SECONDS = 90.0  # a file that has not changed for so long is that of a dead process; NFS caches names for 60 s
_LOOK_SECONDS = 0.25  # between two looks at the lease of another process
_SETTLE_SECONDS = 1.0  # after taking over: another may do the same at this moment, and the last to write wins

Holder = dict[str, Any]  # the content of lease.json


class LeaseError(RuntimeError):
    """Another process holds the folder; the message says what to do."""


class _File:
    """lease.json on a file system."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> Holder | None:
        """The lease of a folder; None while there is none. One that is damaged belongs to nobody that lives."""
        try:
            return _content(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def create(self, content: Holder) -> bool:
        """Writes the first lease of a folder. False: another process was faster."""
        partial = files.partial_path(self.path)
        try:
            files.write_json(partial, content, indent=None)
            try:
                os.link(partial, self.path)  # unlike a rename it does not replace
            except FileExistsError:
                return False
            except OSError:  # mounted buckets have no links
                return self.replace(content)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def replace(self, content: Holder) -> bool:
        """Takes over. False: another process did the same later."""
        files.write_json(self.path, content, indent=None)
        time.sleep(_SETTLE_SECONDS)
        return self.holds(content)

    def renew(self, content: Holder) -> bool:
        """Writes a newer content. False: the lease is another process's."""
        if not self.holds(content):
            return False
        files.write_json(self.path, content, indent=None)
        return True

    def holds(self, content: Holder) -> bool:
        return (self.read() or {}).get("nonce") == content["nonce"]

    def remove(self, content: Holder) -> None:
        if self.holds(content):
            self.path.unlink()


class _Object:
    """lease.json in a gs:// bucket. As `_File`, by writes that fail if another process wrote since the last read."""

    def __init__(self, path: "BucketPath"):
        self.path = path
        self._seen = 0  # generation that was read: 0, there is none
        self._own = 0  # and the last that this process wrote

    def read(self) -> Holder | None:
        from rynnvla_jax.storage import buckets

        found = buckets.read_versioned(self.path)
        self._seen = found[1] if found else 0
        return _content(found[0]) if found else None

    def create(self, content: Holder) -> bool:
        return self._write(content, over=self._seen)

    def replace(self, content: Holder) -> bool:
        return self._write(content, over=self._seen)

    def renew(self, content: Holder) -> bool:
        return self._write(content, over=self._own)

    def _write(self, content: Holder, over: int) -> bool:
        from rynnvla_jax.storage import buckets

        data = json.dumps(content).encode()
        if (written := buckets.write_if(self.path, data, over)) is None:
            return self.holds(content)  # it may be this write, or an earlier one of ours, whose answer was lost
        self._own = written
        return True

    def holds(self, content: Holder) -> bool:
        if (self.read() or {}).get("nonce") != content["nonce"]:
            return False
        self._own = self._seen
        return True

    def remove(self, content: Holder) -> None:
        from rynnvla_jax.storage import buckets

        if self.holds(content):
            buckets.delete_if(self.path, self._own)


def _content(data: bytes) -> Holder:
    """{} for a lease that is damaged: it belongs to nobody that lives."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class Lease:
    """Held by this process; made by `hold`."""

    def __init__(self, folder: Path):
        file = folder / files.LEASE
        self._file: Any = _Object(file) if files.is_bucket(file) else _File(file)  # type: ignore[arg-type]
        self._nonce, self._renewals = secrets.token_hex(8), 0
        self._process = os.getpid()  # a forked child does not hold it
        self._lock = threading.Lock()
        self._released = threading.Event()

    def check(self) -> None:
        """Call it before writing what another process must not write too: ends this process if the lease is lost."""
        with self._lock, contextlib.suppress(OSError):  # storage that does not answer refuses the write, too
            if not self._released.is_set() and not self._file.holds(self._content()):
                self._leave()

    def _content(self) -> Holder:
        return {"nonce": self._nonce, **_this_process(), "renewals": self._renewals}

    def _leave(self) -> NoReturn:
        taker = self._file.read()
        why = f"was taken over by {_name(taker)} while this process did not answer" if taker else "lost its lease.json"
        with contextlib.suppress(OSError):
            print(
                f"{self._file.path.parent} {why}; this process writes nothing more and ends",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)  # from any thread, and without what the end of a `with` would still write

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with self._lock, contextlib.suppress(OSError):  # a full disk: nobody else can write there either
                if self._released.is_set():
                    return
                self._renewals += 1
                if not self._file.renew(self._content()):
                    self._leave()

    def _release(self) -> None:
        if os.getpid() != self._process:
            return
        with self._lock, contextlib.suppress(OSError):
            self._released.set()
            self._file.remove(self._content())


@contextlib.contextmanager
def hold(folder: Path, doing: str, say: Callable[[str], None] = lambda text: None) -> Iterator[Lease]:
    """Holds a folder, which is made if needed, for the duration of the context.

    A process of this machine that has died loses its lease at once, one of another machine when `lease.json` has not
    changed for STALE_SECONDS. `doing` completes "another process is ..."; `say` is told what is waited for.

    Raises:
      LeaseError: another process holds the folder.
      OSError: nothing can be written there.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    lease = Lease(folder)
    try:
        _take(lease, doing, say)
        threading.Thread(target=lease._renew, name="lease", daemon=True).start()
        yield lease
    finally:
        lease._release()
        if made:  # a command that was refused leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(lease: Lease, doing: str, say: Callable[[str], None]) -> None:
    """Raises LeaseError when another process holds it."""
    file, folder = lease._file, lease._file.path.parent
    while True:
        holder = file.read()
        if holder and not _dead(holder):
            say(f"{folder} is held by {_name(holder)}: looking for up to {STALE_SECONDS:g} s whether it still is")
            holder = _wait_until_stale(file, holder, doing)
        # Over a stale one; its process notices at its next renewal.
        if file.create(lease._content()) if holder is None else file.replace(lease._content()):
            return


def _wait_until_stale(file: Any, holder: Holder, doing: str) -> Holder | None:
    """Returns when the lease is as it was for STALE_SECONDS, or its process has died, or released it (None)."""
    since, folder = time.monotonic(), file.path.parent
    while time.monotonic() - since < STALE_SECONDS:
        time.sleep(_LOOK_SECONDS if isinstance(file, _File) else RENEW_SECONDS)
        now = file.read()
        if now is None or _dead(now):
            return now
        if now != holder:
            raise LeaseError(
                f"another process is {doing} {folder}: {_name(now)}. Wait until it ends, or stop it "
                f"({'kill ' + str(now['process']) if _here(now) else 'SIGTERM'}: it saves first); or use another "
                "directory"
            )
    return holder


def _this_process() -> dict[str, Any]:
    return {**_machine(), "process": os.getpid(), "process_started": _started(os.getpid())}


def _machine() -> dict[str, Any]:
    """What two processes have in common when each can see whether the other lives."""
    return {"host": socket.gethostname(), "boot": _text("/proc/sys/kernel/random/boot_id"), "namespace": _namespace()}


def _namespace() -> str:
    """Two containers on one machine number their processes differently."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _here(holder: dict[str, Any]) -> bool:
    mine = _machine()
    return bool(mine["boot"] and mine["namespace"]) and all(holder.get(key) == value for key, value in mine.items())


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the process is known to have ended: it was on this machine and its number is free, or another's."""
    if not isinstance(process := holder.get("process"), int):
        return True
    return _here(holder) and _started(process) != holder.get("process_started")


def _started(process: int) -> str:
    """When a process of this machine began, in ticks since the machine did; "" when there is none."""
    state = _text(f"/proc/{process}/stat").rpartition(")")[2].split()  # the name before it may contain anything
    return state[19] if len(state) > 19 and state[0] not in "ZX" else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _name(holder: dict[str, Any]) -> str:
    return f"process {brief(holder.get('process'))} on {brief(holder.get('host'))}"
