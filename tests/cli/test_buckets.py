"""What commands read from and write to buckets, and the paths that must be of this machine."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.cli.main import main as cli
from rynnvla_jax.inference import imagine
from rynnvla_jax.report import examples
from rynnvla_jax.sim import evaluate
from rynnvla_jax.storage import files
from rynnvla_jax.sweep import check, plan
from tests import ROOT, stores, sweeping, tiny


@pytest.fixture(scope="module")
def robot(_store, curriculum):
    """A work dir in a bucket, as text, and the same on this machine."""
    there = f"gs://{stores.BUCKET}/commands/robot"
    files.copy_folder(curriculum / "robot", files.place(there))
    return there, curriculum / "robot"


@pytest.fixture(scope="module")
def s3(_s3):
    """A folder of a store s3://, as text."""
    return f"s3://{stores.BUCKET}/commands"


def out_of(capsys, *words):
    """What a command prints that must succeed."""
    assert cli([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words, status=1):
    """The line with which a command ends."""
    assert cli([str(word) for word in words]) == status
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("rynnvla "))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Copies of objects are not left to whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RYNNVLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Reading


def test_checkpoints_in_a_bucket_are_listed_and_verified(robot, store, capsys):
    there, here = robot
    shapes = [out_of(capsys, "checkpoint", "restore-shape", "--json", path) for path in robot]
    assert shapes[0] == shapes[1]
    listed = [out_of(capsys, "checkpoint", "list", path).splitlines()[1].split() for path in robot]
    del listed[0][3:5], listed[1][3:5]  # the dates
    assert listed[0] == listed[1] and listed[0][-2:] == ["verified", "0"]
    requests = store.counted(lambda: out_of(capsys, "checkpoint", "list", there))
    assert len(requests) <= 15, requests
    assert out_of(capsys, "checkpoint", "verify", there) == "step 2: intact\n"


def test_a_damaged_step_in_a_bucket_is_named(robot, bucket, capsys):
    folder = files.place(bucket)
    files.copy_folder(files.place(robot[0]), folder)
    params = folder / "checkpoints" / "2" / "params"
    for data, _ in list(files.walk(params)):  # which of them has the arrays depends on the speed of the save
        if data.parent.name == "d":
            content = data.read_bytes()
            data.write_bytes(content[: len(content) // 4] + bytes(len(content) - len(content) // 4))
    assert f"damaged in {bucket}" in refused(capsys, "checkpoint", "verify", bucket)
    assert not reader.is_marked(folder / "checkpoints" / "2")


def test_models_that_were_made_on_a_disk_and_copied_are_models(assets, bucket, capsys):
    folder = files.place(bucket)
    files.copy_folder(files.place(assets["vqgan"]), folder)
    assert reader.readable_steps(bucket) == [0]
    assert "no fingerprints" in out_of(capsys, "checkpoint", "verify", bucket)
    (folder / "checkpoints" / "0" / "params" / reader.COMMIT).unlink()
    assert reader.readable_steps(f"{bucket}/") == [0]  # what was whole stays so
    files.copy_folder(files.place(assets["vqgan"]), folder / "cut", last="")
    (folder / "cut" / "checkpoints" / "0" / "params" / reader.COMMIT).unlink()
    assert "contains no whole checkpoint" in refused(capsys, "checkpoint", "verify", f"{bucket}/cut")


def test_runs_in_a_bucket_are_compared(robot, curriculum, bucket, tmp_path, capsys):
    folder = files.place(bucket)
    for name in ("video", "trajectory"):
        for file in ("assets/config.json", "metrics.jsonl", "timing.jsonl"):
            files.copy(curriculum / name / file, folder / name / file)
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    out_of(capsys, "compare", bucket, robot[0], "--out", page, "--csv", table)
    lines = table.read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(line.split(",")[:2] for line in lines) == [
        ["robot", robot[0]],
        ["trajectory", f"{bucket}/trajectory"],
        ["video", f"{bucket}/video"],
    ]
    assert f"{bucket}/none is not a directory" in refused(capsys, "compare", f"{bucket}/none", "--out", page)


def test_a_report_of_a_run_in_a_bucket(robot, tmp_path, monkeypatch, capsys):
    def not_opened(*_):
        raise ValueError("not here")

    monkeypatch.setattr(examples, "open_loader", not_opened)
    pages = []
    for path in robot:
        out_of(capsys, "report", path, "--out", tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        pages.append([line for line in text.splitlines() if "GMT" not in line and "written" not in line.lower()])
    assert len(pages[0]) == len(pages[1]) and any("2 of 2 steps" in line for line in pages[0])


def test_models_in_buckets_are_loaded(robot, s3):
    there, here = robot
    files.copy_folder(here, files.place(f"{s3}/robot"))
    wanted, _ = model_dir.load_params(here)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    onto = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), wanted)
    for path in (there, f"{s3}/robot"):
        for found, _ in (model_dir.load_params(path), model_dir.load_params(path, onto)):
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))
        fresh = model_dir.load_params(path, onto, new=("action_head.*",))
        assert len(fresh[1]) == 2 and "action_head" not in fresh[0]
        model = imagine.find(path)
        assert model.step == 2 and model.config == imagine.find(here).config
        assert reader.verify(reader.step_folder(path, 2)) == []


