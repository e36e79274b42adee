"""Where a run writes files that grow: in its work dir, or, when that is in a bucket, on this machine.

Objects cannot be appended to, so growing files are uploaded whole: every UPLOAD_SECONDS in the background, before every
checkpoint, and at the end. A host that dies loses at most the lines of that time, which the resumed run writes again.
"""

import contextlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

UPLOAD_SECONDS = 30.0
SAVE_PATIENCE, END_PATIENCE = 30.0, 300.0  # seconds that an upload is tried again before a checkpoint, and at the end
_PAUSE = 5.0  # between two tries
# What a start continues; the rest is written anew.
_CONTINUED = ("metrics.jsonl", "timing.jsonl", "eval.jsonl", "heartbeat.json", "wandb/run_id")


class Logs:
    """Made by `kept_in`. `folder` is of this machine."""

    def __init__(self, workdir: Path, folder: Path):
        self.folder, self._workdir = folder, workdir
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> (bytes, time of the last change)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._refused = False  # the bucket did so, and it was said

    def flush(self, patience: float = SAVE_PATIENCE) -> None:
        """Uploads what has changed; where that fails, again for `patience` seconds. Then training goes on without."""
        if self.folder == self._workdir:
            return
        began = time.monotonic()
        while not self._upload() and time.monotonic() - began < patience:
            time.sleep(_PAUSE)

    def _upload(self) -> bool:
        try:
            with self._lock:
                for path in sorted(self.folder.rglob("*")):
                    name = path.relative_to(self.folder).as_posix()
                    if not path.is_file() or path.name.endswith(".partial"):
                        continue
                    try:
                        state = path.stat()
                        mark = state.st_size, state.st_mtime_ns
                        content = path.read_bytes() if self._uploaded.get(name) != mark else None
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    if content is not None:
                        (self._workdir / name).write_bytes(content)
                        self._uploaded[name] = mark
        except OSError as error:
            if not self._refused:
                self._say(f"logs cannot be uploaded ({shorten(error)}); they are in {self.folder}, and tried again")
            self._refused = True
            return False
        if self._refused:
            self._say(f"logs are in {self._workdir} again")
        self._refused = False
        return True

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def _run(self) -> None:
        while not self._closed.wait(UPLOAD_SECONDS):
            self._upload()


@contextlib.contextmanager
def kept_in(workdir: Path) -> Iterator[Logs]:
    """The `Logs` of a work dir, those of an earlier start included; uploaded when the context ends."""
    if not files.is_bucket(workdir):
        yield Logs(workdir, workdir)
        return
    logs = Logs(workdir, Path(tempfile.mkdtemp(prefix="rynnvla-logs-")))
    for name in _CONTINUED:
        target = logs.folder / name
        with contextlib.suppress(FileNotFoundError):
            content = (workdir / name).read_bytes()
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
    thread = threading.Thread(target=logs._run, name="logs", daemon=True)
    thread.start()
    try:
        yield logs
    finally:
        logs._closed.set()
        thread.join()
        logs.flush(END_PATIENCE)
        if logs._refused:
            logs._say(f"the last logs were not uploaded: gcloud storage cp -r '{logs.folder}/*' {workdir}")
        else:
            shutil.rmtree(logs.folder, ignore_errors=True)
