"""Ahead-of-time compilation: the real TPU compiler on this machine, and the check before a real start."""

import json
import subprocess
import sys

import jax
import pytest

from rynnvla_jax.aot import compile as aot_compile
from rynnvla_jax.aot import pods
from rynnvla_jax.config import ConfigError, MeshConfig, TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.train import lowering
from rynnvla_jax.train.loop import train
from tests import ROOT, tiny

SMALL = (
    "--config=configs/robot.py:tiny",
    "--config.vla.transformer.width=512",
    "--config.vla.transformer.num_layers=2",
    "--config.compute_dtype=bfloat16",
    "--config.vqgan_model.channels=32",
    "--config.vqgan_model.num_res_blocks=1",
)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rynnvla_jax.cli", "aot", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_step_of_a_tpu_pod_compiles_here():
    options = ("--mesh", "fsdp=2,sequence=2", "--remat", "attention", "--config.data.frame_codes=ahead")
    done = command(*SMALL, "--topology", "v5e:2x2", *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["chips"] == 4 and report["mesh"]["sequence"] == 2 and report["batch_size"] == 4
    assert report["fits"] and report["peak_bytes"] < report["capacity_bytes"]
    assert report["argument_bytes"] > report["parameters"] * 12 / 4  # weights and two moments, cut in four
    assert report["temp_bytes"] > 0 and report["compile_seconds"] > 0
    weights = 2 * (4 * 512**2 + 3 * 512 * 512) + 512 * 65540
    tokens, attention = 384, 2 * 384 * 512
    assert report["model_flops"] == pytest.approx(6 * tokens * (weights + attention))
    assert report["collective_bytes"] == pytest.approx(sum(report["collective_bytes_by_kind"].values()))
    assert 0 < report["synchronous_collective_bytes"] <= report["collective_bytes"]
    assert report["largest_buffers"][0]["bytes"] > 0 and report["overlap"]


@pytest.mark.slow  # the encoder of frames takes two thirds of the time
def test_a_step_that_encodes_its_frames_compiles_for_a_pod():
    done = command(*SMALL, "--topology", "v5e:2x2", "--mesh", "fsdp=2,sequence=2", "--remat", "attention", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] and report["temp_bytes"] > 0 and report["overlap"]


@pytest.mark.slow
def test_slices_are_compiled_with_traffic_between_them():
    done = command("--config=configs/action_vae.py:tiny", "--topology=v5e:2x2", "--slices=2", "--per-chip-batch=2")
    assert done.returncode == 0, done.stderr
    assert "2 x v5e:2x2 = 8 chips, mesh replica=2 fsdp=4" in done.stdout
    assert "between slices" in done.stdout and "HBM per chip" in done.stdout


def test_gpus_are_lowered_and_the_state_is_exact():
    done = command(*SMALL, "--topology=h100:4", "--config.data.frame_codes=ahead", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is report["peak_bytes"] is None and report["mesh"]["fsdp"] == 4
    assert report["argument_bytes"] > report["parameters"] * 12 / 4
    done = command(*SMALL, "--topology=h100:4")
    assert "lowered" in done.stdout and "not compiled" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology=v9:2x2",), "v5e, v5p, v6e"),
        (("--topology=v5e:3x5x7",), "v5e:3x5x7"),
        (("--topology=v5e:4xmany",), "KIND:AxB"),
        (("--topology=v5e:2x2", "--mesh=fsdp=3"), "4 devices"),
        (("--topology=v5e:2x2", "--mesh=fast"), "fsdp=16,tensor=4"),
        (("--topology=v5e:2x2", "--per-chip-batch=0.3"), "whole number"),
        (("--topology=v5e:2x2", "--config.no_such_key=1"), "no_such_key"),
        (("--topology=v5e:2x2", "--slices=0"), "--slices is 0; it must be at least 1"),
        (("--topology=h100:8", "--slices=2"), "--slices is only for TPU pods"),
        (("--topology=h100:8", "--hlo=step.txt"), "need a TPU topology"),
        (("--topology=v5e:2x2", "--fit", "--hlo=step.txt"), "--hlo writes one program"),
        (("--topology=v5e:2x2", "--hlo=nowhere/step.txt"), "not a file in a directory that exists"),
    ],
)
def test_wrong_requests_are_one_line(arguments, message):
    done = command("--config=configs/action_vae.py:tiny", *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("topology", "rings"),
    [
        ("v4:4x4x4", (True, True, True)),
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:8x8", (False, False, False)),
        ("v5e:8x16", (False, True, False)),
        ("v6e:16x16", (True, True, False)),
    ],
)
def test_a_pod_has_the_links_of_the_real_one(topology, rings):
    kind, _, shape = topology.partition(":")
    assert pods.wrap(kind, [int(side) for side in shape.split("x")]) == rings


