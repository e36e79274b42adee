"""Sweeps: definitions, the check before the start, runs that fail or are killed, job files, searches."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from rynnvla_jax import config_file
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.cli.arguments import parse_with_overrides
from rynnvla_jax.cli.main import main as cli
from rynnvla_jax.cli.train import Train
from rynnvla_jax.config import ConfigError
from rynnvla_jax.sweep import check, hyper, listing, plan, run
from tests import sweeping, tiny
from tests.command import ROOT, SMALL


@pytest.fixture
def here(monkeypatch):
    """The stand-in in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("rynnvla_jax.sweep.run.PROGRAM", sweeping.STAND_IN)
    monkeypatch.setattr(check, "ask", sweeping.ask)
    return lambda argv: cli(["sweep", *argv])


@contextlib.contextmanager
def command(*arguments, hold_at=None):
    """A sweep of stand-ins as a process of its own; first attempts stay at step `hold_at`."""
    line = [*sweeping.STAND_IN, "sweep", *map(str, arguments)]
    environment = {**os.environ, **({} if hold_at is None else {"HOLD_AT": str(hold_at)})}
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not come about within a minute"
        time.sleep(0.02)


def steps(out):
    """Logged steps of every work dir."""
    return {f.parent.name: len(f.read_text(encoding="utf-8").splitlines()) for f in sorted(out.glob("*/metrics.jsonl"))}


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return open(f"/proc/{pid}/stat", encoding="utf-8").read().split()[2] != "Z"
    return False


def definition(tmp_path, points="[{'seed': 1}]", overrides=()):
    return plan.define(sweeping.write_config(tmp_path / "config.py", points), overrides)


# What a sweep is


def test_names_and_numbers_follow_from_the_definition(tmp_path):
    d = definition(
        tmp_path,
        "h.product([h.chainit([h.named('no drop/out', h.fixed('vla.transformer.dropout', 0.0)),"
        " h.sweep('action_vae_model.width', [64])]), h.sweep('optimizer.peak_lr', [1e-5]), h.sweep('seed', [3, 4])])",
    )
    points, faults = plan.resolve(d, plan.points(d))
    assert not faults
    assert [p.name for p in points] == [
        "000_no-drop-out,peak_lr=1e-05,seed=3",
        "001_no-drop-out,peak_lr=1e-05,seed=4",
        "002_action_vae_model.width=64,peak_lr=1e-05,seed=3",
        "003_action_vae_model.width=64,peak_lr=1e-05,seed=4",
    ]
    assert points[1].config.seed == 4 and points[1].config.vla.transformer.dropout == 0.0
    assert plan.differing(points) == ["seed", "vla.transformer.dropout"]


def test_the_argument_of_the_config_reaches_a_sweep_that_asks_for_it(tmp_path):
    file = tmp_path / "config.py"
    sweeping.write_config(file, "[{'seed': {'tiny': 1, 'full': 2}[arg]}]")
    file.write_text(file.read_text(encoding="utf-8").replace("get_hyper(h)", "get_hyper(h, arg)"), encoding="utf-8")
    assert plan.points(plan.define(f"{file}:full")) == [{"seed": 2}]


VALUES = {
    "optimizer.peak_lr": [1e-5, np.float64(0.1) + 0.2, 1],
    "seed": [np.int64(3)],
    "data.mixture": [(("lerobot:/a b", 0.7), ("egodex:/c", 0.3)), [["lerobot:/a", 1]]],
    "init_from.new": [(), ["state_projection.*"]],
    "vla.transformer.swin_norm": [True],
    "data.wrist": ["", "a=b,'c'"],
    "profile_steps": [(1, 2)],
}


