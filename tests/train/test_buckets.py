"""Runs whose work dir, weights and assets are in a gs:// bucket: the same bytes as on a disk, by few requests."""

import re
import shutil
import threading
import time
from unittest import mock

import chex
import jax
import numpy as np
import pytest

from rynnvla_jax.checkpoint import manager, model_dir, reader
from rynnvla_jax.cli.main import main
from rynnvla_jax.config import CheckpointConfig, ConfigError
from rynnvla_jax.storage import files, logs
from rynnvla_jax.train import metrics, monitor
from rynnvla_jax.train.loop import train
from tests import tiny
from tests.command import Command
from tests.train.test_train import params_of, run_config

STEPS, EVERY = 12, 4


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """An undisturbed run on a disk, and the cache of its programs."""
    folder = tmp_path_factory.mktemp("plain")
    command = Command(folder / "run", folder / "cache", total_steps=STEPS, checkpoint__every_steps=EVERY)
    command.finish()
    return command


def in_bucket(bucket, plain, processes=1, **keys):
    keys = {"total_steps": STEPS, "checkpoint__every_steps": EVERY, **keys}
    return Command(f"{bucket}/run", plain.workdir.parent / "cache", processes, **keys)


def assert_same(command, plain):
    assert metrics.read(command.workdir) == metrics.read(plain.workdir)
    chex.assert_trees_all_equal(params_of(command.workdir), params_of(plain.workdir))


@pytest.fixture
def counted(store, monkeypatch):
    """The number of requests when each step was started."""
    seen, started = [], monitor.Progress.started

    def note(self, step, *rest):
        seen.append(len(store.requests))
        started(self, step, *rest)

    monkeypatch.setattr(monitor.Progress, "started", note)
    return seen


def test_a_run_in_a_bucket_is_that_of_a_folder(assets, bucket, store, counted, tmp_path):
    there = {}
    for name in ("tokenizer.json", "vqgan", "vae_robot"):
        path, target = files.place(assets[name]), files.place(f"{bucket}/assets") / name
        files.copy_folder(path, target) if path.is_dir() else files.copy(path, target)
        there[name] = str(target)
    for name in ("vqgan", "vae_robot"):  # as `rynnvla convert import` and a training run leave it in a bucket
        (files.place(there[name]) / "checkpoints" / "0" / reader.COMMIT).write_bytes(b"")
    for steps, most in ((4, 300), (8, 300)):  # a first start, and one that continues
        before = len(store.requests)
        counted.clear()
        train(run_config("robot", there, total_steps=steps, **{"checkpoint.every_steps": 0}), f"{bucket}/run")
        assert counted[0] - before <= most, "requests of a start"
        assert counted[-1] - counted[0] <= 1, "requests of three steps"  # one may be the renewal of the lease
        train(run_config("robot", assets, total_steps=steps, **{"checkpoint.every_steps": 0}), tmp_path / "run")
    chex.assert_trees_all_equal(params_of(f"{bucket}/run"), params_of(tmp_path / "run"))
    assert metrics.read(f"{bucket}/run") == metrics.read(tmp_path / "run")
    names = {path.name for path in files.place(f"{bucket}/run").iterdir()}
    assert names == {"assets", "checkpoints", "heartbeat.json", "metrics.jsonl", "tensorboard", "timing.jsonl"}
    assert main(["checkpoint", "verify", f"{bucket}/run"]) == 0


def test_weights_of_a_bucket_start_a_run(assets, bucket, tmp_path):
    train(run_config("robot", assets, total_steps=2), f"{bucket}/first")
    start = {"init_from.path": f"{bucket}/first", "tokenizer": "", "vqgan": "", "action_vae": ""}
    train(run_config("robot", assets, total_steps=1, **start), tmp_path / "second")
    assert np.isfinite(metrics.read(tmp_path / "second")[-1]["loss"])


