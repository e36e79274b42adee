"""Checkpoints: restored bit for bit anywhere, verified, and what happens when a disk lies, fails or fills up."""

import contextlib
import gc
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rynnvla_jax import config
from rynnvla_jax.checkpoint import manager as manager_lib
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.manager import Checkpointer
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import CheckpointConfig, ConfigError, MeshConfig, VLAConfig
from rynnvla_jax.convert import stream
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.report import page
from tests import ROOT

AXES = {
    "blocks": {"w_up": ("layers", "embed", "feed_forward"), "scale": ("layers", None)},
    "embed": ("vocab", "embed"),
    "half": ("embed", "feed_forward"),
}
SHAPES = {
    "blocks": {"w_up": ((3, 32, 64), jnp.float32), "scale": ((3, 7), jnp.float32)},
    "embed": ((64, 32), jnp.float32),
    "half": ((16, 8), jnp.bfloat16),
}
# Writes that fail leave Orbax's futures with an event loop that is closed, which garbage collection finds.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STEPS = CheckpointConfig(every_steps=3, every_minutes=0.0)


def abstract(mesh):
    """(params, train state) as shapes with shardings."""
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(*s), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    shardings = mesh_lib.param_shardings(AXES, shapes, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    optimizer = optax.adam(1e-3)
    state = optax.tree.map_params(
        optimizer,
        lambda _, p: p,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh_lib.replicated(mesh)),
    )
    return params, {"opt_state": state}


def drawn(step, mesh):
    """(params, train state) with values that are a function of the step alone."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(rng.standard_normal(x.shape) * 100).astype(x.dtype), x.sharding),
        abstract(mesh),
    )


def mesh_of(**axes):
    return mesh_lib.make_mesh(MeshConfig(**axes))


def save(checkpointer, step, mesh, skipped=()):
    checkpointer.save(step, *drawn(step, mesh), {"step": step, "skipped": [*skipped]})


def assert_same(found, wanted):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, found, wanted)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, mesh):
    """A work dir with steps 3 and 6, saved from eight devices."""
    workdir = tmp_path_factory.mktemp("made")
    checkpointer = Checkpointer(workdir, STEPS)
    for step in (3, 6):
        save(checkpointer, step, mesh, skipped=range(step))
        assert checkpointer.wait()
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def data_files(workdir, step, item="*"):
    """Files of values, the largest first; what Orbax wrote before it put the processes' parts together is left out."""
    files = (workdir / f"checkpoints/{step}").glob(f"{item}/d/*")
    return sorted(files, key=lambda p: (p.stat().st_size, p), reverse=True)


def flip(path, position=None):
    """Inverts one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0xFF
    path.write_bytes(content)


@contextlib.contextmanager
def full_disk(size=1000):
    """Any file that grows beyond `size` bytes is a write error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tidy(monkeypatch):
    """Collects what failed writes leave; inside pytest's own `ast.parse` that would trip over CPython issue 106905."""
    monkeypatch.setattr(manager_lib, "PAUSE", 1)
    yield
    gc.collect()


def run_cli(capsys, *arguments):
    code = cli.main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (8, 6), (3, 8, 70), (2, 1, 4, 3, 2)])
def test_devices_and_numpy_give_the_same_fingerprint(dtype, shape):
    values = np.asarray(np.random.default_rng(0).integers(-1000, 1000, shape)).astype(jnp.dtype(dtype))
    (whole,) = manager_lib.fingerprints({"x": jnp.asarray(values)}).values()
    assert whole == reader.partial_fingerprint(values, [0] * len(shape))
    if shape and shape[0] > 1:  # cut anywhere
        pieces = ((values[:1], 0), (values[1:], 1))
        assert whole == sum(reader.partial_fingerprint(v, [n] + [0] * (len(shape) - 1)) for v, n in pieces) % 2**32
    if shape == (8, 6):
        for spec in (PartitionSpec("fsdp_x", "tensor"), PartitionSpec(None, "tensor"), PartitionSpec()):
            x = jax.device_put(values, NamedSharding(mesh_of(fsdp=4, tensor=2), spec))
            assert [*manager_lib.fingerprints({"x": x}).values()] == [whole]