def test_the_command_of_a_point_makes_its_config(tmp_path):
    d = definition(tmp_path, overrides=["--config.total_steps", "5", "--config.remat=none"])
    points, faults = plan.resolve(d, hyper.chainit(hyper.sweep(k, v) for k, v in VALUES.items()))
    assert not faults
    for point in points:
        own, *arguments = point.arguments(d, tmp_path / "out")
        train, overrides = parse_with_overrides(Train, "rynnvla train", arguments)
        assert own == "train" and train.workdir == tmp_path / "out" / point.name
        assert config_file.load(train.config, overrides).build() == point.config
        assert (point.config.total_steps, point.config.remat) == (5, "none")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"optimizer.peek_lr": 1.0}, r"unknown key config.optimizer.peek_lr. Did you mean config.optimizer.peak_lr\?"),
        ({"optimiser.peak_lr": 1.0}, r"Did you mean config.optimizer\?"),
        ({"optimizer": 1.0}, "config.optimizer is a group of keys; set one of optimizer.acc"),
        ({"seed.x": 1}, r"config.seed"),
        ({"seed": 1.5}, "config.seed must be int"),
        ({"seed": "1"}, "config.seed must be int"),
        ({"remat": "sometimes"}, "remat is 'sometimes'; choose"),
        ({"vla.transformer.width": 190}, r"190 is not a multiple of num_heads .* \(.*was set to 190 by the point"),
        ({"batch_size": 4}, "batch_size is set by --config.batch_size and by the sweep"),
    ],
)
def test_a_wrong_point_is_named(tmp_path, point, message):
    d = definition(tmp_path, overrides=["--config.batch_size=8"])
    with pytest.raises(ConfigError, match=message):
        plan.make_point(d, 0, point)


def test_a_run_that_is_there_twice_is_a_fault(tmp_path):
    d = definition(tmp_path)
    _, faults = plan.resolve(d, [{"seed": 0}, {"seed": 1}, {"remat": d.base["remat"]}])
    assert faults == [(2, "the same run as 000_seed=0; remove one of them")]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("from rynnvla_jax.configs.robot import get_config", r"defines no get_hyper\(h\)"),
        ("from rynnvla_jax.configs.robot import get_config\ndef get_hyper(h): return []", "returned no points"),
        ("from rynnvla_jax.configs.robot import get_config\ndef get_hyper(h): return [1]", "list of points"),
    ],
)
def test_a_file_without_a_sweep_says_what_is_missing(tmp_path, file, message):
    with pytest.raises(ConfigError, match="config.py"):  # not there
        plan.define(str(tmp_path / "config.py"))
    (tmp_path / "config.py").write_text(file, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        plan.points(plan.define(str(tmp_path / "config.py")))


# The check before the start


def robot(assets, **overrides):
    own = {"tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"], "action_vae": assets["vae_robot"]}
    return tiny.typed(tiny.config("robot", tiny.SO100, **{**own, **overrides}))


def verdict(config, tmp_path, **more):
    return check.check([config], [tmp_path / "run"], jax.devices(), **more)[0]


def test_what_can_run_has_no_faults_and_names_its_metrics(assets, tmp_path):
    found = verdict(robot(assets), tmp_path)
    assert found.faults == []
    assert {"loss", "action_l1", "cross_entropy", "grad_norm", "skipped_total"} <= set(found.metrics)
    assert not any(name.startswith("eval/") for name in found.metrics)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 12}, "not a multiple of the 8 batch shards"),
        ({"mesh.tensor": 3}, "8 devices"),
        ({"mesh.tensor": 8, "vla.transformer.feed_forward": 60}, "not a multiple of mesh axis tensor"),
        ({"tokenizer": "nowhere.json"}, "config.tokenizer nowhere.json does not exist"),
        ({"data.chunk": 7}, "data.chunk is 7 but the action VAE encodes 5"),
        ({"init_from.path": "nowhere"}, "config.init_from.path: nowhere does not exist"),
        ({"data.source": "lerobot:nowhere"}, "nowhere does not exist"),
        ({"data.source": "lerobt:nowhere"}, "not KIND:PATH"),
        ({"data.source": ""}, "data.source is empty"),
    ],
)
def test_faults_are_found_without_running(assets, tmp_path, overrides, message):
    (fault,) = verdict(robot(assets, **overrides), tmp_path).faults
    assert message in fault and "\n" not in fault


def test_files_are_not_looked_for_on_the_wrong_machine(assets, tmp_path):
    config = robot(assets, **{"tokenizer": "nowhere.json", "data.source": "lerobot:nowhere"})
    assert len(verdict(config, tmp_path).faults) == 2
    assert verdict(config, tmp_path, files=False).faults == []


def test_weights_that_do_not_fit_are_found_without_reading_them(assets, tmp_path):
    from flax import nnx

    from rynnvla_jax.models.params import split
    from rynnvla_jax.train.stages import OBJECTIVES

    first = tiny.typed(tiny.config("robot", tiny.SO100, **{"vla.transformer.vocab_size": 99}))
    params = split(OBJECTIVES["robot"].build(first, nnx.Rngs(0)))[1]
    model_dir.save_model(tmp_path / "first", "vla", first.vla, params)
    config = robot(assets, **{"init_from.path": str(tmp_path / "first"), "init_from.new": ()})
    (fault,) = verdict(config, tmp_path).faults
    assert "does not fit this model" in fault and "in the checkpoint, but" in fault


