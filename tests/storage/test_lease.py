"""One of several copies of a command works in a folder: see `storage.lease`. Other machines are played by the file."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rynnvla_jax.storage import files, lease
from tests import ROOT

HOLD = """
import sys, time
from pathlib import Path
from rynnvla_jax.storage import lease
lease.RENEW_SECONDS = float(sys.argv[2])
with lease.hold(Path(sys.argv[1]), "testing in") as held:
    print("held", flush=True)
    sys.stdin.readline()
    held.check()
    print("still", flush=True)
"""
ELSEWHERE = {"nonce": "0", "host": "elsewhere", "boot": "b", "namespace": "n", "process": 7, "process_started": "1"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Seconds a twentieth as long."""
    for name in ("RENEW_SECONDS", "STALE_SECONDS", "_LOOK_SECONDS", "_SETTLE_SECONDS"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 50)


@contextlib.contextmanager
def holder(folder, renew=0.1):
    """A process of its own that holds `folder`."""
    command = [sys.executable, "-c", HOLD, str(folder), str(renew)]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **streams)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


def refuse(folder, match):
    with pytest.raises(lease.LeaseError, match=match), lease.hold(folder, "testing in"):
        pass


def content(folder):
    return json.loads((folder / "lease.json").read_text(encoding="utf-8"))


def test_it_is_there_while_held_and_leaves_nothing(tmp_path):
    folder = tmp_path / "new" / "run"
    with lease.hold(folder, "testing in"):
        assert content(folder)["process"] == os.getpid()
        assert files.contents(folder) == []  # it is no content of a folder
    assert not folder.exists()  # made for the lease only
    folder.mkdir()
    with lease.hold(folder, "testing in"):
        (folder / "kept").touch()
    assert os.listdir(folder) == ["kept"]


def test_a_second_copy_is_refused_while_the_first_lives(tmp_path):
    with holder(tmp_path) as first:
        refuse(tmp_path, f"another process is testing in {tmp_path}: process {first.pid} on")
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "still\n"
        assert first.wait() == 0
    with lease.hold(tmp_path, "testing in"):
        pass


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path):
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
    said = []
    with lease.hold(tmp_path, "testing in", said.append):
        assert content(tmp_path)["process"] == os.getpid()
    assert said == []


def test_another_machine_is_waited_for_and_then_replaced(tmp_path):
    files.write_json(tmp_path / "lease.json", {**ELSEWHERE, "renewals": 3})
    said, began = [], time.monotonic()
    with lease.hold(tmp_path, "testing in", said.append):
        assert time.monotonic() - began > lease.STALE_SECONDS
    (line,) = said
    assert line.startswith(f"{tmp_path} is held by process 7 on 'elsewhere': looking for up to 1.8 s")


def test_another_machine_that_renews_keeps_it(tmp_path):
    files.write_json(tmp_path / "lease.json", {**ELSEWHERE, "renewals": 3})
    later = threading.Timer(
        lease.STALE_SECONDS / 2, files.write_json, (tmp_path / "lease.json", {**ELSEWHERE, "renewals": 4})
    )
    later.start()
    refuse(tmp_path, "process 7 on 'elsewhere'.*SIGTERM")
    assert content(tmp_path)["renewals"] == 4


@pytest.mark.parametrize("renew", [0.1, 60], ids=["at its renewal", "before it writes"])
def test_a_process_that_did_not_answer_leaves_before_it_writes(tmp_path, renew):
    with holder(tmp_path, renew) as first:
        os.kill(first.pid, signal.SIGSTOP)
        with lease.hold(tmp_path, "testing in"):
            mine = content(tmp_path)["nonce"]
            os.kill(first.pid, signal.SIGCONT)
            out, err = first.communicate("\n")
            assert (first.returncode, out) == (1, "")
            assert err == (
                f"{tmp_path} was taken over by process {os.getpid()} on {os.uname().nodename!r} while this process did "
                "not answer; this process writes nothing more and ends\n"
            )
            assert content(tmp_path)["nonce"] == mine


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"process": "x"}', "\xff"])
def test_a_damaged_lease_is_nobodys(tmp_path, text):
    (tmp_path / "lease.json").write_bytes(text.encode("latin-1"))
    with lease.hold(tmp_path, "testing in"):
        assert content(tmp_path)["process"] == os.getpid()


def test_where_there_are_no_links_the_last_to_write_wins(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    outcomes = []

    def take():
        try:
            with lease.hold(tmp_path, "testing in"):
                outcomes.append("held")
                time.sleep(10 * lease.RENEW_SECONDS)
        except lease.LeaseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match=str(folder)), lease.hold(folder, "testing in"):
            pass


def test_storage_that_does_not_answer_ends_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with lease.hold(tmp_path, "testing in") as held:
        with monkeypatch.context() as patch:
            patch.setattr(files, "read_json", refuse)
            held.check()
            time.sleep(3 * lease.RENEW_SECONDS)  # nor does a renewal
        held.check()
        assert content(tmp_path)["process"] == os.getpid()