def test_fingerprints_see_every_bit_and_every_position():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    seen = {reader.partial_fingerprint(x, (0, 0))}
    for i in range(x.size):
        for bit in range(32):
            other = x.copy()
            other.view(np.uint32).flat[i] ^= np.uint32(1 << bit)
            seen.add(reader.partial_fingerprint(other, (0, 0)))
    moved = [x[::-1], x[:, ::-1], x.T, np.roll(x, 1), x.reshape(6, 4)]
    seen |= {reader.partial_fingerprint(np.ascontiguousarray(m), (0, 0)) for m in moved}
    assert len(seen) == 1 + 32 * x.size + len(moved)


# Restoring


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 8, "fsdp": 1}])
def test_restores_onto_another_mesh(made, axes):
    mesh = mesh_of(**axes)
    checkpointer = Checkpointer(made, STEPS)
    assert checkpointer.latest() == 6
    params, train_state, data = checkpointer.restore(6, *abstract(mesh))
    checkpointer.close()
    assert_same((params, train_state), drawn(6, mesh))
    assert data == {"step": 6, "skipped": list(range(6))}
    jax.tree.map(
        lambda x, a: x.sharding == a.sharding or pytest.fail("sharding"), (params, train_state), abstract(mesh)
    )


_ONE_DEVICE = """
import sys
import jax
from rynnvla_jax.checkpoint import manager, model_dir
from tests.checkpoint import test_checkpoint as t
assert jax.device_count() == 1
mesh = t.mesh_of()
checkpointer = manager.Checkpointer(sys.argv[1], t.STEPS)
params, train_state, data = checkpointer.restore(checkpointer.latest(), *t.abstract(mesh))
t.assert_same((params, train_state), t.drawn(6, mesh))
t.assert_same(model_dir.load_params(sys.argv[1])[0], params)
print(data["step"])
"""


def test_restores_on_one_device(made):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _ONE_DEVICE, made], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["6"]


def test_other_readers_of_parameters(made, mesh):
    wanted = drawn(3, mesh)[0]
    assert_same(model_dir.load_params(made, step=3)[0], wanted)
    arrays = stream.open_params(made, 3)
    assert_same({k: a.read() for k, a in arrays.items()}, {k: np.asarray(v) for k, v in _flat(wanted).items()})
    assert model_dir.stored_shapes(made, 3) == {k: v.shape for k, v in _flat(wanted).items()}