def test_equal_programs_are_traced_once(monkeypatch, assets, tmp_path):
    traced = []
    whole = check.trace
    monkeypatch.setattr(check, "trace", lambda config, *more: traced.append(config) or whole(config, *more))
    configs = [robot(assets, seed=s, **{"optimizer.peak_lr": r}) for s in (0, 1) for r in (0.1, 0.2)]
    found = check.check([*configs, robot(assets, remat="none")], [tmp_path] * 5, jax.devices())
    assert len(traced) == 2 and not any(v.faults for v in found)


def test_runs_on_gpus_share_them_and_a_tpu_is_not_shared():
    def devices(platform, n):
        return [type("Device", (), {"platform": platform})() for _ in range(n)]

    assert len(check.share(devices("gpu", 8), 3)) == 2
    assert len(check.share(devices("cpu", 1), 3)) == 1
    for platform in ("gpu", "tpu"):
        with pytest.raises(ConfigError, match="--parallel 3"):
            check.share(devices(platform, 2), 3)


def test_runs_on_cpus_share_a_cache_of_this_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    first, second = (run._environment(slot, tmp_path, 2, "cpu", 1)["JAX_COMPILATION_CACHE_DIR"] for slot in (0, 1))
    assert first == second == str(tmp_path / "compiled" / run._processor())
    assert "JAX_COMPILATION_CACHE_DIR" not in run._environment(0, tmp_path, 1, "gpu", 1)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    assert run._environment(0, tmp_path, 1, "cpu", 1)["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_all_faults_of_all_points_come_in_one_message(tmp_path, capsys):
    config = sweeping.write_config(
        tmp_path / "config.py",
        "h.product([h.sweep('batch_size', [8, 12]), h.sweep('data.source', ['lerobot:nowhere'])]) "
        "+ [{'sed': 1, 'optimizer.peek_lr': 1.0}]",
    )
    out = tmp_path / "out"
    assert cli(["sweep", "--config", config, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "3 of 3 points are invalid; nothing was started" in said
    for text in (
        "000, 001: data source 'lerobot:nowhere'",
        "001: config.batch_size 12",
        "002: unknown key config.sed. Did you mean config.seed?",
        "002: unknown key config.optimizer.peek_lr. Did you mean config.optimizer.peak_lr?",
    ):
        assert text in said
    assert not out.exists()


# Running


def test_points_run_each_with_its_cores_and_failed_ones_are_tried_again(tmp_path, here, capsys):
    config = sweeping.write_config(tmp_path / "config.py", "h.sweep('seed', [0, 7, 13, 1])")
    out = tmp_path / "out"
    line = ["--config", config, "--out", str(out), "--parallel", "2", "--config.total_steps=5"]
    assert here(line) == 1
    said = capsys.readouterr().out
    assert "FAILED 002_seed=13: exit status 3: this seed brings bad luck" in said and f"{out}/002_seed=13.log" in said
    names = ["000_seed=0", "001_seed=7", "002_seed=13", "003_seed=1"]
    assert [len(sweeping.attempts(out / n)) for n in names] == [1, 2, 2, 1]
    cores = len(os.sched_getaffinity(0))
    assert all(len(a["cores"]) == max(1, cores // 2) for n in names for a in sweeping.attempts(out / n))
    assert here(line) == 1  # only what failed runs again
    assert [len(sweeping.attempts(out / n)) for n in names] == [1, 2, 4, 1]
    events = [json.loads(x) for x in (out / "status.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["event"] for e in events if e["point"] == "001_seed=7"] == ["started", "failed", "started", "finished"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_sweep_saves_and_the_same_command_continues(tmp_path, number, status):
    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    line = ("--config", config, "--out", out, "--parallel", 2, "--config.total_steps=20")
    with command(*line, hold_at=5) as process:
        wait_for(lambda: list(steps(out).values()) == [5, 5])
        process.send_signal(number)
        assert process.wait(timeout=60) == status
        assert "the same command continues" in process.stderr.read()
    before = steps(out)  # the step at hand is finished and saved
    assert list(before.values()) == [6, 6]
    with command(*line) as process:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert list(steps(out).values()) == [20] * 4
    assert [[a["from"] for a in sweeping.attempts(out / name)] for name in steps(out)] == [[0, 6], [0, 6], [0], [0]]


def test_runs_that_outlive_a_killed_sweep_keep_others_off(tmp_path, here, capsys):
    config, out = sweeping.write_config(tmp_path / "config.py", "[{'seed': 1}]"), tmp_path / "out"
    line = ["--config", config, "--out", str(out), "--config.total_steps=20"]
    with command(*line, hold_at=5) as process:
        wait_for(lambda: list(steps(out).values()) == [5])
        assert here(line) == 1
        assert f"another sweep (process {process.pid}) is running" in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = json.loads((out / "status.jsonl").read_text(encoding="utf-8").splitlines()[0])["pid"]
    try:
        assert here(line) == 1
        assert f"of a killed sweep are still running in {out} (processes {run})" in capsys.readouterr().err
    finally:
        os.kill(run, signal.SIGTERM)
    wait_for(lambda: not alive(run))
    assert here(line) == 0
    assert [a["from"] for a in sweeping.attempts(out / "000_seed=1")] == [0, 6]


def test_another_definition_is_refused_and_new_points_are_added(tmp_path, here, capsys):
    file, out = tmp_path / "config.py", tmp_path / "out"
    config = sweeping.write_config(file, "h.sweep('seed', [0, 1])")
    line = ["--config", config, "--out", str(out), "--config.total_steps=2"]
    assert here(line) == 0
    sweeping.write_config(file, "h.sweep('seed', [0, 2])")
    assert here(line) == 1
    assert "point 001_seed=1 {'seed': 1} -> 001_seed=2 {'seed': 2}" in capsys.readouterr().err
    sweeping.write_config(file, "h.sweep('seed', [0])")
    assert here(line) == 1
    assert "point 001_seed=1 is missing" in capsys.readouterr().err
    sweeping.write_config(file, "h.sweep('seed', [0, 1])")
    assert here([*line, "--config.batch_size=16"]) == 1
    assert "000_seed=0: config.batch_size: 64 -> 16" in capsys.readouterr().err
    sweeping.write_config(file, "h.sweep('seed', [0, 1, 2])")
    assert here(line) == 0
    assert [len(sweeping.attempts(out / f"00{i}_seed={i}")) for i in range(3)] == [1, 1, 1]


def test_a_sweep_of_mixtures_is_known_again(tmp_path):
    d = definition(tmp_path, "h.sweep('data.mixture', [(('lerobot:a', 0.5), ('lerobot:b', 0.5))])")
    points, faults = plan.resolve(d, plan.points(d))
    assert not faults
    for _ in range(2):
        plan.remember(d, points, tmp_path, "loss")


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path, here, capsys):
    config = sweeping.write_config(tmp_path / "config.py")
    assert here(["--config", config, "--out", str(tmp_path)]) == 1
    assert "is not empty and is not a sweep" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["config.py"]


def test_a_dry_run_lists_the_points_and_writes_nothing(tmp_path, here, capsys):
    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    assert here(["--config", config, "--out", str(out), "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["point", "seed", "peak_lr"] and rows[4] == ["003_peak_lr=0.002,seed=1", "1", "0.002"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "action_l1"], "choose one of grad_norm, loss, skipped_total"),
        (["--config.bach_size=8"], "bach_size"),
        (["--parallel", "0"], "at least 1"),
        (["--topology", "v5e:2x4"], "describes a pod"),
        (["--search", "optuna"], "--search needs --trials"),
        (["--", "--nodes", "1"], "--launcher slurm or gke"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, here, capsys, arguments, message):
    config = sweeping.write_config(tmp_path / "config.py")
    assert here(["--config", config, "--out", str(tmp_path / "out"), *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_real_sweep_trains_and_a_second_start_finds_it_done(tmp_path):
    config, out = sweeping.write_config(tmp_path / "config.py", "h.sweep('seed', [0, 1])"), tmp_path / "out"
    small = {**SMALL, "total_steps": 4, "checkpoint.every_steps": 2}
    line = [
        sys.executable,
        "-m",
        "rynnvla_jax.cli",
        "sweep",
        "--config",
        config,
        "--out",
        str(out),
        "--parallel",
        "2",
    ]
    line += ["--metric", "l1", *(f"--config.{k}={v}" for k, v in small.items())]
    first = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for seed in (0, 1):
        workdir = out / f"00{seed}_seed={seed}"
        assert json.loads((workdir / "assets/config.json").read_text(encoding="utf-8"))["seed"] == seed
        assert reader.steps(workdir)[-1] == 4
    assert first.stdout.splitlines()[-3].split()[:3] == ["point", "step", "l1"]
    written = {f: f.stat().st_mtime_ns for f in out.glob("*/metrics.jsonl")}
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert written == {f: f.stat().st_mtime_ns for f in out.glob("*/metrics.jsonl")}


# Job files


def test_slurm_gets_a_job_a_point_that_is_not_finished(tmp_path, here, capsys):
    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    options = ["--", "--nodes", "2", "--gpus-per-node", "8", "--time", "1:00:00"]
    line = ["--config", config, "--out", str(out), "--launcher", "slurm", "--config.total_steps=5"]
    assert here([*line, *options]) == 0
    assert "nothing was submitted" in capsys.readouterr().out
    jobs = sorted((out / "jobs").iterdir())
    assert [j.name for j in jobs] == [f"{p['name']}.sbatch" for p in plan.recalled(out)["points"]]
    text = jobs[3].read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2" in text and "#SBATCH --job-name=rynnvla-out-003" in text
    assert f"--workdir={out}/003_peak_lr=0.002,seed=1" in text and "--config.optimizer.peak_lr=0.002" in text
    assert (out / "submit.sh").read_text(encoding="utf-8").count("sbatch --dependency=singleton") == 4
    mark = out / "001_peak_lr=0.001,seed=1/checkpoints/5/verified.json"
    mark.parent.mkdir(parents=True)
    mark.write_text("{}", encoding="utf-8")
    assert here([*line, *options]) == 0
    submitted = (out / "submit.sh").read_text(encoding="utf-8")
    assert "001_" not in submitted and submitted.count("\nsbatch") == 3
    assert here([*line, *options, "--out", "x"]) == 2
    assert "leave --out" in capsys.readouterr().err


def test_points_are_checked_for_the_devices_of_the_job(tmp_path, capsys):
    out = tmp_path / "out"
    config = sweeping.write_config(tmp_path / "config.py", "h.sweep('batch_size', [32, 24])")
    line = ["--config", config, "--out", str(out), "--launcher", "gke", "--config.mesh.fsdp=32"]
    assert cli(["sweep", *line, "--", "--cluster", "c", "--image", "i", "--tpu-type", "v6e-32"]) == 1
    said = capsys.readouterr().err
    assert "1 of 2 points are invalid" in said
    assert "001: config.batch_size 24" in said and "not a multiple of the 32 batch shards" in said


def test_gke_gets_a_jobset_a_point(tmp_path, here, capsys):
    import yaml

    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    options = ["--", "--cluster", "c", "--tpu-type", "v5p-128", "--image", "i", "--name", "rates"]
    options += ["--mount", f"claim:{tmp_path}"]
    assert here(["--config", config, "--out", str(out), "--launcher", "gke", *options]) == 0
    assert "--mount" not in capsys.readouterr().err
    jobs = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((out / "jobs").glob("*.yaml"))]
    names = [j["metadata"]["name"] for j in jobs]
    assert [re.sub("-[0-9a-f]{6}-", "-", name) for name in names] == [f"rates-00{i}" for i in range(4)]
    assert all("claimName: claim" in file.read_text(encoding="utf-8") for file in (out / "jobs").glob("*.yaml"))
    assert (out / "submit.sh").read_text(encoding="utf-8").count("kubectl apply -f") == 4
    other = tmp_path / "more" / "out"
    assert here(["--config", config, "--out", str(other), "--launcher", "gke", *options]) == 0
    assert not any(name in file.read_text(encoding="utf-8") for name in names for file in (other / "jobs").iterdir())


# Searches


def searching(config, out, trials, *more):
    own = ["--config", config, "--out", str(out), "--search", "optuna", "--metric", "loss", "--config.total_steps=30"]
    return [*own, "--trials", str(trials), *more]


def test_a_search_finds_prunes_and_goes_on(tmp_path, here, capsys):
    import optuna

    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    assert here(searching(config, out, 14, "--parallel", "2")) == 0
    said = capsys.readouterr().out
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out}/optuna.db")
    states = [t.state.name for t in study.trials]
    assert len(states) == 14 and set(states) == {"COMPLETE", "PRUNED"}
    for trial, point in zip(study.trials, plan.recalled(out)["points"], strict=True):
        assert point["keys"] == {"optimizer.peak_lr": trial.params["lr"]}
        assert trial.state.name == "COMPLETE" or steps(out)[point["name"]] < 30
    best = plan.recalled(out)["points"][study.best_trial.number]
    assert f"best: {best['name']}" in said
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    distance = {t.number: abs(np.log10(t.params["lr"]) + 3) for t in finished}
    assert study.best_trial.number == min(distance, key=distance.get)
    assert here(searching(config, out, 15)) == 0  # one more
    assert len(steps(out)) == 15
    assert here(searching(config, out, 15)) == 0  # none
    assert len(steps(out)) == 15
    assert here(searching(config, out, 15, "--direction", "maximize")) == 1
    assert "direction minimize -> engine optuna, metric loss, direction maximize" in capsys.readouterr().err


def test_trials_that_make_no_run_are_told_and_the_search_goes_on(tmp_path, here, capsys):
    search = """{
        "optimizer.accumulation": 3 if trial.number == 9 else 1,
        "optimizer.peak_lr": trial.suggest_float("lr", 1e-6, 1.0, log=True),
        **({} if trial.number != 8 else left_out()),
    }"""
    config, out = sweeping.write_config(tmp_path / "config.py", search=search), tmp_path / "out"
    with (tmp_path / "config.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef left_out():\n    import optuna\n\n    raise optuna.TrialPruned\n")
    for trials in (11, 13):  # the second command continues behind them
        assert here(searching(config, out, trials, "--config.total_steps=3")) == 1
        said = capsys.readouterr()
        assert "FAILED 009: config.batch_size 64 is not a multiple of optimizer.accumulation" in said.out
        assert "best: 0" in said.out
    assert "\n008 " in said.out and "009" not in "".join(steps(out))
    assert [p["name"][:3] for p in plan.recalled(out)["points"]] == [name[:3] for name in steps(out)]


def test_a_search_with_an_impossible_combination_starts_and_counts_it_as_failed(tmp_path, here, capsys):
    """Heads that do not divide the width are among the samples that are checked before the first trial."""
    search = "{'action_vae_model.num_heads': trial.suggest_categorical('heads', [2, 3]), 'seed': trial.number}"
    config, out = sweeping.write_config(tmp_path / "config.py", search=search), tmp_path / "out"
    assert here(searching(config, out, 8, "--config.total_steps=3")) == 1
    said = capsys.readouterr()
    fault = r"action_vae_model.width \d+ is not a multiple of num_heads 3"
    assert re.search(rf"\d of 8 points are invalid; such trials will count as failed\n  [0-9, ]+: {fault}", said.err)
    failed = re.findall(rf"FAILED (\d+): {fault}", said.out)
    assert failed and "best: 0" in said.out and len(failed) + len(steps(out)) == 8


def test_held_out_data_decide_where_all_runs_have_them(tmp_path, here, capsys, monkeypatch):
    """The training loss is best at a rate of 1e-3, the error on held-out data at 1e-5, by which trials are pruned."""
    import optuna

    monkeypatch.setenv(sweeping.HELD_OUT, "5")
    hyper = "h.sweep('optimizer.peak_lr', [1e-5, 1e-3])"
    config = sweeping.write_config(tmp_path / "config.py", hyper)
    assert here(["--config", config, "--out", str(tmp_path / "sweep"), "--config.total_steps=30"]) == 0
    said = capsys.readouterr()
    assert "eval/action_error decides (lower is better): it is of data that the runs do not train on\n" in said.err
    assert said.out.splitlines()[-3].split()[:3] == ["point", "step", "eval/action_error"]
    assert plan.recalled(tmp_path / "sweep")["metric"] == "eval/action_error"
    line = searching(config, tmp_path / "out", 14)
    del line[line.index("--metric") : line.index("--metric") + 2]
    assert here(line) == 0
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/out/optuna.db")
    assert {t.state.name for t in study.trials} == {"COMPLETE", "PRUNED"}
    assert all(step % 5 == 0 for t in study.trials for step in t.intermediate_values)
    distance = {t.number: abs(np.log10(t.params["lr"]) + 5) for t in study.trials}
    assert study.best_trial.number == min(distance, key=distance.get)
    assert here([*searching(config, tmp_path / "other", 1), "--config.total_steps=3"]) == 0
    assert "loss decides (lower is better), as --metric says" in capsys.readouterr().err


def test_a_search_whose_choices_have_changed_is_refused_and_goes_on_with_the_old_ones(tmp_path, here, capsys):
    config, out = tmp_path / "config.py", tmp_path / "out"
    for choices, trials, status in (("[0, 1]", 2, 0), ("[0, 1, 2]", 3, 1), ("[0, 1]", 3, 0)):
        search = f"{{'seed': trial.suggest_categorical('seed', {choices})}}"
        line = searching(sweeping.write_config(config, search=search), out, trials, "--config.total_steps=3")
        assert here(line) == status
        assert ("the choices of a search must not change" in capsys.readouterr().err) == bool(status)
    assert len(steps(out)) == 3


def test_a_search_knows_which_metrics_are_better_when_higher(tmp_path, here):
    line = searching(sweeping.write_config(tmp_path / "config.py"), tmp_path / "out", 1, "--metric", "token_accuracy")
    assert here([*line, "--config.total_steps=3"]) == 0
    assert plan.recalled(tmp_path / "out")["search"]["direction"] == "maximize"


def test_a_killed_trial_is_run_again_with_its_keys(tmp_path):
    config, out = sweeping.write_config(tmp_path / "config.py"), tmp_path / "out"
    line = searching(config, out, 2)
    with command(*line, hold_at=5) as process:
        wait_for(lambda: list(steps(out).values()) == [5])
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = json.loads((out / "status.jsonl").read_text(encoding="utf-8").splitlines()[0])["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(run, signal.SIGKILL)
    wait_for(lambda: not alive(run))
    before = plan.recalled(out)["points"]
    with command(*line) as process:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    after = plan.recalled(out)["points"]
    assert len(before) == 1 and after[:1] == before and len(after) == 2
    assert [a["from"] for a in sweeping.attempts(out / before[0]["name"])] == [0, 5]
    assert list(steps(out).values()) == [30, 30]


def test_wrong_keys_of_a_search_are_found_before_it_starts(tmp_path, here, capsys):
    config = sweeping.write_config(tmp_path / "config.py", search="{'sed': trial.suggest_int('s', 0, 9)}")
    assert here(searching(config, tmp_path / "out", 2)) == 1
    assert "all: unknown key config.sed. Did you mean config.seed?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_tells_the_metrics_that_there_are(tmp_path, here, capsys):
    line = searching(sweeping.write_config(tmp_path / "config.py"), tmp_path / "out", 2)
    line[line.index("loss")] = "lss"
    assert here(line) == 1
    assert "--metric lss is not logged by all of these runs" in capsys.readouterr().err


def test_prices_are_the_estimate_on_tpus_and_flops_on_gpus(tmp_path):
    points = [plan.Point(n, {}, tiny.typed(tiny.config("action_vae", tiny.SO100)), f"{n:03d}") for n in range(2)]
    tpu = [check.Verdict([], [], 4.0, (10.0, 12.55)), check.Verdict([], [], 4.0, (1000.0, 1200.0))]
    text = listing.table(points, tpu, 0.4, tmp_path)
    assert "chip hours (compiler's estimate, not measured on a TPU)" in text and "at 40% of peak" not in text
    assert "10.0 to 12.6" in text and "1,000.0 to 1,200.0" in text
    gpu = [check.Verdict([], [], 4.0, None, 100.0), check.Verdict([], [], 4.0)]
    text = listing.table(points, gpu, 0.4, tmp_path)
    assert "chip hours at 40% of peak" in text and "250.0" in text and "estimate" not in text


@pytest.mark.slow
def test_memory_of_a_pod_is_checked(tmp_path):
    """Compiles a small VLA for a real topology, and one that no chip holds."""
    config = tiny.typed(tiny.config("video", tiny.SO100, batch_size=4, **{"data.frame_codes": "ahead"}))
    wide = replace(config.vla.transformer, vocab_size=256, width=32768, num_heads=32, num_kv_heads=32, num_layers=24)
    large = replace(config, vla=replace(config.vla, transformer=replace(wide, feed_forward=98304)))
    pod = check.Pod("v5e:2x2")
    found = check.ask([config, large], [tmp_path / "a", tmp_path / "b"], 1, pod, False).verdicts
    assert found[0].faults == [] and 0 < found[0].hbm < 15.75 and 0 < found[0].chip_hours[0] < found[0].chip_hours[1]
    assert "GiB per chip of v5e:2x2" in found[1].faults[0]