def test_a_policy_in_a_bucket_is_known_by_its_weights(robot, bucket, tmp_path):
    there, here = robot
    assert evaluate.weights(there) == evaluate.weights(str(here)) != ""
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    files.copy_folder(export, files.place(bucket))
    copy = evaluate._here(bucket)
    assert not files.is_bucket(copy) and evaluate.weights(copy) == evaluate.weights(str(export)) != ""
    assert evaluate._here(there) == there and evaluate._here("ws://host:1") == "ws://host:1"
    assert evaluate.weights("ws://host:1") == evaluate.weights("expert") == ""


# Writing


@pytest.fixture(scope="module")
def exported(_store, s3, assets):
    """An export of an ActionVAE in s3://, made from its model directory in gs://."""
    model, export = f"gs://{stores.BUCKET}/commands/vae", f"{s3}/export"
    files.copy_folder(files.place(assets["vae_robot"]), files.place(model))
    assert cli(["convert", "export", model, export]) == 0
    return model, export


def test_an_export_in_a_bucket_is_whole_or_none(exported, bucket, capsys):
    model, export = exported
    names = {str(p.relative_to(files.place(export))) for p in files.place(export).files()}
    assert names == {"config.json", "model.safetensors", "sha256.json"}
    assert json.loads(out_of(capsys, "convert", "verify", model, export, "--json"))["pass"]
    assert "exists already, with config.json" in refused(capsys, "convert", "export", model, export)
    # What a killed export left is replaced; what somebody else put there is not.
    folder = files.place(bucket)
    for name in ("unfinished", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"")
    out_of(capsys, "convert", "export", model, bucket)
    assert {p.name for p in folder.files()} == names
    assert "exists already" in refused(capsys, "convert", "export", model, f"gs://{stores.BUCKET}/commands")


def test_an_import_between_buckets(exported, bucket, s3, capsys):
    _, export = exported
    heads = files.place(f"{bucket}-config.json")
    heads.write_text(json.dumps({"nheads": 2, "dropout": 0.1}), encoding="utf-8")
    said = out_of(capsys, "convert", "import", export, bucket, "--model-config", heads)
    assert f"from {export}" in said and f"wrote {bucket}" in said
    assert reader.find_step(bucket) == 0 and not (files.place(bucket) / "unfinished").exists()
    out_of(capsys, "convert", "verify", bucket, export)
    assert "exists already" in refused(capsys, "convert", "import", export, bucket)
    line = refused(capsys, "convert", "import", export, f"{s3}/model")
    assert "models cannot be written to s3://" in line and "aws s3 cp --recursive" in line
    for words in (["convert", "import", f"{export}/none", f"{bucket}/other"], ["deploy", "check", f"{export}/none"]):
        assert f"No such file or directory: {export}/none" in refused(capsys, *words)
    assert f"{export}/config.json lacks the group" in refused(capsys, "deploy", "check", export)


def test_an_import_continues_a_killed_one_and_deletes_nothing_else(exported, bucket, capsys):
    _, export = exported
    folder = files.place(bucket)
    left = ("unfinished", "checkpoints/0/params/_METADATA", "assets/statistics.json")
    for name in (*left, "assets/notes.txt"):
        (folder / name).write_bytes(b"mine")
    assert "exists already, with assets/notes.txt" in refused(capsys, "convert", "import", export, bucket)
    assert {str(p.relative_to(folder)) for p in folder.files()} == {*left, "assets/notes.txt"}
    (folder / "assets/notes.txt").unlink()
    (folder / "unfinished").unlink()  # nobody says that an import wrote these
    assert "exists already, with" in refused(capsys, "convert", "import", export, bucket)
    (folder / "unfinished").write_bytes(b"")
    out_of(capsys, "convert", "import", export, bucket)
    assert not {"unfinished", "assets/statistics.json"} & {str(p.relative_to(folder)) for p in folder.files()}


@pytest.mark.slow
def test_an_import_that_is_killed_anywhere_is_made_by_the_next(exported, bucket, store, capsys):
    _, export = exported
    folder, store.delay = files.place(bucket), 0.02
    command = [sys.executable, "-m", "rynnvla_jax.cli", "convert", "import", export, bucket]
    for count in (2, 6, 12, 18):
        before = len(store.requests)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(store.requests) < before + count:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"it needs less than {count} requests"
        assert not (folder / "assets" / "model.json").exists()
    out_of(capsys, "convert", "import", export, bucket)
    assert reader.verify(reader.step_folder(bucket, 0)) == []
    assert {path.name for path in folder.iterdir()} == {"assets", "checkpoints"}


# Sweeps


