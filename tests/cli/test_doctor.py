"""`rynnvla doctor`: what works is ok, what is not there is missing, what is broken fails and says why."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata

import pytest

from rynnvla_jax.cli import doctor
from rynnvla_jax.cli import main as cli
from rynnvla_jax.storage import files
from tests import ROOT

BASE_ONLY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "flax", "torch", "av", "mujoco", "h5py", "pyarrow", "absl", "ml_collections"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from importlib import metadata
version = metadata.version
def base_only(name):
    if name in ("jax", "libtpu", "torch", "mujoco", "av", "h5py", "pyarrow"):
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = base_only
from rynnvla_jax.cli.main import main
sys.exit(main(["doctor", "--json", "--workdir", sys.argv[1]]))
"""


@pytest.fixture
def versions(monkeypatch):
    """A package that asks for alpha>=2 everywhere and beta in its extra "arm"; returns what is installed of them."""
    have = {"alpha": "2.1", "beta": "1.0"}
    asks = ["alpha>=2", 'beta; extra == "arm"', 'gamma<5; extra == "leg"']

    def version(name):
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(metadata, "requires", lambda name: asks)
    monkeypatch.setattr(metadata, "version", version)
    return have


def test_an_extra_is_ok_missing_or_of_a_wrong_version(versions):
    assert doctor.packages("").state == doctor.packages("arm").state == "ok"
    leg = doctor.packages("leg")
    assert (leg.state, leg.remedy) == ("missing", "pip install 'rynnvla_jax[leg]'") and "gamma" in leg.found
    versions |= {"alpha": "1.9", "gamma": "5.1"}
    assert doctor.packages("").state == doctor.packages("leg").state == "FAILED"
    assert "gamma 5.1 is not <5" in doctor.packages("leg").line()
    del versions["alpha"]
    assert doctor.packages("").state == "FAILED"  # the base install is not optional


