"""Several real processes over `jax.distributed`: same batches, same losses, same checkpoints, and ends that are ends.

All runs have four devices, as 1 x 4, 2 x 2 or 4 x 1 (processes x devices), in a mesh of 2 (fsdp) x 2 (tensor). With
four processes, two and two need the same rows of a batch.
"""

import json
import signal
import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost
from rynnvla_jax.train import hosts, metrics
from tests.command import Command

STEPS, EVERY = 16, 4
CLOSE = 1e-5  # relative; sums over devices are added in another order, nothing else differs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(name, processes, **keys) -> Command; compiled programs are shared."""
    root = tmp_path_factory.mktemp("runs")
    keys = {"total_steps": STEPS, "checkpoint__every_steps": EVERY, "mesh__fsdp": 2, "mesh__tensor": 2}
    keys |= {"evaluation__share": 0.4, "evaluation__every_steps": 8, "evaluation__examples": 9}

    def make(name, processes, **more):
        return Command(root / name, root / "cache", processes, 4 // processes, **{**keys, **more})

    return make


@pytest.fixture(scope="module")
def alone(start):
    command = start("alone", 1)
    command.finish()
    return command.workdir


@pytest.fixture(scope="module")
def two(start):
    command = start("two", 2)
    command.finish()
    return command.workdir


def params_of(workdir):
    return jax.tree.map(np.asarray, model_dir.load_params(workdir)[0])


def assert_same_metrics(first, second):
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=CLOSE, abs=1e-7)


def assert_same_run(first, second):
    assert_same_metrics(metrics.read(first), metrics.read(second))
    assert reader.steps(first) == reader.steps(second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params_of(first), params_of(second)
    )


def test_two_processes_train_as_one(alone, two):
    assert len(metrics.read(alone)) == STEPS
    assert_same_run(alone, two)
    found = metrics.read(alone, "eval.jsonl")
    assert [line["step"] for line in found] == [8, STEPS]
    assert_same_metrics(found, metrics.read(two, "eval.jsonl"))


def test_hosts_are_compared_and_one_host_is_not(alone, two):
    """Each line but the first ones has the figures of an earlier one, the last line its own."""
    lines = [line for line in metrics.read(two, "timing.jsonl") if "steps_per_second" in line]  # no evaluations
    told = [line["step"] for line in lines if "hosts/slowest" in line]
    assert told == [*range(4, STEPS + 1)]  # logged at every step; two further ones are queued when a row is sent
    for line in lines[3:]:
        assert line["hosts/slowest"] in (0, 1)
        for name in ("step_seconds", "busy_seconds", "data_wait_seconds", "memory_gib"):
            low, middle, high = (line[f"hosts/{name}/{key}"] for key in ("min", "median", "max"))
            assert 0 <= low <= middle <= high and middle == pytest.approx((low + high) / 2)
        assert line["hosts/busy_seconds/max"] <= line["hosts/step_seconds/max"]
        assert line["hosts/memory_gib/min"] > 0.05 and "hosts/peak_memory_gib/max" not in line  # CPUs tell none
    slowest = json.loads((two / "heartbeat.json").read_text(encoding="utf-8"))["slowest"]
    assert slowest == f"process {lines[-1]['hosts/slowest']:.0f} on {socket.gethostname()}"
    assert not any("hosts/" in key for line in metrics.read(alone, "timing.jsonl") for key in line)


def test_the_slowest_host_is_the_busiest():
    nan = np.nan
    rows = np.array([[1.0, 0.1, 0.0, 4.0, nan], [1.0, 0.7, 0.5, 2.0, nan], [1.0, 0.2, 0.0, 3.0, 7.0]])
    found = hosts.summary(rows)
    assert found["hosts/slowest"] == 1 and found["hosts/busy_seconds/median"] == 0.2
    assert [found[f"hosts/memory_gib/{key}"] for key in ("min", "median", "max")] == [2, 3, 4]
    assert found["hosts/peak_memory_gib/min"] == 7


@pytest.mark.slow  # test_alive has both for one process; `make drill` for two
def test_sigterm_and_a_killed_process_change_nothing(start, two):
    """SIGTERM to one of two: both save one step and leave. SIGKILL of one: the other leaves. Then on to the end."""
    command = start("disturbed", 2, faults={"SLOW": "0.1"})
    assert command.run(lambda: command.lines() >= 2, signal.SIGTERM, who=1) == [143, 143]
    (saved,) = reader.steps(command.workdir)[-1:]
    assert f"saved step {saved} on SIGTERM; the same command continues" in command.said()
    assert metrics.read(command.workdir)[-1]["step"] == saved

    before = command.lines()
    statuses = command.run(lambda: command.lines() >= before + 2, signal.SIGKILL, who=1)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, -signal.SIGKILL)
    said = command.log(0).read_text(encoding="utf-8")
    assert "The same command continues" in said or "another task died" in said

    command.finish()
    assert (command.workdir / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, params_of(command.workdir), params_of(two))


@pytest.mark.slow
def test_another_number_of_processes_continues_with_the_same_batches(start, alone):
    """Four processes, stopped on the way, then one."""
    command = start("changed", 4, faults={"SLOW": "0.1"})
    assert command.run(lambda: command.lines() >= 2, signal.SIGTERM, who=2) == [143] * 4
    done = command.lines()
    assert reader.steps(command.workdir)[-1] == done < STEPS
    assert_same_metrics(metrics.read(command.workdir), metrics.read(alone)[:done])
    start("changed", 1).finish()
    assert_same_metrics(metrics.read(command.workdir), metrics.read(alone))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        params_of(command.workdir),
        params_of(alone),
    )


def test_an_error_of_the_first_process_stops_the_other(start):
    command = start("foreign", 2)
    (command.workdir / "checkpoints/7").mkdir(parents=True)  # a model that was not trained here
    assert command.run() == [1, 1]
    assert "rynnvla train: " in command.log(0).read_text(encoding="utf-8") and "was not trained there" in command.log(
        0
    ).read_text(encoding="utf-8")
    assert "rynnvla train: process 0 stopped: ConfigError" in command.log(1).read_text(encoding="utf-8")


@pytest.mark.parametrize(("devices", "expected"), [((0, 1), [0, 1, 2, 3]), ((4, 5), [8, 9, 10, 11]), ((1, 2, 7), None)])
def test_rows_follow_the_place_along_the_batch_not_the_process(devices, expected):
    """Processes that differ only along `tensor` hold the same rows; a process may hold rows that are no neighbours."""
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharding = mesh_lib.batch_sharding(mesh)
    held = {mesh.devices.flat[d] for d in devices}
    own = SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {
            d: i for d, i in sharding.devices_indices_map(shape).items() if d in held
        }
    )
    rows = multihost.batch_rows(own, 16)
    assert rows.tolist() == (expected or [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15])


def test_a_global_batch_is_the_batch():
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharding = mesh_lib.batch_sharding(mesh)
    rows = multihost.batch_rows(sharding, 16)
    local = {"x": np.arange(16 * 3).reshape(16, 3)}
    array = multihost.global_batch(local, sharding, rows, 16)["x"]
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, local["x"])
