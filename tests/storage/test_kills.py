"""A kill before any system call that changes the disk: the same work, done again, ends as if it had not happened.

Each attempt is a forked process that kills itself before its k-th change of a folder: opening a file to write,
renaming, removing, making a directory. `make drill` kills whole runs.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.corpus import codes
from data_pipelines.sources import open_source
from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.config import DataConfig, ImageConfig
from rynnvla_jax.storage import files
from rynnvla_jax.train import metrics
from rynnvla_jax.train.bad_batches import LeftOutBatches

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
ENTRY = {"packages": {}, "data": "x", "exclude": "", "sources": []}


def run(work, folder: Path, kill_at: int | None) -> int:
    """Does `work(folder)` in a forked process, killed before its `kill_at`-th change. Returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(60)  # ends a child that hangs
    try:
        count = 0

        def audit(event, arguments):
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        work(folder)
        os._exit(0)
    except BaseException as error:  # pytest must not go on in the child
        print(repr(error), file=sys.__stderr__, flush=True)
        os._exit(1)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_twice(folder):
    files.write_json(folder / "a.json", {"value": 1})
    files.write_json(folder / "a.json", {"value": 2})
    with files.replacing(folder / "made") as partial:
        if (folder / "made").exists():
            files.remove(folder / "made")
        partial.mkdir()
        (partial / "x").write_bytes(b"x" * 1000)
    files.remove_partial(folder)


def log(folder):
    writer = metrics.MetricsWriter.__new__(metrics.MetricsWriter)  # without TensorBoard, whose files have the time
    writer.directory = folder
    files.remove_partial(folder)
    metrics._truncate(folder / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        files.append_lines(folder / "metrics.jsonl", [{"step": step, "loss": 1 / step}])


def leave_out(folder):
    skips = LeftOutBatches(folder, 1)
    files.remove_partial(folder)
    if not skips.positions:
        skips._row = [(3, 3)]
        skips.leave_out()


def attempt(folder):
    (folder / "assets").mkdir(exist_ok=True)
    files.remove_partial(folder / "assets")
    if not provenance.attempts(folder):
        provenance.record_attempt(folder, ENTRY)
    found = json.loads((folder / "assets/run.json").read_text(encoding="utf-8"))
    found["attempts"][0].pop("started")
    files.write_json(folder / "said.json", found)
    files.remove(folder / "assets/run.json")  # it has the time
    files.remove_partial(folder)


def encode(folder):
    config = DataConfig(source=f"lerobot:{demo.path('so100')}", image=ImageConfig(shortest_edge=32, fit="square"))
    source = open_source(config.source, config)

    class Short:  # one episode of two views, and no decoding
        def __len__(self):
            return 1

        def __getitem__(self, number):
            return source[number]

    short = Short()
    short.source, short.lengths, short.views = source.source, source.lengths[:1], source.views
    original = codes._encode
    codes._encode = lambda episode, *_: np.full((len(episode), 2, 2), 7, np.uint16)
    try:
        codes.encode_all(short, None, config, folder / "codes", "hash", progress=False)
    finally:
        codes._encode = original


@pytest.mark.parametrize("work", [write_twice, log, leave_out, attempt, encode], ids=lambda work: work.__name__)
def test_a_kill_before_any_change_is_made_good_by_the_same_work(work, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(work, whole, None) == 0
    for kill_at in range(1, 200):
        folder = tmp_path / f"killed_{kill_at}"
        folder.mkdir()
        status = run(work, folder, kill_at)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert run(work, folder, None) == 0, kill_at
        assert content(folder) == content(whole), kill_at
    assert kill_at > 2, "nothing was killed"