def test_a_kill_in_the_middle_of_a_save_changes_nothing(bucket, plain):
    command = in_bucket(bucket, plain)
    assert command.run(command.saving) == [-9]
    command.finish()
    assert_same(command, plain)


def test_two_processes_share_nothing_but_the_bucket_and_one_goes_on(bucket, plain):
    two = in_bucket(bucket, plain, processes=2)
    statuses = two.run(two.saving)
    assert statuses[0] == -9 and statuses[1] != 0
    in_bucket(bucket, plain).finish()
    assert_same(two, plain)
    assert not (two.workdir / files.LEASE).exists()


def test_a_store_that_is_down_for_a_while_costs_no_run(bucket, store, plain):
    command = in_bucket(bucket, plain)
    done = threading.Event()

    def spoil():
        while not command.saving():
            time.sleep(0.05)
        store.down = True
        time.sleep(8)
        store.down = False
        done.set()

    thread = threading.Thread(target=spoil)
    thread.start()
    command.finish()
    thread.join()
    assert done.is_set() and store.spoiled
    assert_same(command, plain)


def test_logs_are_uploaded_now_and_then_and_at_the_end(bucket, store, monkeypatch):
    monkeypatch.setattr(logs, "UPLOAD_SECONDS", 0.3)
    workdir = files.place(f"{bucket}/run")
    with logs.kept_in(workdir) as kept:
        files.append_lines(kept.folder / "metrics.jsonl", [{"step": 1}])
        for _ in range(100):
            if metrics.read(workdir):
                break
            time.sleep(0.05)
        assert metrics.read(workdir) == [{"step": 1}]
        assert not store.counted(lambda: time.sleep(1)), "unchanged files are not uploaded again"
        files.append_lines(kept.folder / "metrics.jsonl", [{"step": 2}])
        assert len(store.counted(kept.flush)) <= 5
        files.append_lines(kept.folder / "timing.jsonl", [{"step": 2}])
    assert metrics.read(workdir) == [{"step": 1}, {"step": 2}] and metrics.read(workdir, "timing.jsonl")
    with logs.kept_in(workdir) as kept:  # what a start continues is there
        assert len(metrics.read(kept.folder)) == 2
    assert not kept.folder.exists()


def test_logs_that_cannot_be_uploaded_stay_and_are_named(bucket, store, monkeypatch, capsys):
    monkeypatch.setattr(logs, "END_PATIENCE", 0.0)
    workdir = files.place(f"{bucket}/run")
    monkeypatch.setattr(type(workdir), "write_bytes", mock.Mock(side_effect=OSError(5, "no store")))
    with logs.kept_in(workdir) as kept:
        files.append_lines(kept.folder / "metrics.jsonl", [{"step": 1}])
    assert metrics.read(kept.folder) == [{"step": 1}]
    assert f"gcloud storage cp -r '{kept.folder}/*' {workdir}" in capsys.readouterr().err
    shutil.rmtree(kept.folder)


@pytest.fixture
def saved(bucket):
    """A work dir with two steps of 179 arrays."""
    tree = {f"a{i:03d}": jax.numpy.arange(64, dtype=jax.numpy.float32) + i for i in range(90)}
    state = {"opt_state": {name: x + 1 for name, x in list(tree.items())[:89]}}
    checkpoints = manager.Checkpointer(bucket, CheckpointConfig())
    for step in (10, 20):
        checkpoints.save(step, tree, state, {"step": step, "skipped": []})
        assert checkpoints.wait()
    checkpoints.close()
    return bucket, tree, state


def test_a_verification_asks_little_of_a_bucket(saved, store):
    found = []
    asked = store.counted(lambda: found.extend(reader.verify(reader.step_folder(saved[0], 20))))
    assert not found and len(asked) <= 200
    files.write_json(reader.step_folder(saved[0], 20) / "data" / "metadata", {"step": 20, "skipped": [3]})
    assert reader.verify(reader.step_folder(saved[0], 20)) == [
        "data/metadata differs from what was saved (fingerprint)"
    ]


