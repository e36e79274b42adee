"""Launching: processes that find each other, a launcher that watches them, job files that a shell really runs."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from rynnvla_jax.cli.main import main as cli
from rynnvla_jax.config import ConfigError
from rynnvla_jax.distributed import initialize
from rynnvla_jax.launch import command, gke, local, slurm, tpu_vm
from tests import ROOT

TRAIN = ["train", "--config", "configs/robot.py:7b", "--workdir", "/mnt/shared/a run"]
TRAIN += ["--config.init_from.new=('a.*','b')", '--config.data.source=lerobot:$(HOME) "x"']
MEET = """
from rynnvla_jax.distributed import initialize
initialize.initialize()
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.float32(jax.process_index() + 1)).sum()
# The end of the line with it: alone it could come after a line of Gloo's.
print(f"process {jax.process_index()}/{jax.process_count()} devices {jax.device_count()} sum {total:.0f}\\n", end="")
"""


@pytest.fixture(autouse=True)
def _lone(monkeypatch):
    """No cluster around the tests, and programs that find this package."""
    for name in list(os.environ):
        if name.startswith(("RYNNVLA_", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_WORKER", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


# How processes find each other

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
STEP = {**SLURM, "SLURM_STEP_NODELIST": "node[1-4]"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environ", "platforms", "found"),
    [
        ({}, None, None),
        ({}, "cpu", None),
        (STEP, "cpu", "Slurm"),
        ({**STEP, "SLURM_NTASKS": "1"}, None, None),
        (SLURM, None, None),  # in the batch script, without srun
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, None, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "GKE TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, "GKE TPU"),  # without libtpu: an error later, not two lone runs
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", "GKE TPU"),
        ({}, "tpu,cpu", "Cloud TPU"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", None),
        (INDEXED, None, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, None),
    ],
)
def test_detection(environ, platforms, found):
    assert initialize.detect(environ, platforms) == found


def test_a_launcher_that_jax_cannot_read_is_an_error():
    with pytest.raises(ConfigError, match="srun.*RYNNVLA_COORDINATOR"):
        initialize.detect({"OMPI_COMM_WORLD_SIZE": "2"}, None)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RYNNVLA_PROCESS_ID": "0"}, "RYNNVLA_COORDINATOR and RYNNVLA_NUM_PROCESSES missing"),
        ({"RYNNVLA_NUM_PROCESSES": "2"}, "RYNNVLA_COORDINATOR and RYNNVLA_PROCESS_ID missing"),
        ({"RYNNVLA_COORDINATOR": "h:1", "RYNNVLA_NUM_PROCESSES": "2"}, "RYNNVLA_PROCESS_ID missing"),
        (dict.fromkeys(("RYNNVLA_COORDINATOR", "RYNNVLA_NUM_PROCESSES", "RYNNVLA_PROCESS_ID"), "two"), "a number"),
        ({"RYNNVLA_COORDINATOR": "h:1", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": "2"}, "must be 0 to 1"),
        ({"RYNNVLA_COORDINATOR": "h:1", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": "-1"}, "must be 0 to 1"),
        ({"RYNNVLA_COORDINATOR": "h:1", "RYNNVLA_NUM_PROCESSES": "0", "RYNNVLA_PROCESS_ID": "0"}, "at least 1"),
        ({"RYNNVLA_COORDINATOR": "host", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": "1"}, "host:port"),
        ({"RYNNVLA_COORDINATOR": "h:99999", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": "1"}, "host:port"),
        (
            {"RYNNVLA_COORDINATOR": "none.invalid:1", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": "1"},
            "host 'none.invalid' is not known here",
        ),
        (INDEXED, "Kubernetes.*jax\\[k8s\\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Kubernetes environment detected")
def test_malformed_environment(monkeypatch, environ, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        initialize.initialize()


def test_a_taken_port_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("RYNNVLA_COORDINATOR", f"localhost:{server.getsockname()[1]}")
        monkeypatch.setenv("RYNNVLA_NUM_PROCESSES", "2")
        monkeypatch.setenv("RYNNVLA_PROCESS_ID", "0")
        with pytest.raises(ConfigError, match="not free"):
            initialize.initialize()


def test_a_lone_process_stays_alone(monkeypatch):
    initialize.initialize()
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RYNNVLA_NUM_PROCESSES", "1")  # alone on purpose, inside somebody's Slurm job
    initialize.initialize()
    assert not jax.distributed.is_initialized()


def test_processes_meet_by_environment(capfd):
    assert local.run(python(MEET), 2, devices_per_process=3) == 0
    out, err = capfd.readouterr()
    for i in range(2):
        assert f"[{i}] process {i}/2 devices 6 sum 3\n" in out
        assert f"[{i}] process {i} of 2, coordinator 127.0.0.1:" in err


def test_processes_meet_by_slurm():
    for job in range(4096):  # JAX takes the port from the job id
        try:
            socket.create_server(("", 61440 + job)).close()
            break
        except OSError:
            continue
    common = {**os.environ, "SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    both = [
        subprocess.Popen(
            python(MEET),
            env={**common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, process in enumerate(both):
        out, err = process.communicate(timeout=120)
        assert f"process {i}/2 " in out and "sum 3" in out
        assert f"process {i} of 2, coordinator localhost:{61440 + job}, found by Slurm" in err


@pytest.mark.parametrize("index", [0, 1])
def test_who_comes_alone_leaves_with_one_line(index):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    program = f"from rynnvla_jax.distributed import initialize as d; d.START_SECONDS = 1; {MEET}"
    env = {"RYNNVLA_COORDINATOR": f"localhost:{port}", "RYNNVLA_NUM_PROCESSES": "2", "RYNNVLA_PROCESS_ID": str(index)}
    done = subprocess.run(python(program), env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"coordinator localhost:{port} (this is process {index}) within 1 s" in line


def test_a_coordinator_that_slurm_names_and_nobody_knows_is_said_before_the_wait():
    program = f"from rynnvla_jax.distributed import initialize as d; d.START_SECONDS = 1; {MEET}"
    env = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "none.invalid"}
    env |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    done = subprocess.run(python(program), env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first == "the coordinator's host 'none.invalid' is not known here yet; waiting up to 1 s for it"
    assert "within 1 s" in last


# Processes on one machine


def test_environment_of_a_process():
    base = {
        "XLA_FLAGS": "--a --xla_force_host_platform_device_count=8",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "HOME": "/h",
    }
    env = local.environment(base, "127.0.0.1:9", index=1, processes=2, devices=2)
    assert env["XLA_FLAGS"].split() == ["--a", "--xla_force_host_platform_device_count=2"]
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert env["HOME"] == "/h"
    assert local.environment({}, "c", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert local.environment({"CUDA_VISIBLE_DEVICES": ""}, "c", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in local.environment({}, "c", 1, 2, None)
    with pytest.raises(ConfigError, match="lists 4 GPUs.*need 6"):
        local.environment(base, "c", 0, 3, 2)


@pytest.mark.parametrize(
    ("end", "status", "how"),
    [
        ("sys.exit(3)", 3, "ended with exit status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
    ],
)
def test_who_died_and_how(monkeypatch, capfd, end, status, how):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.1)
    program = f"""
