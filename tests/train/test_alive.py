"""What keeps a run alive: skipped updates, batches left out, watchdog, SIGTERM, heartbeat, profile. Real processes."""

import errno
import os
import shutil
import signal
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rynnvla_jax import progress
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.train import metrics, watchdog
from rynnvla_jax.train.bad_batches import BadBatches, LeftOutBatches
from tests import tiny
from tests.command import Command, read_json

BAD = {"BAD_BATCHES": "2,9,10,11,14,15"}  # one alone, then one too many in a row, then some around step 12's checkpoint
KEYS = {"total_steps": 20, "checkpoint__every_steps": 4, "max_skipped_in_a_row": 3}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return lambda name, **more: Command(root / name, root / "cache", **{**KEYS, **more})


@pytest.fixture(scope="module")
def skipping(start):
    """An undisturbed run over bad batches, with a profile."""
    command = start("skipping", faults=BAD, profile_steps="(13,14)")
    command.finish()
    return command


def params_of(workdir, step=-1):
    return jax.tree.map(np.asarray, model_dir.load_params(workdir, step=step)[0])


def assert_same_run(first, second):
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, params_of(first), params_of(second))


def test_an_update_that_is_not_finite_is_skipped_and_counted(skipping):
    lines = metrics.read(skipping.workdir)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if line["skipped"]] == [3, 12, 13]
    assert [line["step"] for line in lines if not np.isfinite(line["loss"])] == [3, 12, 13]
    assert [line["skipped_total"] for line in lines] == [0] * 2 + [1] * 7 + [4] * 2 + [5] + [6] * 8
    assert "update not applied, 1 in a row (stream position 2)" in skipping.said()


def test_batches_that_fail_in_a_row_are_left_out_by_name(skipping, start):
    """The run is that of a stream which never had them."""
    assert read_json(skipping.workdir / "skipped.json") == [{"step": 9, "positions": [9, 10, 11]}]
    assert "leaving out the batches at stream positions [9, 10, 11]" in skipping.said()
    without = start("without", faults={"BAD_BATCHES": "2,14,15"})
    without.workdir.mkdir()
    shutil.copy(skipping.workdir / "skipped.json", without.workdir)
    without.finish()
    assert_same_run(skipping.workdir, without.workdir)
    data = read_json(skipping.workdir / "checkpoints/20/data/metadata")
    assert data == {"step": 20, "skipped": [9, 10, 11], "not_applied": 3}


def test_kills_after_the_decision_and_after_a_save_between_skipped_updates_change_nothing(skipping, start):
    killed = start("killed", faults={**BAD, "SLOW": "0.1"})
    for when in (lambda: (killed.workdir / "skipped.json").exists(), lambda: 11 in reader.steps(killed.workdir)):
        assert killed.run(when) == [-signal.SIGKILL]
        assert killed.lines() < 20
    killed.finish()
    assert_same_run(killed.workdir, skipping.workdir)


def test_profile_goodput_and_heartbeat(skipping):
    assert list(skipping.workdir.glob("profile/**/*.xplane.pb"))
    assert f"profile of steps 13 to 14 is in {skipping.workdir}/profile" in skipping.said()
    timing = metrics.read(skipping.workdir, "timing.jsonl")
    assert all(0 <= line["goodput"] <= 1 for line in timing) and timing[-1]["goodput"] > 0
    assert np.all(np.diff([line["productive_seconds"] for line in timing]) >= 0)
    beat = read_json(skipping.workdir / "heartbeat.json")
    assert beat["phase"] == "finished" and beat["step"] == 20
    assert beat["started"] < beat["time"] and 0 < beat["goodput"] < 1


def test_sigterm_saves_and_the_same_command_continues(start):
    stopped, whole = start("stopped", faults={"SLOW": "0.1"}), start("whole")
    assert stopped.run(lambda: stopped.lines() >= 5, signal.SIGTERM) == [143]
    (saved,) = reader.steps(stopped.workdir)[-1:]
    assert f"saved step {saved} on SIGTERM" in stopped.said()
    assert metrics.read(stopped.workdir)[-1]["step"] == saved < 20
    started = read_json(stopped.workdir / "heartbeat.json")["started"]
    stopped.finish()
    whole.finish()
    assert_same_run(stopped.workdir, whole.workdir)
    assert read_json(stopped.workdir / "heartbeat.json")["started"] == started


def test_a_hanging_step_ends_the_process_with_its_stacks(start):
    command = start("hanging", faults={"HANG_AT": "12"}, watchdog_seconds=4.0)
    assert command.run() == [watchdog.EXIT_CODE]
    assert "watchdog: no step has finished for" in command.said()
    stacks = (command.workdir / "stacks-0.txt").read_text(encoding="utf-8")
    assert "in faulty_batches" in stacks and "Thread 0x" in stacks
    start("hanging", watchdog_seconds=4.0).finish()


