"""Files that outlive a kill: whole or absent, partial ones recognised, damage named."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from rynnvla_jax.storage import files

KILLED = """
import os, signal, sys
from pathlib import Path
from rynnvla_jax.storage import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_text(Path(sys.argv[1]), "new" * 1000)
"""


def test_a_kill_between_write_and_rename_leaves_the_old_content(tmp_path):
    path = tmp_path / "state.json"
    files.write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 2 and files.contents(tmp_path) == [path]
    files.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing_new(tmp_path):
    path = tmp_path / "numbers.npy"
    files.write_bytes(path, b"old")
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    with pytest.raises(KeyError), files.replacing(tmp_path / "folder") as partial:
        (partial / "inside").mkdir(parents=True)
        raise KeyError
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_content_and_name_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, os.replace

    def flushed(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    def renamed(source, target):
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    with files.replacing(tmp_path / "plan") as partial:
        partial.mkdir()
        np.save(partial / "ends.npy", np.arange(3))
    assert done == [str(partial / "ends.npy"), str(partial), "rename", str(tmp_path)]


def test_a_folder_never_takes_the_place_of_another(tmp_path):
    for name in ("first", "second"):
        try:
            with files.replacing(tmp_path / "plan") as partial:
                partial.mkdir()
                (partial / name).touch()
        except OSError:
            assert name == "second"
    assert [p.name for p in (tmp_path / "plan").iterdir()] == ["first"]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", [lambda p: p, epath.Path], ids=["pathlib", "epath"])
def test_text_is_utf8_everywhere(path, tmp_path):
    file = path(tmp_path) / "a.json"
    files.write_json(file, {"unit": "Å"})
    files.write_json(file, {"unit": "Ω"})
    assert files.read_json(file) == {"unit": "Ω"}
    files.write_text(file, "Ω")
    assert file.read_bytes() == "Ω".encode() and files.contents(path(tmp_path)) == [file]


def test_modes_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    files.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(files.DamagedFileError, match=r"a\.json is not JSON"):
        files.read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(files.DamagedFileError, match=r"a\.json is not JSON"):
        files.read_json(path)
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n', encoding="utf-8")
    for read in (files.read_lines, files.read_log):
        with pytest.raises(files.DamagedFileError, match=r"a\.json line 2 is not JSON"):
            read(path)
    found = list(files.json_lines(path))
    assert [n for n, _ in found] == [0, 1, 2] and isinstance(found[1][1], files.DamagedFileError)


@pytest.mark.parametrize("tail", ['{"a": 2', '{"a": "' + "x" * 200_000, "{"], ids=["short", "long", "brace"])
def test_an_unfinished_last_line_is_left_out_and_goes_with_the_next(tail, tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_log(path) == []
    files.append_lines(path, [{"a": 0}, {"a": 1}])
    with path.open("a", encoding="utf-8") as file:
        file.write(tail)
    assert files.read_log(path) == [{"a": 0}, {"a": 1}]
    with pytest.raises(files.DamagedFileError, match="line 3"):
        files.read_lines(path)
    files.append_lines(path, [{"a": 2}])
    assert path.read_text(encoding="utf-8") == "".join(json.dumps({"a": n}) + "\n" for n in range(3))


def test_a_whole_last_line_without_its_end_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 0}', encoding="utf-8")
    assert files.read_log(path) == files.read_lines(path) == [{"a": 0}]
    files.append_lines(path, [{"a": 1}])
    assert files.read_lines(path) == [{"a": 0}, {"a": 1}]


def test_only_an_unfinished_line_at_the_start_of_a_file(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a"', encoding="utf-8")
    assert files.read_log(path) == []
    files.append_lines(path, [])
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # of a write
        RuntimeError("write() failed: No space left on device; writing x"),  # of array_record
        type("Foreign", (OSError,), {"__module__": "av.error"})(errno.ENOSPC, "No space left on device", "partial"),
    ],
)
def test_a_full_disk_is_an_error_with_the_path_whatever_a_library_raises(error, tmp_path):
    with pytest.raises(OSError) as found, files.replacing(tmp_path / "x") as partial:
        partial.touch()
        raise error
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    assert type(found.value) is OSError and list(tmp_path.iterdir()) == []


def test_other_errors_are_left_as_they_are(tmp_path):
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file or directory", "y")):
        with pytest.raises(type(error)) as found, files.naming(tmp_path):
            raise error
        assert found.value is error