def test_a_sweep_writes_job_files_for_work_dirs_in_a_bucket(tmp_path, monkeypatch, bucket, s3, capsys):
    verdict = check.Verdict([], sweeping.METRICS)
    monkeypatch.setattr(check, "ask", lambda configs, *_: check.Found("cpu", 1, [verdict] * len(configs)))
    monkeypatch.chdir(tmp_path)
    config = sweeping.write_config(tmp_path / "config.py")
    line = ["sweep", "--config", config, "--out", bucket, "--config.total_steps=5"]
    slurm = ["--launcher", "slurm", "--", "--nodes", "1", "--gpus-per-node", "8"]
    out = tmp_path / bucket.removeprefix("gs://").replace("/", "-")
    assert f"job files in {out.name}/jobs" in out_of(capsys, *line, *slurm)
    jobs = [file.read_text(encoding="utf-8") for file in sorted((out / "jobs").iterdir())]
    assert len(jobs) == 4 and f"--workdir={bucket}/003_peak_lr=0.002,seed=1" in jobs[3]
    assert (out / "submit.sh").read_text(encoding="utf-8").count("\nsbatch") == 4
    assert len(plan.recalled(bucket)["points"]) == 4
    done = files.place(bucket) / "001_peak_lr=0.001,seed=1" / "checkpoints" / "5"
    for name in (reader.COMMIT, reader.MARK):
        (done / name).write_bytes(b"{}")
    assert "3 job files" in out_of(capsys, *line, *slurm)
    assert "need a folder here" in refused(capsys, *line)
    assert "nothing was started" in out_of(capsys, *line, "--dry-run")
    assert "cannot be saved in s3://" in refused(capsys, *line[:3], "--out", f"{s3}/x", *slurm)
    files.remove(files.place(bucket) / plan.FILE)
    assert "is not empty and is not a sweep" in refused(capsys, *line, *slurm)


def test_the_points_of_a_sweep_may_name_buckets(assets, bucket):
    files.copy(files.place(assets["tokenizer.json"]), files.place(f"{bucket}/tokenizer.json"))
    files.copy_folder(files.place(assets["vqgan"]), files.place(f"{bucket}/vqgan"))
    keys = {"tokenizer": f"{bucket}/tokenizer.json", "vqgan": f"{bucket}/vqgan"}
    config = tiny.typed(tiny.config("video", f"records:{bucket}/vqgan", **keys))
    assert check.missing_data(config) == []
    completed, _ = check.inherit(config, files.place(f"{bucket}/run"))
    assert completed.vla.transformer.vocab_size and completed.vqgan_model.num_codes == 32
    other = tiny.typed(tiny.config("video", "records:gs://other-bucket/x", **keys))
    (verdict,) = check.check([other], [files.place(f"{bucket}/run")], jax.devices()[:1])
    assert "the bucket other-bucket does not exist" in verdict.faults[0]


# What must be of this machine


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["report", "runs/a", "--out", "gs://b/x.html"], "--out"),
        (["compare", "runs/a", "--out", "x.html", "--csv", "gs://b/x.csv"], "--csv"),
        (["imagine", "runs/a", "--image", "gs://b/x.png", "--text", "t", "--out", "x.png"], "--image"),
        (["evaluate", "--policy", "hold", "--out", "gs://b/x"], "--out"),
        (["record", "--task", "block", "--episodes", "1", "--out", "gs://b/x"], "--out"),
        (["demo", "--out", "gs://b/x"], "--out"),
        (["aot", "--config", "configs/robot.py:7b", "--topology", "v5e:2x2", "--hlo", "gs://b/x"], "--hlo"),
        (["serve", "--policy", "x", "--certificate", "gs://b/x.pem"], "--certificate"),
        (["launch", "slurm", "--nodes=1", "--gpus-per-node=1", "--out=gs://b/x", "--", "train"], "--out"),
    ],
)
def test_other_paths_are_of_this_machine(words, argument, capsys):
    line = refused(capsys, *words, status=2)
    assert f"{argument} gs://b/x" in line and line.endswith("a bucket cannot be used here; give a path of this machine")


@pytest.mark.parametrize(
    "words",
    [
        ["report", "gs://other-bucket/a", "--out", "x.html"],
        ["compare", "gs://other-bucket/a", "--out", "x.html"],
        ["checkpoint", "list", "gs://other-bucket/a"],
        ["train", "--config", "configs/robot.py:tiny", "--workdir", "gs://other-bucket/a"],
        ["imagine", "gs://other-bucket/a", "--out", "x.png"],
        ["serve", "--policy", "gs://other-bucket/a"],
        ["deploy", "check", "gs://other-bucket/a"],
        ["evaluate", "--policy", "gs://other-bucket/a", "--out", "x"],
        ["convert", "import", "gs://other-bucket/a", "base"],
        ["convert", "export", "base", "gs://other-bucket/a"],
        ["convert", "verify", "gs://other-bucket/a", "b"],
    ],
)
def test_a_bucket_is_asked_before_anything_is_done(_store, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "gs://other-bucket/a: the bucket other-bucket does not exist; correct the name" in refused(capsys, *words)
    assert not list(tmp_path.iterdir())