@pytest.mark.slow
def test_a_save_that_does_not_fit_is_a_line_without_traces(start):
    start("small files").finish()  # compiles
    command = start("no room", checkpoint__patience_minutes=0.02)
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "_", *command.arguments]  # 20 KB for each file
    done = subprocess.run(limited, env=command.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 20, done.stderr
    command.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"HANG_AT": "0"}, "first batch has not finished for"),
        ({"HANG_AT": "1"}, "no step has finished for"),
        ({"READ_BACK_HANGS": "1"}, "read-back has not finished for"),
    ],
)
def test_a_hang_in_any_phase_ends_the_process_with_its_name(start, faults, told):
    command = start("-".join(faults.values()) + told[:4], faults=faults, watchdog_seconds=1.0)
    assert command.run() == [watchdog.EXIT_CODE]
    assert f"watchdog: {told} 1" in command.said() and "(limit 10 s)" in command.said()
    phase = told.removesuffix(" has not finished for")
    assert read_json(command.workdir / "heartbeat.json")["phase"] == (phase if phase != told else "step")


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path, capsys, monkeypatch):
    writer = metrics.MetricsWriter(tmp_path, 0)
    write, left = os.write, [10**6]

    def limited(descriptor, data):
        """A disk with `left` bytes."""
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        for step in range(1, 4):
            writer.write(step, {"loss": 1.0 / step}, {"goodput": 0.5})
        for left[0], step in ((7, 4), (0, 5), (40, 6), (0, 7)):
            writer.write(step, {"loss": 1.0 / step}, {"goodput": 0.5})
    assert len(metrics.read(tmp_path)) < 7
    writer.write(8, {"loss": 0.125}, {"goodput": 0.5})
    writer.close()
    for name, key in (("metrics.jsonl", "loss"), ("timing.jsonl", "goodput")):
        lines = metrics.read(tmp_path, name)
        assert [line["step"] for line in lines] == list(range(1, 9)) and all(key in line for line in lines)
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device): metrics are kept in memory") == 1
    assert said.count("can be written again") == 1