def _flat(tree):
    return {mesh_lib.path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_pieces_are_parts_of_layers(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(model_dir, "CHUNK_BYTES", 2048)
    checkpointer = Checkpointer(tmp_path, STEPS)
    save(checkpointer, 3, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    arrays = reader.open_step(reader.step_folder(tmp_path, 3))
    for path in ("params.blocks.w_up", "train_state.opt_state.0.mu.blocks.w_up"):
        assert arrays[path].store.chunk_layout.read_chunk.shape[0] == 1


def test_an_embedding_is_not_cut_into_rows(tmp_path):
    model_dir.save_model(tmp_path, "vla", VLAConfig(), {"transformer": {"embed": np.zeros((512, 32), np.float32)}})
    embed = reader.open_step(reader.step_folder(tmp_path, 0))["params.transformer.embed"]
    assert list(embed.pieces()) == [(slice(0, 512), slice(0, 32))]


def test_another_model_is_refused_and_nothing_is_moved(workdir, mesh):
    params, train_state = abstract(mesh)
    params["extra"] = params.pop("half")
    checkpointer = Checkpointer(workdir, STEPS)
    with pytest.raises(CheckpointError, match=r"params\.extra is missing; params\.half is unexpected"):
        checkpointer.restore(6, params, train_state)
    with pytest.raises(CheckpointError, match=r"train_state\.opt_state\.trace\.half is missing"):
        checkpointer.restore(6, abstract(mesh)[0], {"opt_state": optax.trace(0.9).init(abstract(mesh)[0])})
    assert checkpointer.latest() == 6
    checkpointer.close()


def test_old_checkpoints_without_fingerprints_still_load(tmp_path, mesh, capsys):
    params, train_state = drawn(4, mesh)
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_names=("params", "train_state", "data")) as manager:
        items = {"params": ocp.args.StandardSave(params), "train_state": ocp.args.StandardSave(train_state)}
        manager.save(4, args=ocp.args.Composite(**items, data=ocp.args.JsonSave({"step": 4})))
    checkpointer = Checkpointer(tmp_path, STEPS)
    assert checkpointer.latest() == 4
    *found, data = checkpointer.restore(4, *abstract(mesh))
    assert_same(tuple(found), (params, train_state))
    assert data == {"step": 4}
    checkpointer.close()
    assert "no fingerprints" in run_cli(capsys, "list", tmp_path)[1]
    code, out, _ = run_cli(capsys, "verify", tmp_path)
    assert (code, out) == (0, "step 4: no fingerprints; all values can be read and are finite\n")


# Damage


def test_what_is_called_intact_is_what_was_saved(workdir, mesh):
    """One byte of any file of values is changed: either it is found, or no value has changed."""
    rng, wanted = random.Random(0), drawn(6, mesh)
    folder = workdir / "checkpoints/6"
    found = 0
    for _ in range(25):
        path = rng.choice(data_files(workdir, 6))
        before = path.read_bytes()
        flip(path, rng.randrange(len(before)))
        if reader.verify(reader.step_folder(workdir, 6)):
            found += 1
        else:
            arrays = reader.open_step(reader.step_folder(workdir, 6))
            for name, x in _flat({"params": wanted[0], "train_state": wanted[1]}).items():
                np.testing.assert_array_equal(arrays[name].read(), np.asarray(x))
        path.write_bytes(before)
    assert found > 10
    assert not reader.verify(reader.step_folder(workdir, 6)) and folder.exists()


@pytest.mark.parametrize("marked", [True, False], ids=["after it was verified", "before it was verified"])
def test_a_damaged_step_is_passed_over_and_its_number_is_free(workdir, mesh, marked, capsys):
    flip(data_files(workdir, 6, "params")[0])
    if not marked:  # killed between commit and verification
        (workdir / "checkpoints/6" / reader.MARK).unlink()
    checkpointer = Checkpointer(workdir, STEPS)
    assert checkpointer.latest() == (6 if marked else 3)
    *found, data = checkpointer.restore(6 if marked else 3, *abstract(mesh))
    assert data["step"] == 3
    assert_same(tuple(found), drawn(3, mesh))
    said = capsys.readouterr().err
    assert "checkpoint 6 is damaged and was moved to" in said and "params." in said
    assert (workdir / "checkpoints/damaged/6/params").exists()
    save(checkpointer, 6, mesh)
    assert checkpointer.wait() and checkpointer.latest() == 6
    checkpointer.close()
    assert reader.steps(workdir) == [3, 6]
    assert not reader.verify(reader.step_folder(workdir, 6))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("params/_METADATA", r"_METADATA is missing"),
        ("train_state/manifest.ocdbt", r"train_state.opt_state.0.mu.embed cannot be read"),
        ("data/metadata", "data/metadata cannot be read"),
        ("fingerprints/metadata", "fingerprints/metadata cannot be read"),
    ],
)
def test_a_step_with_a_file_missing_is_passed_over(workdir, file, message, capsys):
    (workdir / "checkpoints/6" / file).unlink()
    (workdir / "checkpoints/6" / reader.MARK).unlink()
    checkpointer = Checkpointer(workdir, STEPS)
    assert checkpointer.latest() == 3
    checkpointer.close()
    assert message in capsys.readouterr().err


