"""A lease on a folder: of several copies of one command, on any machines, only one writes into it.

`lease.json` names the process that holds the folder, and changes every RENEW_SECONDS while that process lives. It works
with nothing but whole writes and reads of one file, on file systems that have no locks: NFS, mounted buckets. Clocks of
different machines are never compared: whoever waits measures with its own how long the file stays the same.
"""

import contextlib
import errno
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rynnvla_jax.errors import brief
from rynnvla_jax.storage import files

RENEW_SECONDS = 5.0
STALE_SECONDS = 90.0  # a file that has not changed for so long is that of a dead process; NFS caches names for 60 s
_LOOK_SECONDS = 0.25  # between two looks at the lease of another process
_SETTLE_SECONDS = 1.0  # after taking over: another may do the same at this moment, and the last to write wins


class LeaseError(RuntimeError):
    """Another process holds the folder; the message says what to do."""


class Lease:
    """Held by this process; made by `hold`."""

    def __init__(self, folder: Path):
        self._file = folder / files.LEASE
        self._nonce, self._renewals = secrets.token_hex(8), 0
        self._process = os.getpid()  # a forked child does not hold it
        self._lock = threading.Lock()
        self._released = threading.Event()

    def check(self) -> None:
        """Call it before writing what another process must not write too: ends this process if the lease is lost."""
        with self._lock, contextlib.suppress(OSError):  # storage that does not answer refuses the write, too
            if not self._released.is_set() and self._lost():
                self._leave()

    def _lost(self) -> bool:
        return (_read(self._file) or {}).get("nonce") != self._nonce

    def _leave(self) -> NoReturn:
        taker = _read(self._file)
        why = f"was taken over by {_name(taker)} while this process did not answer" if taker else "lost its lease.json"
        with contextlib.suppress(OSError):
            print(f"{self._file.parent} {why}; this process writes nothing more and ends", file=sys.stderr, flush=True)
        os._exit(1)  # from any thread, and without what the end of a `with` would still write

    def _write(self) -> None:
        self._renewals += 1
        files.write_json(
            self._file,
            {"nonce": self._nonce, **_this_process(), "renewals": self._renewals},
            indent=None,
        )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with self._lock, contextlib.suppress(OSError):  # a full disk: nobody else can write there either
                if self._released.is_set():
                    return
                if self._lost():
                    self._leave()
                self._write()

    def _release(self) -> None:
        if os.getpid() != self._process:
            return
        with self._lock, contextlib.suppress(OSError):
            self._released.set()
            if (_read(self._file) or {}).get("nonce") == self._nonce:
                self._file.unlink()


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
    file = lease._file
    while True:
        if (holder := _read(file)) is None:
            if _create(lease):
                return
            continue
        if not _dead(holder):
            say(f"{file.parent} is held by {_name(holder)}: looking for up to {STALE_SECONDS:g} s whether it still is")
            _wait_until_stale(file, holder, doing)
        lease._write()  # over it; the other notices at its next renewal
        time.sleep(_SETTLE_SECONDS)
        if not lease._lost():
            return


def _create(lease: Lease) -> bool:
    """Writes the first lease of a folder. False: another process was faster."""
    partial = files.partial_path(lease._file)
    try:
        files.write_json(partial, {"nonce": lease._nonce, **_this_process(), "renewals": 0}, indent=None)
        try:
            os.link(partial, lease._file)  # unlike a rename it does not replace
        except FileExistsError:
            return False
        except OSError:  # mounted buckets have no links
            lease._write()
            time.sleep(_SETTLE_SECONDS)
            return not lease._lost()
    finally:
        partial.unlink(missing_ok=True)
    return True


def _wait_until_stale(file: Path, holder: dict[str, Any], doing: str) -> None:
    """Returns when the file is as it was for STALE_SECONDS, or its process has died, or released it."""
    since = time.monotonic()
    while time.monotonic() - since < STALE_SECONDS:
        time.sleep(_LOOK_SECONDS)
        now = _read(file)
        if now is None or _dead(now):
            return
        if now != holder:
            raise LeaseError(
                f"another process is {doing} {file.parent}: {_name(now)}. Wait until it ends, or stop it "
                f"({'kill ' + str(now['process']) if _here(now) else 'SIGTERM'}: it saves first); or use another "
                "directory"
            )


def _read(file: Path) -> dict[str, Any] | None:
    """The lease of a folder; None while there is none. One that is damaged belongs to nobody that lives."""
    try:
        content = files.read_json(file)
    except FileNotFoundError:
        return None
    except files.DamagedFileError:
        return {}
    return content if isinstance(content, dict) else {}


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