import os, signal, sys, time
if os.environ["RYNNVLA_PROCESS_ID"] == "1":
    {end}
time.sleep(600)
"""
    assert local.run(python(program), 3) == status
    err = capfd.readouterr().err
    assert f"process 1 {how}\n" in err
    assert "killing processes 0, 2, still running" in err


def test_others_may_leave_by_themselves(capfd):
    program = """
import os, sys, time
me = os.environ["RYNNVLA_PROCESS_ID"]
if me == "0":
    sys.exit(5)
time.sleep(1)
print("saved")
"""
    assert local.run(python(program), 2) == 5
    out, err = capfd.readouterr()
    assert out == "[1] saved\n"
    assert "killing" not in err


def test_a_progress_bar_becomes_lines(capfd):
    program = r"import sys; sys.stderr.write('\r10%|#\r20%|##\n'); sys.stdout.write('no end')"
    assert local.run(python(program), 1) == 0
    out, err = capfd.readouterr()
    assert err == "[0] 10%|#\n[0] 20%|##\n"
    assert out == "[0] no end\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number):
    child = """
import signal, sys, time
def save(number, _):
    print("saved on", signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(600)
"""
    launcher = f"import sys; from rynnvla_jax.launch import local; sys.exit(local.run({python(child)!r}, 2))"
    with subprocess.Popen(python(launcher), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == [f"[{i}] saved on {number.name}" for i in range(2)]
    assert process.returncode == 0
    assert f"{number.name}: passed on to 2 processes" in err


def test_launch_local_runs_train():
    line = ["launch", "local", "--processes", "2", "--", "train", "--config", "configs/robot.py:tiny", "--workdir", "w"]
    line += ["--config.optimizer.schedule=wrong"]
    done = subprocess.run(
        [sys.executable, "-m", "rynnvla_jax.cli", *line], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    for i in range(2):
        assert f"[{i}] process {i} of 2, coordinator" in done.stderr
        assert f"[{i}] rynnvla train: optimizer.schedule" in done.stderr
        assert f"process {i} ended with exit status 1" in done.stderr


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got nothing"),
        (["--config", "c", "--workdir", "w"], "the command train or data tokenize must come after"),
        (["report", "w"], "got 'report w'"),
        (["train", "--config", "c"], "lacks --workdir"),
        (["train", "--workdir=w", "--config.seed=1"], "lacks --config;"),
        (["train", "--workdir=", "--config=c"], "lacks --workdir"),
        (["train", "--config=c", "--workdir"], "lacks --workdir"),
        (["data", "tokenize", "--source", "s", "--vqgan=v"], "data tokenize command lacks --out"),
        (["data", "stats", "s"], "got 'data stats s'"),
        (["train", "--config=c", "--workdir=s3://b/run"], "cannot be saved in s3:// (Orbax); use a gs://"),
    ],
)
def test_what_follows_the_dashes(capsys, arguments, message):
    assert cli(["launch", "local", "--processes", "2", "--", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("workdir", "local_"),
    [("runs/a", True), ("/home/me/a", True), ("gs://bucket/a", False), ("/mnt/disk/a", False), ("/gcs/b", False)],
)
def test_a_local_workdir_on_a_pod_is_said(workdir, local_):
    warning = command.local_workdir(["train", "--config=c", f"--workdir={workdir}"])
    assert (warning is not None) == local_
    assert not local_ or workdir in warning


GKE = ["gke", "--cluster", "pod", "--tpu-type", "v5p-128", "--image", "image"]
MOUNT = ["--mount", "shared:/mnt/shared"]
TPU = ["tpu-vm", "--name", "pod", "--zone", "z", "--type", "v5litepod-256", "--version", "v2"]


@pytest.mark.parametrize(
    ("options", "submit"),
    [
        (["slurm", "--nodes", "2", "--gpus-per-node", "8"], "sbatch"),
        ([*GKE, *MOUNT], "kubectl apply -f"),
        ([*GKE, "--format", "xpk"], "bash"),
        (TPU, "bash"),
    ],
)
def test_files_are_written_and_not_submitted(tmp_path, capsys, options, submit):
    out = tmp_path / "job"
    assert cli(["launch", *options, "--out", str(out), "--", *TRAIN]) == 0
    written, said = out.read_text(encoding="utf-8"), capsys.readouterr()
    assert said.out == "" and f"{submit} {out}" in said.err and "warning" not in said.err
    assert cli(["launch", *options, "--", *TRAIN]) == 0
    assert capsys.readouterr().out == written
    assert "XLA_FLAGS" not in written and "LIBTPU_INIT_ARGS" not in written  # compiler flags have one place, in Python


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["slurm", "--nodes", "0", "--gpus-per-node", "8"], "--nodes and --gpus-per-node"),
        ([*GKE[:3], "--tpu-type", "v5p-100", *GKE[5:]], "v5p-128"),
        ([*GKE[:3], "--tpu-type", "v5p-8", *GKE[5:], "--num-slices", "2"], "larger type"),
        ([*GKE, "--name", "My_Run"], "a-z, 0-9 and -"),
        ([*GKE, "--mount", "/mnt/shared"], "'/mnt/shared' is not like claim:/mnt/shared"),
        ([*GKE, "--mount", "shared:mnt"], "an absolute directory"),
        ([*GKE, "--mount", "shared:/mnt:bucket"], "followed by :gcsfuse"),
        ([*GKE, *MOUNT, "--format", "xpk"], "xpk storage attach"),
        (["local", "--processes", "0"], "at least 1"),
    ],
)
def test_options_are_checked(capsys, options, message):
    assert cli(["launch", *options, "--", *TRAIN]) == 1
    assert message in capsys.readouterr().err


# Job files, run by a real shell with stand-ins for the cluster's commands


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name, body): a command that notes its arguments in NAME.log, one a line, and then runs `body`."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()

    def make(name: str, body: str = "") -> Path:
        path, log = tmp_path / "bin" / name, tmp_path / f"{name}.log"
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {shlex.quote(str(log))}\n{body}\n', encoding="utf-8")
        path.chmod(0o755)
        return log

    return make


@pytest.fixture
def cluster(stand_in, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return {
        "srun": stand_in("srun"),
        "squeue": stand_in("squeue", "echo RUNNING"),
        "scontrol": stand_in("scontrol"),
        "scancel": stand_in("scancel"),
    }


def batch(tmp_path: Path, job: slurm.SlurmJob) -> list[str]:
    (tmp_path / "job.sh").write_text(slurm.render(job, TRAIN), encoding="utf-8")
    return ["bash", "job.sh"]


def test_slurm_options():
    job = slurm.SlurmJob(
        nodes=4,
        gpus_per_node=8,
        partition="gpu",
        time="24:00:00",
        cpus_per_task=12,
        container="a b.sqsh",
        setup="module x",
    )
    text = slurm.render(job, TRAIN)
    options = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=24:00:00",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:TERM@120",
    }
    assert text.index("module x") < text.index("srun --kill-on-bad-exit=0")
    assert "'--container-image=a b.sqsh'" in text
    assert "None" not in text


def test_slurm_passes_arguments_and_status(tmp_path, cluster):
    assert subprocess.run(batch(tmp_path, slurm.SlurmJob(1, 2)), timeout=60).returncode == 0
    arguments = cluster["srun"].read_text(encoding="utf-8").splitlines()
    assert arguments[arguments.index("rynnvla") + 1 :] == TRAIN
    assert not cluster["scontrol"].exists()


@pytest.mark.parametrize(
    ("state", "restarts", "requeued"),
    [("RUNNING", "0", True), ("RUNNING", "10", False), ("COMPLETING", "0", False)],
)
def test_slurm_queues_again_after_a_failure(tmp_path, cluster, stand_in, monkeypatch, state, restarts, requeued):
    stand_in("srun", "exit 3")
    stand_in("squeue", f"echo {state}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert subprocess.run(batch(tmp_path, slurm.SlurmJob(1, 2)), timeout=60).returncode == 3
    assert cluster["scontrol"].exists() == requeued
    assert not requeued or cluster["scontrol"].read_text(encoding="utf-8").split() == ["requeue", "42"]


def test_slurm_gives_time_for_the_emergency_save(tmp_path, cluster, stand_in):
    stand_in(
        "srun",
        "trap 'echo srun was killed; exit 9' TERM; echo ready; until [ -e stop ]; do sleep 0.1; done; echo saved",
    )
    stand_in("scancel", "touch stop")  # what Slurm does: the signal reaches the processes, not srun
    with subprocess.Popen(batch(tmp_path, slurm.SlurmJob(1, 2)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert out == "saved\n"
    assert cluster["scancel"].read_text(encoding="utf-8").split() == ["--signal=TERM", "42"]
    assert cluster["scontrol"].read_text(encoding="utf-8").split() == ["requeue", "42"]


@pytest.mark.parametrize(
    ("tpu_type", "accelerator", "topology", "vms"),
    [
        ("v5litepod-256", "tpu-v5-lite-podslice", "16x16", 64),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16),
        ("v5p-8", "tpu-v5p-slice", "2x2x1", 1),
        ("v6e-64", "tpu-v6e-slice", "8x8", 16),
    ],
)
def test_gke_manifest(tpu_type, accelerator, topology, vms):
    job = gke.GkeJob(cluster="pod", tpu_type=tpu_type, image="image:1", queue="queue", grace_seconds=90)
    manifest = yaml.safe_load(gke.render(job, TRAIN))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "queue"}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = manifest["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    assert slices["replicas"] == 1
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (vms, vms, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["rynnvla", *TRAIN[:-1], TRAIN[-1].replace("$(", "$$(")]  # Kubernetes' own escape


def test_gke_claims_are_mounted():
    def pod(*mounts):
        job = gke.GkeJob(cluster="pod", tpu_type="v5p-128", image="image", mount=mounts)
        (slices,) = yaml.safe_load(gke.render(job, TRAIN))["spec"]["replicatedJobs"]
        return slices["template"]["spec"]["template"]

    spec = pod("shared:/mnt/shared", "my.data:/data", "shared:/again")["spec"]
    memory, *volumes = spec["volumes"]
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in volumes}
    shared, *mounts = spec["containers"][0]["volumeMounts"]
    assert memory == {"name": shared["name"], "emptyDir": {"medium": "Memory"}} and shared["mountPath"] == "/dev/shm"
    mounts = {m["mountPath"]: claims[m["name"]] for m in mounts}
    assert mounts == {"/mnt/shared": "shared", "/data": "my.data", "/again": "shared"} and len(claims) == 2
    assert pod()["spec"]["volumes"] == [memory] and "metadata" not in pod("shared:/mnt/shared")
    assert pod("b:/b:gcsfuse")["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (["--workdir=/mnt/shared/a", "--config.data.source=lerobot:/data/b", "--config.wandb.mode=offline"], None),
        (["--workdir", "/mnt/sharedly", "--config.seed=1"], "/mnt/sharedly;"),
        (["--workdir=runs/a", "--config.data.source=lerobot:/b", "--config.tokenizer=/c.json"], "runs/a, /b, /c.json;"),
    ],
)
def test_what_a_pod_would_lose_is_said(capsys, words, lost):
    assert cli(["launch", *GKE, *MOUNT, "--mount", "b:/data/:gcsfuse", "--", "train", "--config=c", *words]) == 0
    err = capsys.readouterr().err
    assert f"not under any --mount: {lost}" in err if lost else "warning" not in err


IN_BUCKETS = ["train", "--config=c", "--workdir", "gs://run-bucket/a", "--config.init_from.path=gs://models/base"]
IN_BUCKETS += ["--config.data.source=records:s3://corpora/x"]


@pytest.mark.parametrize(
    ("options", "account"),
    [
        (GKE, "node pool (with the scope cloud-platform)"),
        ([*TPU, "--service-account", "me@p.iam.gserviceaccount.com"], "the service account of the VMs"),
        (["slurm", "--nodes", "2", "--gpus-per-node", "8"], "every node"),
    ],
)
def test_buckets_need_no_mount_but_an_account(capsys, options, account):
    assert cli(["launch", *options, "--", *IN_BUCKETS]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and "persistentVolumeClaim" not in said.out
    (line,) = [line for line in said.out.splitlines() if "extra" in line]
    assert line.startswith("# ") and "gcs and s3" in line and account in line
    assert line.endswith("access to gs://models, gs://run-bucket, s3://corpora;")
    assert "--bucket gs://models --bucket gs://run-bucket" in said.out
    assert ("--service-account=me@p.iam.gserviceaccount.com" in said.out) == (options[0] == "tpu-vm")
    assert cli(["launch", *options, *(MOUNT if options is GKE else []), "--", *TRAIN]) == 0
    assert "extra" not in capsys.readouterr().out


def test_gke_slices():
    job = gke.GkeJob(cluster="pod", tpu_type="v5litepod-256", image="image", num_slices=2)
    manifest = gke.manifest(job, TRAIN)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert "exclusive-topology" in next(iter(manifest["metadata"]["annotations"]))  # a Job on one slice, not across two


def test_xpk_command():
    job = gke.GkeJob(cluster="pod", tpu_type="v5p-128", image="image", num_slices=2)
    words = shlex.split(gke.xpk(job, TRAIN))
    assert words[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert shlex.split(options.pop("command")) == ["rynnvla", *TRAIN]
    assert (options["cluster"], options["tpu-type"], options["num-slices"]) == ("pod", "v5p-128", "2")
    assert gke.xpk(job, TRAIN) in gke.render(job, TRAIN)


GCLOUD = """
case "$4" in
describe) cat state 2>/dev/null ;;
create) echo ACTIVE > state ;;
delete) rm state ;;
ssh)
    for word; do case "$word" in --command=*) bash -c "${word#--command=}" ;; esac; done
    status=$?
    [ $status -eq 0 ] || echo "$STATE_AFTER_FAILURE" > state
    exit $status
    ;;