def other_step(folder):
    (folder / "data/metadata").write_text(json.dumps({"step": 38, "skipped": []}), encoding="utf-8")


def empty_data(folder):
    (folder / "data/metadata").write_text("{}", encoding="utf-8")


def other_config(folder):
    (folder / "config/metadata").write_text(json.dumps({"seed": 1}), encoding="utf-8")


def a_file_in_its_place(folder):
    (folder.with_name("99")).write_text("", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said", "taken"),
    [
        (other_step, "data/metadata is of step 38", 3),
        (empty_data, "data/metadata does not contain the step", 3),
        (other_config, "config/metadata differs from what was saved", 3),
        (lambda folder: shutil.rmtree(folder / "config"), "config is missing", 3),
        (lambda folder: shutil.rmtree(folder / "data"), "data/metadata does not contain the step", 3),
        (lambda folder: shutil.rmtree(folder / "train_state"), "train_state is missing", 3),
        (lambda folder: shutil.rmtree(folder / "params"), "params", 3),
        (lambda folder: shutil.rmtree(folder / "fingerprints"), "fingerprints are missing", 3),
        (a_file_in_its_place, "99 is a file, not a checkpoint, and was moved to", 6),
    ],
)
def test_whatever_is_damaged_is_set_aside_and_the_step_before_is_taken(tmp_path, mesh, capsys, damage, said, taken):
    """Also of a step that was verified when it was saved."""
    first = Checkpointer(tmp_path, STEPS, {"config": {"seed": 0}})
    for step in (3, 6):
        save(first, step, mesh)
        assert first.wait()
    first.close()
    damage(tmp_path / "checkpoints/6")
    if taken == 3:
        assert reader.verify(reader.step_folder(tmp_path, 6))
    again = Checkpointer(tmp_path, STEPS)
    assert again.latest() == taken
    again.close()
    assert said in capsys.readouterr().err
    assert reader.steps(tmp_path) == ([3] if taken == 3 else [3, 6])


def test_only_damaged_steps_stop_the_run(workdir, mesh):
    shutil.rmtree(workdir / "checkpoints/3/params")
    shutil.rmtree(workdir / "checkpoints/6/params")
    checkpointer = Checkpointer(workdir, STEPS)
    with pytest.raises(CheckpointError, match="cannot be restored|every checkpoint"):
        checkpointer.restore(checkpointer.latest(), *abstract(mesh))
    checkpointer.close()
    again = Checkpointer(workdir, STEPS)
    for step in reader.steps(workdir):
        reader.unmark(reader.step_folder(workdir, step))
    with pytest.raises(CheckpointError, match="every checkpoint of .* is damaged.*To start again from step 0"):
        again.latest()
    again.close()


def test_half_written_steps_are_ignored_and_removed(workdir, mesh, capsys):
    shutil.copytree(workdir / "checkpoints/6", workdir / "checkpoints/9.orbax-checkpoint-tmp")
    checkpointer = Checkpointer(workdir, STEPS)
    assert checkpointer.latest() == 6
    save(checkpointer, 12, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "6"]


# Saving


def test_every_interval_and_retention(tmp_path, mesh):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every_steps=2, every_minutes=0.0, keep_every=6))
    assert checkpointer.latest() is None
    for step in range(1, 13):
        assert checkpointer.due(step) == (step % 2 == 0)
        if step % 2 == 0:
            save(checkpointer, step, mesh)
            save(checkpointer, step, mesh)  # an emergency right after it
    assert checkpointer.wait()
    checkpointer.close()
    assert reader.steps(tmp_path) == [6, 10, 12]
    assert all(reader.is_marked(reader.step_folder(tmp_path, s)) for s in (6, 10, 12))


def test_saving_a_saved_step_leaves_it_alone(workdir, mesh):
    checkpointer = Checkpointer(workdir, STEPS)
    checkpointer.save(6, *drawn(5, mesh), {"step": 6, "skipped": []})
    assert checkpointer.wait()
    assert_same(checkpointer.restore(6, *abstract(mesh))[:2], drawn(6, mesh))
    checkpointer.close()


