"""Ahead-of-time compilation: the real TPU compiler on this machine, and the check before a real start."""

import json
import subprocess
import sys

import jax
import pytest

from rynnvla_jax.aot import compile as aot_compile
from rynnvla_jax.aot import estimate, fit, pods, schedule
from rynnvla_jax.cli import aot as cli_aot
from rynnvla_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig
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


POD = (*SMALL, "--topology=v5e:2x2", "--mesh=fsdp=2,sequence=2", "--remat=attention", "--config.data.frame_codes=ahead")


@pytest.fixture(scope="module")
def whole():
    done = command(*POD, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_step_of_a_tpu_pod_compiles_here(whole):
    report = whole
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
    low, high = report["estimate"]["seconds"]
    assert 0 < low <= high and report["estimate"]["words"] == "compiler's estimate, not measured on a TPU"
    assert all(parts[1] > 0 for part, parts in report["estimate"]["parts"].items() if part != "between slices")
    assert report["estimate"]["by_cycles"] > 0.5


def test_a_schedule_is_the_program_of_a_whole_compilation(whole):
    done = command(*POD, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    scheduled = json.loads(done.stdout)
    for same in ("collective_bytes_by_kind", "synchronous_collective_bytes_by_kind", "executed_flops", "overlap"):
        assert whole[same] == scheduled[same]
    assert abs(scheduled["peak_bytes"] - whole["peak_bytes"]) < 96 * 2**20  # code is not in it
    assert scheduled["argument_bytes"] is None and not scheduled["whole"]


def test_the_report_of_memory_is_read():
    report = "Memory Space: vmem (color=1)\nTotal bytes: 7\n\nMemory Space: default (color=0)\nTotal bytes: 4096 (4KiB)"
    assert schedule.reserved(report) == 4096
    with pytest.raises(ValueError, match="not a report of the use of memory: 'nothing'"):
        schedule.reserved("nothing")


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
        (("--topology=h100:8", "--hlo=step.txt"), "--hlo needs a TPU topology"),
        (("--topology=h100:8", "--fit"), "--fit needs a TPU topology"),
        (("--topology=v5e:2x2", "--fit", "--hlo=step.txt"), "--hlo writes one program"),
        (("--topology=v5e:2x2", "--fit", "--quick"), "--fit goes with neither"),
        (("--topology=v5e:2x2", "--compare", ""), "--compare is empty"),
        (("--topology=v5e:2x2", "--against=nowhere"), "--against nowhere is not a directory"),
        (("--topology=v5e:2x2", "--against=tests", "--fit"), "--against is for one setting"),
        (("--topology=v5e:2x2", "--compare", "--config.no_such_key=1"), "no_such_key"),
        (("--topology=v5e:2x2", "--option", "fast"), "--option 'fast' is not NAME=VALUE"),
        (("--topology=v5e:2x2", "--quick", "--option=xla_no_such=1"), "No such compile option: 'xla_no_such'"),
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
from rynnvla_jax.aot import estimate, fit, pods, schedule
from rynnvla_jax.cli import aot as cli_aot
from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
mesh = mesh_lib.make_mesh(MeshConfig(), pods.pod("v4:4x4x4"))
x = jax.ShapeDtypeStruct((64, 128), "float32", sharding=mesh_lib.batch_sharding(mesh))
jax.jit(lambda x: x + 1).lower(x).compile({"xla_dump_to": sys.argv[1]})
print(mesh.devices.size, *(len(pods.pod(name)) for name in ("v6e:1x1", "v5e:1x1", "v5p:1x1x1")))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["64", "1", "1", "1"], done.stderr  # one device for both cores of a chip; one chip
    (described,) = tmp_path.glob("*target_arguments.txt")
    assert "wrap{x:truey:truez:true}" in "".join(described.read_text(encoding="utf-8").split())


def test_what_the_compiler_says_when_it_does_not_fit():
    assert lowering.needed_bytes("XLA:TPU compile permanent error. Used 17.51G of 15.75G hbm. Exceeded") == int(
        17.51 * 2**30
    )
    with pytest.raises(RuntimeError, match="another"):
        lowering.needed_bytes("another error")


def report(config, options, whole, step, peak) -> aot_compile.CompileReport:
    """Of a pod of four chips with 5 bytes each; `step` is None where it does not fit."""
    mesh = mesh_lib.sizes(mesh_lib.make_mesh(config.mesh, jax.devices()[:4]))
    timed = step and estimate.Estimate((step, step), dict.fromkeys(estimate.PARTS, (0.0, step)), (0.1, 0.2), 1.0)
    return aot_compile.CompileReport(
        topology="v5e:2x2", slices=1, chips=4, mesh=mesh, stage="video", parameters=1, trained=1,
        batch_size=config.batch_size, per_chip_batch=config.batch_size / 4,
        sequence=config.sequence.length, remat=config.remat,
        compiler_options=config.compiler_options, options=options or {},
        whole=whole, fits=bool(timed), capacity_bytes=5.0, peak_bytes=int(peak),
        argument_bytes=0, temp_bytes=0, host_bytes=0, compile_seconds=0.0, model_flops=1.0, executed_flops=1.0,
        collective_bytes={"all-gather": 1e9}, synchronous_collective_bytes={"all-gather": 5e8}, dcn_bytes=0.0,
        largest_buffers=[], overlap=[], estimate=timed or None,
    )  # fmt: skip


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that is arithmetic: memory grows with the batch and with what a policy keeps, time with what it
    computes again; half of the weights' traffic goes with `tensor`. Only whole compilations know that `sequence` is
    slow."""

    def compile_report(config, topology, slices, options, whole):
        kept = {"projections": 6, "attention": 3, "full": 2, "offload": 1}[config.remat]
        again = {"projections": 1.0, "attention": 1.2, "full": 1.3, "offload": 1.4}[config.remat]
        cut, per_chip = config.mesh.sequence > 1, config.batch_size / 4
        slow = 10 if whole and cut else 1
        step = slow * again * per_chip + 0.5 / config.mesh.tensor - 0.3 * cut - 0.1 * bool(options)
        step += config.compiler_options == "none"  # those that every run has help
        peak = kept * per_chip
        return report(config, options, whole, step if peak <= 5 else None, peak), ""

    monkeypatch.setattr(fit, "compile_report", compile_report)
    monkeypatch.setattr(fit, "pod", lambda *_: jax.devices()[:4])
    monkeypatch.setattr(fit.compiler_options, "options", lambda *_: {"shipped": True})


def test_fit_finds_what_is_fastest_among_what_fits(compiler):
    tried = []
    best = fit.search(TrainConfig(stage="video"), "v5e:2x2", 1, {"a": True}, tried.append)
    assert [(t.remat, t.fits) for t in tried[:2]] == [("projections", False), ("attention", True)]
    assert not any(t.remat == "offload" for t in tried)  # something else fits
    whole = [t for t in tried if t.whole]
    assert (
        len(whole) == 5
        and [t.compiler_options for t in whole].count("none") == 1
        and sum(t.mesh["sequence"] > 1 for t in whole) > 0
    )  # they looked good
    assert best[0].remat == "full" and best[0].per_chip_batch == 2 and best[0].mesh["tensor"] == 4
    assert best[0].options == {"a": True} and best[1].options == {}


@pytest.fixture
def here(monkeypatch):
    """The command in this process, where the compiler is arithmetic."""
    monkeypatch.setattr(cli_aot, "prepare_compiler", lambda _: None)
    monkeypatch.setattr(pods, "pod", lambda *_: range(4))
    return cli_aot.main


def test_fit_prints_a_table_and_the_command_to_train_with(compiler, here, capsys):
    words = ["--config=configs/video.py:tiny", "--topology=v5e:2x2", "--fit", "--sequence=512", "--option=a=true"]
    assert here([*words, "--config.seed=3"]) == 0
    out, err = capsys.readouterr()
    assert "mesh tensor=4, batch 2 per chip, remat full: 0.00 of 0.00 GiB, step 2.62 s" in err
    assert "us per token" in out and "not measured on a TPU" in out
    assert out.splitlines()[-1] == (
        "LIBTPU_INIT_ARGS=--a=true rynnvla train --workdir=DIR --config=configs/video.py:tiny --config.seed=3 "
        "--config.sequence.length=512 --config.mesh.tensor=4 --config.batch_size=8 --config.remat=full"
    )


def test_two_settings_stand_side_by_side(monkeypatch, here, capsys):
    def compiled(config, topology, slices, options, whole):
        step = None if config.remat == "none" else config.batch_size / 8
        return report(config, options, whole, step, 3 * 2**30), ""

    monkeypatch.setattr(aot_compile, "compile_report", compiled)
    words = ["--config=configs/video.py:tiny", "--topology=v5e:2x2", "--per-chip-batch=2", "--quick"]
    assert here([*words, "--compare", "--per-chip-batch 4 --option b=1 --config.mesh.tensor=2"]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["mesh"][1:] == ["fsdp=4", "fsdp=2", "tensor=2"] and rows["options"][1:] == ["-", "b=1"]
    assert rows["step, s"][2:] == ["1", "2", "2.00", "x"] and rows["us per token and chip"][-2:] == ["1.00", "x"]
    assert rows["HBM per chip, GiB"][4:] == ["3.00", "3.00", "1.00", "x"]
    assert "times: compiler's estimate, not measured on a TPU" in rows
    assert any("only scheduled" in row for row in rows)

    assert here([*words, "--compare", "configs/video.py:tiny --remat none", "--json"]) == 1  # one does not fit
    left, right = json.loads(capsys.readouterr().out)["reports"]
    assert left["fits"] and not right["fits"] and right["estimate"] is None


def test_fit_keeps_a_mesh_that_is_given(compiler):
    tried = []
    fit.search(TrainConfig(stage="video", mesh=MeshConfig(tensor=2)), "v5e:2x2", 1, {}, tried.append)
    assert {t.mesh["tensor"] for t in tried} == {2}


def test_fit_says_when_nothing_fits(compiler):
    config = TrainConfig(stage="video", batch_size=24, optimizer=OptimizerConfig(accumulation=6))
    with pytest.raises(ConfigError, match="nothing fits v5e:2x2: use more chips"):
        fit.search(config, "v5e:2x2", 1, {}, lambda _: None)


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


def test_a_full_disk_is_said_instead_of_reading_half_a_program(monkeypatch):
    """The compiler does not say it; here nothing writes, and the disk counts as full."""
    monkeypatch.setattr(schedule, "FULL", 2**62)
    monkeypatch.setattr(schedule.children, "module", lambda name: ["cat"])
    with pytest.raises(OSError, match="No space left on device: .*rynnvla-"):
        schedule.schedule(TrainConfig(stage="action_vae"), "v5e:2x2")


def test_memory_limit_is_unknown_on_cpu():
    assert lowering.memory_limit(mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])) is None