def test_the_compiler_is_told_of_the_links(tmp_path):
    script = """
import sys
from rynnvla_jax.aot.environment import prepare_compiler
prepare_compiler("v4:4x4x4")
import jax
from rynnvla_jax.aot import pods
from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
mesh = mesh_lib.make_mesh(MeshConfig(), pods.pod("v4:4x4x4"))
x = jax.ShapeDtypeStruct((64, 128), "float32", sharding=mesh_lib.batch_sharding(mesh))
jax.jit(lambda x: x + 1).lower(x).compile({"xla_dump_to": sys.argv[1]})
print(mesh.devices.size)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "64", done.stderr  # one device for both cores of a chip
    (described,) = tmp_path.glob("*target_arguments.txt")
    assert "wrap{x:truey:truez:true}" in "".join(described.read_text().split())


def test_what_the_compiler_says_when_it_does_not_fit():
    assert lowering.needed_bytes("XLA:TPU compile permanent error. Used 17.51G of 15.75G hbm. Exceeded") == int(
        17.51 * 2**30
    )
    with pytest.raises(RuntimeError, match="another"):
        lowering.needed_bytes("another error")


def test_fit_prefers_what_computes_least_among_what_fits(monkeypatch):
    """Memory grows with the batch and with what a policy keeps; products with what it computes again."""

    def compiled(config, topology, slices):
        kept = {"projections": 6, "attention": 3, "full": 2, "offload": 1}[config.remat]
        again = {"projections": 1.0, "attention": 1.2, "full": 1.3, "offload": 1.3}[config.remat]
        per_chip = config.batch_size / 4
        report = aot_compile.CompileReport(
            topology, 1, 4, {}, "video", 1, config.batch_size, per_chip, 100, config.remat, kept * per_chip <= 5, 5.0,
            0, 0, 0, 0, 0.0, 1.0, again * per_chip * 1e15, {"all-gather": 1e9}, {}, 0.0, [], [],
        )  # fmt: skip
        return report, ""

    monkeypatch.setattr(aot_compile, "compile_report", compiled)
    monkeypatch.setattr(pods, "pod", lambda *_: range(4))
    tried = []
    best = aot_compile.best_fit(TrainConfig(stage="video"), "v5e:2x2", 1, tried.append)
    assert best.remat == "attention" and best.per_chip_batch == 1
    assert [t.remat for t in tried[:2]] == ["projections", "attention"] and not tried[0].fits


@pytest.fixture(scope="module")
def vae_config():
    return tiny.typed(tiny.config("action_vae", tiny.SO100, total_steps=2))


def test_a_real_start_stops_with_a_table_when_it_will_not_fit(vae_config, tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "memory_limit", lambda mesh: 2**10)
    with pytest.raises(
        ConfigError, match=r"(?s)does not fit.*arguments .*temporaries .*needed .*available .*batch_size"
    ):
        train(vae_config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "2").exists()


def test_a_real_start_runs_the_program_that_was_checked(vae_config, tmp_path, monkeypatch):
    plain = train(vae_config, tmp_path / "plain")
    monkeypatch.setattr(lowering, "memory_limit", lambda mesh: 2**40)
    assert train(vae_config, tmp_path / "checked") == plain


def test_offloaded_moments_change_nothing(tmp_path):
    config = tiny.config("action_vae", tiny.SO100, total_steps=2)
    plain = train(tiny.typed(config), tmp_path / "plain")
    config.optimizer.offload = True
    assert train(tiny.typed(config), tmp_path / "offloaded") == plain


@pytest.mark.slow
def test_the_7b_step_fits_and_hides_its_traffic():
    """The numbers of docs/performance.md: v5e 4x4, 4096 tokens."""
    done = command(
        "--config=configs/video.py:7b",
        "--topology=v5e:4x4",
        "--per-chip-batch=1",
        "--sequence=4096",
        "--config.data.frame_codes=ahead",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_bytes"] <= 8.5 * lowering.GIB
    assert report["synchronous_collective_bytes"] <= 0.05 * report["collective_bytes"]


def test_memory_limit_is_unknown_on_cpu():
    assert lowering.memory_limit(mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])) is None