def test_arrays_may_be_donated_after_save(tmp_path, mesh):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, STEPS)
    state = drawn(3, mesh)
    checkpointer.save(3, *state, {"step": 3, "skipped": []})
    state = update(state)
    assert checkpointer.wait()
    assert_same(checkpointer.restore(3, *abstract(mesh))[:2], drawn(3, mesh))
    checkpointer.close()


def test_time_between_saves(tmp_path, mesh, monkeypatch):
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, sleep=None)
    monkeypatch.setattr(manager_lib, "time", clock)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every_steps=0, every_minutes=2.0))
    now = 119.0
    assert not checkpointer.due(1)
    now = 121.0
    assert checkpointer.due(2)
    save(checkpointer, 2, mesh)
    assert not checkpointer.due(3)
    now = 242.0
    assert checkpointer.due(4)
    checkpointer.close()
    with pytest.raises(ConfigError, match="both off"):
        CheckpointConfig(every_steps=0, every_minutes=0.0)


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("step", [9, 10])
def test_a_failed_save_is_said_and_made_again(workdir, mesh, step, capsys):
    checkpointer = Checkpointer(workdir, STEPS)
    with full_disk():
        save(checkpointer, 9, mesh)
        assert not checkpointer.wait()
    said = capsys.readouterr().err
    assert f"saving step 9 in {workdir}/checkpoints failed (1 in a row): " in said and "File too large" in said
    assert checkpointer.latest() == 6
    assert checkpointer.due(10)
    save(checkpointer, step, mesh)
    assert not checkpointer.due(11)
    assert checkpointer.wait()
    assert not checkpointer.due(11) and checkpointer.due(12)
    checkpointer.close()
    assert reader.steps(workdir) == [6, step]


@pytest.mark.usefixtures("tidy")
def test_failures_in_a_row_stop_the_run(workdir, mesh, capsys):
    checkpointer = Checkpointer(workdir, CheckpointConfig(every_steps=3, patience_minutes=1 / 60))
    with full_disk():
        save(checkpointer, 9, mesh)
        assert not checkpointer.wait()
        save(checkpointer, 9, mesh)
        message = (
            r"2 saves in a row failed, for checkpoint.patience_minutes 0.0166667; the last: saving step 9 in "
            r".*File too large.*last good step is 6"
        )
        with pytest.raises(CheckpointError, match=message):
            checkpointer.wait()
        with pytest.raises(CheckpointError, match=message):
            checkpointer.due(10)
    checkpointer.close()
    assert reader.steps(workdir) == [3, 6]


@pytest.mark.usefixtures("tidy")
def test_a_directory_that_cannot_be_written_stops_the_run(tmp_path, mesh):
    (tmp_path / "checkpoints").write_text("a file is in the way", encoding="utf-8")
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(patience_minutes=0.0))
    save(checkpointer, 1, mesh)
    with pytest.raises(CheckpointError, match="1 saves in a row failed.*/checkpoints failed.*last good step is none"):
        checkpointer.wait()
    checkpointer.close()