# --- Watchdog alone -----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The time of watchdogs and progress bars, in a list."""
    now = [1e6]
    for module in (watchdog, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_every_phase_has_a_limit_of_its_own(clock, tmp_path):
    dog = watchdog.Watchdog(5.0, tmp_path / "stacks")

    def allowed():
        """Seconds until it is overdue, found in steps of one second."""
        start, clock[0] = clock[0], clock[0] + 0.5
        while dog.overdue() is None:
            clock[0] += 1.0
        taken, clock[0] = clock[0] - start, start
        return round(taken - 0.5)

    def steps(seconds, count, step=0):
        for _ in range(count):
            clock[0] += seconds
            dog.beat(step)

    assert allowed() == 3600  # start-up
    with dog.phase("first batch"):
        assert allowed() == 50
    with dog.phase("step"):
        assert allowed() == 50  # the second batch may never come
        with dog.phase("save"):
            clock[0] += 40
            assert allowed() == 10
            with dog.phase("read-back"):
                assert allowed() == 50
            assert allowed() == 50
        steps(0.1, 5)
        assert allowed() == 5
        steps(2.0, 10)
        assert allowed() == 20 and "median 2 s" in str(dog.overdue() or "median 2 s")
        clock[0] += 30
        assert "no step has finished for 30 s after step 0 (median 2 s a step)" in dog.overdue()
    with dog.phase("encode"):
        clock[0] += 3000
        progress.Lines(desc="frames", total=9, show=False).update()
        clock[0] += 3000
        assert dog.overdue() is None  # a bar has moved
        clock[0] += 601
        assert "encode has not finished for 3601 s (limit 3600 s)" in dog.overdue()


def test_waiting_for_other_processes_is_no_hang(clock, tmp_path, monkeypatch):
    dog = watchdog.Watchdog(5.0, tmp_path / "stacks")
    monkeypatch.setattr(watchdog.multihost, "waiting", lambda: True)
    clock[0] += 1e5
    assert dog.overdue() is None


# --- LeftOutBatches alone ---------------------------------------------------------------------------------------


def fail(skips, first, count):
    for step in range(first, first + count):
        skips.finished(step, {"loss": float("nan"), "grad_norm": 1.0, "skipped": 1.0})


def train(skips, first, last):
    for step in range(first, last):
        skips.finished(step, {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0})


def test_checkpoints_are_labelled_with_the_last_good_step(tmp_path):
    skips = LeftOutBatches(tmp_path, 3)
    train(skips, 0, 4)
    fail(skips, 4, 2)
    assert skips.saved_step(6) == 4 and skips.data(4) == {"step": 4, "skipped": [], "not_applied": 0}
    train(skips, 6, 7)
    assert skips.saved_step(7) == 7 and skips.data(7) == {"step": 7, "skipped": [], "not_applied": 2}
    fail(skips, 7, 1)
    assert skips.data(8) == {"step": 8, "skipped": [], "not_applied": 3}  # the last step of a run, whatever it was


def test_the_same_step_is_not_tried_for_ever(tmp_path):
    skips = LeftOutBatches(tmp_path, 2)
    for tried in range(3):
        train(skips, 3, 5)
        with pytest.raises(BadBatches):
            fail(skips, 5, 2)
        if tried < 2:
            skips.leave_out()
            skips = LeftOutBatches(tmp_path, 2)  # another process knows it too
            skips.resume({"step": 3, "skipped": [], "not_applied": 0})
    assert skips.positions == (5, 6, 7, 8)
    with pytest.raises(FloatingPointError, match=r"from step 6 on, even after 2 .* positions \[5, 6, 7, 8\].*peak_lr"):
        skips.leave_out()
    # It did not help: these batches are innocent, and a run with a lower rate reads them again.
    assert skips.positions == () and read_json(tmp_path / "skipped.json") == []


@pytest.mark.parametrize("content", ["", "[1]", "{}", '[{"step": 1}]'])
def test_a_damaged_list_of_left_out_batches_comes_back_from_the_checkpoint(tmp_path, capsys, content):
    (tmp_path / "skipped.json").write_text(content, encoding="utf-8")
    skips = LeftOutBatches(tmp_path, 3)
    skips.resume({"step": 8, "skipped": [4, 5], "not_applied": 1})
    assert skips.positions == (4, 5) and "renamed to skipped.json.damaged" in capsys.readouterr().err


def test_progress_in_between_gives_new_tries(tmp_path):
    skips = LeftOutBatches(tmp_path, 1)
    for step in range(5):
        train(skips, 0, step)
        with pytest.raises(BadBatches):
            fail(skips, step, 1)
        skips.leave_out()
        skips.resume({"step": 0, "skipped": list(skips.positions), "not_applied": 0})
    assert skips.positions == (0, 2, 4, 6, 8)


def test_a_checkpoint_remembers_what_was_left_out(tmp_path):
    skips = LeftOutBatches(tmp_path, 3)
    skips.resume({"step": 8, "skipped": [4, 5], "not_applied": 1})
    assert skips.positions == (4, 5) and skips.position(3) == 3 and skips.position(4) == 6 and skips.total(4) == 3


# --- Clock alone -------------------------------------------------------------------------------------------------


def test_goodput_counts_only_the_time_of_steps_that_train(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])
    clock = metrics.Clock(tiny.typed(tiny.config("action_vae", tiny.SO100)), since=960.0, productive=10.0)

    def step(seconds, trained=True):
        now[0] += seconds
        clock.finished(0, trained)

    step(30)  # compiles
    step(2)
    step(2, trained=False)
    with clock.stalled():
        now[0] += 5  # a save
    step(2)
    for busy in (True, False):  # a wait for data behind the work of the devices costs nothing
        with clock.waiting_for_data(lambda busy=busy: busy):
            now[0] += 1
        step(1)
    values = clock.read()
    assert values["productive_seconds"] == 10 + 2 + 2 + (1 + 1) + 1
    assert values["goodput"] == 17 / (now[0] - 960)
    assert values["data_wait_share"] == 2 / (now[0] - 1000)


@pytest.mark.parametrize("jump", [-1e9, -50.0])
def test_a_clock_that_is_set_back_leaves_goodput_a_share(monkeypatch, jump):
    monotonic, wall = [100.0], [2000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: monotonic[0])
    monkeypatch.setattr(metrics.time, "time", lambda: wall[0])
    config = tiny.typed(tiny.config("action_vae", tiny.SO100))

    def goodput(clock):
        for _ in range(3):
            monotonic[0] += 1
            clock.finished(0, trained=True)
        return clock.read()["goodput"]

    clock = metrics.Clock(config, since=1990.0, productive=5.0)
    wall[0] += jump  # during the run
    assert goodput(clock) == (5 + 2) / (10 + 3)
    wall[0] = 1990.0 + jump  # before this start
    assert goodput(metrics.Clock(config, since=1990.0, productive=5.0)) == (5 + 2) / (5 + 3)


def test_a_decision_that_cannot_be_stored_is_said_and_the_next_checkpoint_has_it(tmp_path, monkeypatch, capsys):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    skips = LeftOutBatches(tmp_path, 1)
    skips._row = [(3, 3)]
    with monkeypatch.context() as patch:
        patch.setattr("rynnvla_jax.storage.files.write_json", full)
        skips.leave_out()
    assert "skipped.json cannot be written (No space left on device)" in capsys.readouterr().err
    later = LeftOutBatches(tmp_path, 1)
    later.resume(skips.data(4))
    assert later.positions == skips.positions == (3,)