esac
"""


def test_tpu_vm_comes_back_after_preemption(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("STATE_AFTER_FAILURE", "SUSPENDED")
    gcloud, program = stand_in("gcloud", GCLOUD), stand_in("rynnvla", "[ -e again ] || { touch again; exit 1; }")
    stand_in("sleep")
    job = tpu_vm.TpuVmJob("pod", "zone", "v5litepod-256", "v2", spot=True, setup='mkdir -p "a b" && cd "a b" && cd ..')
    (tmp_path / "job.sh").write_text(tpu_vm.render(job, TRAIN), encoding="utf-8")
    assert subprocess.run(["bash", "job.sh"], timeout=60).returncode == 0
    assert program.read_text(encoding="utf-8").splitlines() == [*TRAIN, *TRAIN]
    assert (tmp_path / "a b").is_dir()
    words = gcloud.read_text(encoding="utf-8").split()
    assert (words.count("create"), words.count("delete"), words.count("ssh")) == (2, 1, 2)
    assert {"--accelerator-type=v5litepod-256", "--runtime-version=v2", "--spot", "--worker=all"} <= set(words)


def test_tpu_vm_gives_up_on_a_program_that_always_fails(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("STATE_AFTER_FAILURE", "ACTIVE")
    gcloud = stand_in("gcloud", GCLOUD)
    stand_in("rynnvla", "exit 1")
    stand_in("sleep")
    job = tpu_vm.TpuVmJob("pod", "zone", "v5litepod-256", "v2", max_restarts=2)
    (tmp_path / "job.sh").write_text(tpu_vm.render(job, TRAIN), encoding="utf-8")
    done = subprocess.run(["bash", "job.sh"], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and "giving up" in done.stderr
    assert gcloud.read_text(encoding="utf-8").split().count("ssh") == 3