def test_a_disk_that_lies_is_found_out_after_the_save(workdir, mesh, monkeypatch, capsys):
    read_back = reader.read_back

    def lying(folder, *parts):
        flip(data_files(workdir, 9, "train_state")[0])
        return read_back(folder, *parts)

    checkpointer = Checkpointer(workdir, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_back", lying)
        save(checkpointer, 9, mesh)
        assert not checkpointer.wait()
    said = capsys.readouterr().err
    assert "checkpoint 9 is damaged" in said and "train_state." in said and "(1 in a row)" in said
    assert checkpointer.due(9)
    save(checkpointer, 9, mesh)
    assert checkpointer.wait() and checkpointer.latest() == 9
    checkpointer.close()
    assert_same(checkpointer.restore(9, *abstract(mesh))[:2], drawn(9, mesh))


@pytest.mark.usefixtures("tidy")
def test_saves_are_repeated_with_growing_pauses_while_the_run_goes_on(workdir, mesh, monkeypatch):
    checkpointer = Checkpointer(workdir, STEPS)
    now, phases = [1000.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(manager_lib, "time", clock)
    attempts = []
    with full_disk():
        for step in range(9, 200):
            now[0] += 1
            if checkpointer.due(step):
                attempts.append(now[0])
                save(checkpointer, step, mesh)
                checkpointer._thread.join()
        assert checkpointer.latest() == 6
    gaps = np.diff(attempts)
    assert len(gaps) >= 4 and all(a < b <= 2 * a + 6 for a, b in itertools.pairwise(gaps[1:]))
    checkpointer._phase = lambda name: phases.append(name) or contextlib.nullcontext()
    checkpointer.finish(9, *drawn(9, mesh), {"step": 9})
    assert phases[0] == "waiting to save again" and set(phases[1:]) <= {"save", "read-back"}
    assert checkpointer.latest() == 9
    checkpointer.close()


@pytest.mark.usefixtures("tidy")
def test_a_saved_step_whose_mark_could_not_be_written_is_verified_again(workdir, mesh, monkeypatch):
    checkpointer = Checkpointer(workdir, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "mark", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        save(checkpointer, 9, mesh)
        assert not checkpointer.wait()
    checkpointer.finish(9, *drawn(9, mesh), {"step": 9})
    assert reader.is_marked(reader.step_folder(workdir, 9))
    checkpointer.close()


def test_a_manager_that_cannot_be_closed_on_a_full_disk_does_not_end_the_run(workdir, mesh, monkeypatch):
    checkpointer = Checkpointer(workdir, STEPS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        patch.setattr(ocp.CheckpointManager, "close", full)
        save(checkpointer, 9, mesh)
        assert checkpointer.due(10) and not checkpointer.wait()
    checkpointer.finish(10, *drawn(10, mesh), {"step": 10})
    checkpointer.close()
    assert 10 in reader.steps(workdir)


# Several processes

_PROCESS = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from rynnvla_jax.checkpoint.manager import Checkpointer
from tests.checkpoint import test_checkpoint as t
mesh = t.mesh_of(fsdp=2, tensor=2)
checkpointer = Checkpointer(sys.argv[3], t.CheckpointConfig(every_steps=3, every_minutes=1e6))
latest = checkpointer.latest()
if latest is not None:
    params, train_state, data = checkpointer.restore(latest, *t.abstract(mesh))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), (params, train_state), t.drawn(latest, mesh))
    assert jax.tree.all(same), same
else:
    with t.full_disk():
        t.save(checkpointer, 2, mesh)
        assert not checkpointer.wait()
    assert checkpointer.due(2)
for step in range((latest or 0) + 1, 7):
    if checkpointer.due(step):
        t.save(checkpointer, step, mesh)
assert checkpointer.wait()
checkpointer.close()
print("started from", latest)
"""


def two_processes(workdir, port):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROCESS, str(port)]
    started = [
        subprocess.Popen([*command, str(i), workdir], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
        for i in range(2)
    ]
    said = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0, 0], "".join(errors[-1500:] for _, errors in said)
    return [out.splitlines()[-1] for out, _ in said], said[0][1]


def test_two_processes_save_verify_and_agree_on_damage(tmp_path, mesh):
    port = random.randint(20000, 30000)
    assert two_processes(tmp_path, port)[0] == ["started from None"] * 2
    folders = [reader.step_folder(tmp_path, s) for s in (3, 6)]
    assert all(reader.is_marked(f) and not reader.verify(f) for f in folders)
    assert not [*tmp_path.rglob("read_back*")]
    flip(data_files(tmp_path, 6, "params")[0])
    reader.unmark(folders[1])
    started, said = two_processes(tmp_path, port + 1)
    assert started == ["started from 3"] * 2
    assert "checkpoint 6 is damaged" in said
    checkpointer = Checkpointer(tmp_path, STEPS)
    assert_same(checkpointer.restore(checkpointer.latest(), *abstract(mesh))[:2], drawn(6, mesh))  # in one process
    checkpointer.close()


# The command


def test_list(workdir, capsys):
    (workdir / "checkpoints/6" / reader.MARK).unlink()
    reader.set_aside(reader.step_folder(workdir, 3))
    code, out, _ = run_cli(capsys, "list", workdir)
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert code == 0
    assert rows["6"][-2:] == ["unverified", "6"]
    assert rows["3"][-2:] == ["damaged", "3"]
    assert float(rows["6"][1]) > 10 and rows["6"][2] == "KiB"
    code, _, err = run_cli(capsys, "list", workdir / "assets")
    assert code == 1 and "contains no checkpoint" in err


@pytest.mark.parametrize("damage", ["cut", "no index"])
def test_parameters_that_cannot_be_read_are_an_error_with_the_remedy(workdir, damage):
    if damage == "cut":
        for file in data_files(workdir, 6, "params"):
            file.write_bytes(file.read_bytes()[:100])
    else:
        (workdir / "checkpoints/6/params/_METADATA").unlink()
    for read in (model_dir.load_params, page.parameters):
        with pytest.raises(CheckpointError, match="checkpoint verify" if damage == "cut" else "_METADATA is missing"):
            read(workdir)


def test_verify_names_what_is_damaged(workdir, mesh, capsys):
    code, out, _ = run_cli(capsys, "verify", workdir)
    assert (code, out) == (0, "step 3: intact\nstep 6: intact\n")
    flip(data_files(workdir, 6, "params")[0])
    code, out, err = run_cli(capsys, "verify", workdir)
    assert code == 1 and "1 damaged" in err
    assert "step 3: intact" in out and "step 6: damaged" in out
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  params.")]
    arrays = reader.open_step(reader.step_folder(workdir, 6))
    wanted = {f"params.{k}": np.asarray(x) for k, x in _flat(drawn(6, mesh)[0]).items()}

    def intact(name):
        try:
            return np.array_equal(arrays[name].read(), wanted[name])
        except ValueError:
            return False

    assert names == sorted(name for name in wanted if not intact(name)) and names
    assert run_cli(capsys, "verify", workdir, "--step", "3")[0] == 0
    assert "unverified" in run_cli(capsys, "list", workdir)[1]


def test_verify_of_parameters_alone_needs_them_finite(tmp_path, capsys):
    for directory, value in (("good", 1.0), ("bad", np.nan)):
        params = {"a": jnp.ones((3, 4)), "b": jnp.full(5, value)}
        model_dir.save_model(tmp_path / directory, "vla", config.VLAConfig(), params)
    assert run_cli(capsys, "verify", tmp_path / "good")[0] == 0
    code, out, _ = run_cli(capsys, "verify", tmp_path / "bad")
    assert code == 1 and "params.b has values that are not finite" in out


def test_restore_shape(made, capsys, mesh):
    code, out, _ = run_cli(capsys, "restore-shape", made, "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 6
    wanted = _flat(dict(zip(("params", "train_state"), abstract(mesh), strict=True)))
    assert {k: (tuple(a["shape"]), a["dtype"]) for k, a in found["arrays"].items()} == {
        k: (x.shape, x.dtype.name) for k, x in wanted.items()
    }
    size = sum(x.size * x.dtype.itemsize for k, x in wanted.items() if k.startswith("params."))
    assert found["totals"]["params"]["bytes"] == size
    code, out, _ = run_cli(capsys, "restore-shape", made, "--step", "3")
    assert code == 0 and "params.blocks.w_up" in out and "step 3 train_state: 9 arrays" in out


def test_the_command_needs_no_jax(made):
    program = (
        "import sys; sys.modules['jax'] = None; from rynnvla_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    for command in ("list", "verify", "restore-shape"):
        arguments = [sys.executable, "-c", program, "checkpoint", command, made]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