def test_a_damaged_step_is_set_aside_and_the_one_before_is_taken(saved, capsys):
    directory, tree, state = saved
    for data, _ in list(files.walk(reader.step_folder(directory, 20) / "params")):
        if data.parent.name == "d":  # which of them has the arrays depends on the speed of the save
            data.write_bytes(data.read_bytes()[:-100])
    reader.unmark(reader.step_folder(directory, 20))
    checkpoints = manager.Checkpointer(directory, CheckpointConfig())
    assert checkpoints.latest() == 10
    params, _, data = checkpoints.restore(10, tree, state)
    assert data["step"] == 10 and reader.steps(directory) == [10]
    chex.assert_trees_all_equal(params, tree)
    assert [path.name for path in reader.damaged(directory)] == ["20"]
    assert re.search(r"checkpoint 20 is damaged and was moved to gs://.*/damaged/20", capsys.readouterr().err)
    checkpoints.close()


def test_a_step_without_its_last_object_is_no_step(saved):
    directory = saved[0]
    (reader.step_folder(directory, 20) / reader.COMMIT).unlink()
    reader.unmark(reader.step_folder(directory, 20))
    reader._committed.clear()  # another process
    assert reader.steps(directory) == [10] and [p.name for p in reader.unfinished(directory)] == ["20"]
    checkpoints = manager.Checkpointer(directory, CheckpointConfig())
    assert checkpoints.latest() == 10
    checkpoints.save(20, saved[1], saved[2], {"step": 20, "skipped": []})
    assert checkpoints.wait() and reader.steps(directory) == [10, 20]
    checkpoints.close()


def test_a_work_dir_that_was_copied_into_a_bucket_goes_on(saved, tmp_path, capsys):
    directory, tree, state = saved
    for step, bad in ((10, False), (20, True)):  # as `gcloud storage cp -r` copies a work dir of a disk
        folder = reader.step_folder(directory, step)
        (folder / reader.COMMIT).unlink()
        if bad:
            (folder / "params" / "_METADATA").unlink()
    reader._committed.clear()  # another process
    checkpoints = manager.Checkpointer(directory, CheckpointConfig())
    assert checkpoints.latest() == 10
    assert "20 was copied with faults" in capsys.readouterr().err
    params, _, _ = checkpoints.restore(10, tree, state)
    chex.assert_trees_all_equal(params, tree)
    assert reader.steps(directory) == [10]
    checkpoints.close()


def test_a_save_that_was_killed_after_its_parameters_is_no_step(saved):
    directory = saved[0]
    for step in (10, 20):
        for path in reader.step_folder(directory, step).files():
            if "/params/" not in str(path):
                path.unlink()
    reader._committed.clear()  # another process
    assert (reader.step_folder(directory, 20) / "params" / reader.COMMIT).exists()
    checkpoints = manager.Checkpointer(directory, CheckpointConfig())
    assert checkpoints.latest() is None
    checkpoints.close()


def test_a_model_is_written_and_copied_in_a_bucket(assets, bucket):
    files.copy_folder(files.place(assets["vqgan"]), files.place(f"{bucket}/by-hand"))  # as `gcloud storage cp -r` does
    chex.assert_trees_all_equal(params_of(f"{bucket}/by-hand"), params_of(assets["vqgan"]))
    model_dir.copy_model(assets["vqgan"], f"{bucket}/copy")
    chex.assert_trees_all_equal(params_of(f"{bucket}/copy"), params_of(assets["vqgan"]))


def test_a_work_dir_in_s3_is_refused(assets):
    with pytest.raises(ConfigError, match=r"s3://b/run: checkpoints cannot be saved in s3:// .* use a gs:// bucket"):
        train(tiny.typed(tiny.config("action_vae", tiny.SO100)), "s3://b/run")