def test_a_probe_that_hangs_crashes_or_fails_is_one_reason(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    package.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def probe(code, **options):
        (package / "probe.py").write_text(code, encoding="utf-8")
        return doctor.probe("probe", package="made_up", **options)

    answers = "from rynnvla_jax.cli.probes import answer; print('hello'); answer([1, 'two']); print('bye')"
    assert probe(answers) == [1, "two"]
    with pytest.raises(doctor.ProbeError, match="no result within 1 s"):
        probe("import time; time.sleep(600)", seconds=1)
    with pytest.raises(doctor.ProbeError, match="SIGSEGV"):
        probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(doctor.ProbeError, match="ValueError: the wire is cut"):
        probe("raise ValueError('the wire is cut')")
    with pytest.raises(doctor.ProbeError, match="without a result"):
        probe("import sys; sys.exit(0)")


def test_a_broken_runtime_is_reported_with_its_setting(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    check = doctor.jax_devices()
    assert check.state == "FAILED" and "JAX_PLATFORMS=abacus" in check.found and "JAX_PLATFORMS=cpu" in check.remedy
    monkeypatch.setenv("MUJOCO_GL", "pencil")
    check = doctor.renderer()
    assert check.state == "FAILED" and "MUJOCO_GL=pencil" in check.found and "OpenGL" in check.found


def test_an_accelerator_that_jax_does_not_use_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda code: [1, "cpu", "cpu"])
    monkeypatch.setattr(doctor, "accelerator", lambda: ("an NVIDIA GPU", "cuda"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    check = doctor.jax_devices()
    assert check.state == "missing" and "rynnvla_jax[cuda]" in check.remedy and "unset JAX_PLATFORMS" in check.remedy


def test_what_is_installed_here_works(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    checks = [doctor.jax_devices(), doctor.torch_device(), doctor.video_codecs(), doctor.data_files()]
    checks += [doctor.tpu_compiler()] if doctor.installed("libtpu") else []
    checks += [doctor.cpp_compiler()] if shutil.which("g++") else []
    assert [check.line() for check in checks if check.state != "ok"] == []


def test_a_compiler_that_is_none(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'probe.cpp: error: the moon is full' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert doctor.cpp_compiler().state == "FAILED" and "the moon is full" in doctor.cpp_compiler().found
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert doctor.cpp_compiler().state == "missing"


def test_a_folder_is_tried_out_and_left_as_it_was(tmp_path, monkeypatch):
    assert doctor.folder("work dir", tmp_path / "a" / "b", "").state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.folder("work dir", tmp_path / "file", "").state == "FAILED"
    monkeypatch.setattr(doctor, "SPACE", 2**80)
    full = doctor.folder("work dir", tmp_path, "give another --workdir")
    assert full.state == "FAILED" and "GiB free" in full.found and "another --workdir" in full.remedy


def test_a_bucket_is_tried_out_and_left_as_it_was(bucket, store):
    check = doctor.bucket(bucket)
    assert check.state == "ok" and f"{bucket}: an object was written, read and deleted in" in check.found, check
    assert not files.place(bucket).exists()
    checks = doctor.examine(files.place(bucket), ["gs://a", "s3://b/c"])
    named = [check.args for check in checks if getattr(check, "func", None) is doctor.bucket]
    assert named == [(bucket, "work dir"), ("gs://a",), ("s3://b/c",)]


@pytest.mark.parametrize(
    ("path", "settings", "found", "remedy"),
    [
        ("gs://other-bucket/run", {}, "the bucket other-bucket does not exist", "Correct the name, or create it"),
        (
            "gs://b",
            {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"},
            "no answer (127.0.0.1:1: Connection refused)",
            "network",
        ),
        ("gs://b", {"STORAGE_EMULATOR_HOST": None, "NO_GCE_CHECK": "true"}, "no valid credentials", "gcloud auth"),
        (
            "s3://b",
            {"AWS_EC2_METADATA_DISABLED": "true"},
            "no valid credentials (Unable to locate",
            "AWS_ACCESS_KEY_ID",
        ),
        ("/mnt/bucket", {}, "cannot be used", "Paths in a bucket begin with gs:// or s3://"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(_store, monkeypatch, tmp_path, path, settings, found, remedy):
    monkeypatch.setenv("HOME", str(tmp_path))  # without credentials of whoever runs the tests
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    check = doctor.bucket(path)
    assert check.state == "FAILED" and check.found.startswith(path) and found in check.found, check
    assert remedy in check.remedy and "\n" not in check.line()


def test_a_store_that_says_nothing_and_a_client_that_is_missing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor, "BUCKET_SECONDS", 1)
        assert "gs://b: no result within 1 s. Check the network" in doctor.bucket("gs://b").line()
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    assert doctor.bucket("gs://b").remedy == "pip install 'rynnvla_jax[gcs]'"
    assert doctor.bucket("s3://b").remedy == "pip install 'rynnvla_jax[s3]'"


@pytest.mark.parametrize("state, status", [("missing", 0), ("FAILED", 1)])
def test_only_what_is_broken_fails_the_command(monkeypatch, capsys, state, status):
    lines = [doctor.Check("one", "ok", "fine"), doctor.Check("two", state, "not fine", "Mend it")]
    monkeypatch.setattr(doctor, "examine", lambda workdir, buckets: [lambda line=line: line for line in lines])
    assert cli.main(["doctor"]) == status
    out = capsys.readouterr().out
    assert "ok       one" in out and "not fine. Mend it" in out
    assert cli.main(["doctor", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == (["two"] if status else []) and report["checks"][1]["remedy"] == "Mend it"


def test_the_base_install_is_enough(tmp_path):
    environment = {**os.environ, "RYNNVLA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BASE_ONLY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    states = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    optional = ("JAX", "TPU compiler", "torch", "renderer", "video", "HDF5, Parquet", "train", "fetch so100")
    assert {states[name] for name in optional} == {"missing"}, done.stderr
    assert done.returncode == 0 and states["base"] == "ok"
