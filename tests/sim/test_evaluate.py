"""`rynnvla evaluate`: the expert succeeds, those that do not try fail, and results are the same for any workers."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from websockets.sync.server import serve

from rynnvla_jax import intervals
from rynnvla_jax.cli import main as cli
from rynnvla_jax.deploy import export_format, msgpack_numpy
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import KEYS
from rynnvla_jax.recording import Recording
from rynnvla_jax.sim import drive, evaluate
from tests.deploy.test_serve import running
from tests.exports import write_tiny
from tests.simulator import children, gone, need_eyes

SHORT = ["--size", "64", "--videos", "1", "--try-seconds", "1", "--tries", "2", "--fixed-look"]


@pytest.fixture(scope="module", autouse=True)
def eyes():
    need_eyes()


def run(out, *words):
    status = cli.main(["evaluate", "--out", str(out), *map(str, words)])
    lines = (out / "episodes.jsonl").read_text(encoding="utf-8") if (out / "episodes.jsonl").exists() else ""
    return status, lines


def results(lines):
    return [json.loads(line) for line in lines.splitlines()]


def test_the_expert_succeeds_and_is_filmed(tmp_path, capsys):
    status, lines = run(tmp_path, "--policy", "expert", "--episodes", 2, "--size", 64, "--videos", 1, "--workers", 2)
    assert status == 0
    for result in results(lines):
        assert result["success"] and result["tries"] == 1 and not result["errors"]
    assert "100.0 % (34 to 100)" in capsys.readouterr().out  # Wilson's interval of two of two
    with av.open(str(tmp_path / "videos" / "block_single_0000.mp4")) as video:
        frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    assert frames[0].shape == (104, 128, 3) and len(frames) > 60
    assert frames[0][64:].max() > 200  # the instruction
    assert not (tmp_path / "videos" / "block_single_0001.mp4").exists()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert results(lines)[0]["instruction"] in page and "videos/block_single_0000.mp4" in page


def test_results_do_not_depend_on_workers_or_interruptions(tmp_path):
    words = ["--policy", "random", "--task", "block,block", "--scenario", "single,single", "--episodes", 3, *SHORT]
    _, alone = run(tmp_path / "one", *words, "--workers", 1)
    _, several = run(tmp_path / "three", *words, "--workers", 3)
    assert alone == several and len(results(alone)) == 3
    assert not any(r["success"] for r in results(alone)) and {r["tries"] for r in results(alone)} == {2}
    file = tmp_path / "one" / "episodes.jsonl"
    file.write_text(alone[: alone.rindex('"success"')], encoding="utf-8")  # killed while the last line was written
    assert run(tmp_path / "one", *words, "--workers", 1)[1] == alone
    status, _ = run(tmp_path / "one", *words, "--seed", 1)
    assert status == 1


def test_an_exported_policy_of_another_robot_refuses_every_try(tmp_path, capsys):
    write_tiny(tmp_path / "export")
    words = ["--policy", tmp_path / "export", "--episodes", 1, "--workers", 1, *SHORT]
    status, lines = run(tmp_path / "out", *words)
    (result,) = results(lines)
    assert status == 0 and not result["success"] and (result["tries"], result["steps"]) == (2, 0)
    assert [e[:6] for e in result["errors"]] == ["try 1:", "try 2:"] and "robot 'tiny' and" in result["errors"][0]
    capsys.readouterr()
    with (tmp_path / "export" / "model.safetensors").open("ab") as file:
        file.write(b"another")
    assert run(tmp_path / "out", *words) == (1, lines)
    said = capsys.readouterr().err
    assert "was evaluated with weights 'SHA-256 " in said and said.endswith("; choose another --out\n")


def test_how_the_data_were_recorded_is_compared_with_the_arm(tmp_path, capsys):
    folder, words = write_tiny(tmp_path / "export"), ["--episodes", 1, "--workers", 1, *SHORT]
    config = export_format.read_config(folder)
    export_format.write_config(folder, replace(config, recording=Recording((10.0,), ((64, 64),))))
    assert run(tmp_path / "out", "--policy", folder, *words)[0] == 0
    said = capsys.readouterr().out
    assert "recorded at 10 Hz but is controlled at 30 Hz" in said and said.count("WARNING") == 1
    export_format.write_config(folder, replace(config, recording=Recording((30.0,), ((48, 64),))))
    assert run(tmp_path / "other", "--policy", folder, *words) == (1, "")
    said = capsys.readouterr()
    assert "WARNING" not in said.out and "simulator's image has 64 x 64 pixels" in said.err


def test_policies_of_one_folder_are_told_apart(tmp_path):
    assert evaluate.weights("expert") == evaluate.weights("ws://host:1") == ""
    saved = tmp_path / "checkpoints"
    said = []
    for step, fingerprints in (("9", "a"), ("9", "b"), ("10", "b")):
        (saved / step / "fingerprints").mkdir(parents=True, exist_ok=True)
        (saved / step / "fingerprints" / "metadata").write_text(fingerprints, encoding="utf-8")
        said.append(evaluate.weights(str(tmp_path)))
    assert len(set(said)) == 3 and said[0].startswith("step 9, ") and said[2].startswith("step 10, ")


def test_a_server_that_is_lost_is_no_failure_of_the_policy(tmp_path, capsys):
    well = threading.Event()

    def answer(connection):
        connection.send(msgpack_numpy.pack({"keys": [KEYS["front"]]}))
        for message in connection:
            if not well.is_set():
                return
            connection.send(
                msgpack_numpy.pack({"actions": np.tile(msgpack_numpy.unpack(message)[KEYS["state"]], (20, 1))})
            )

    with serve(answer, "127.0.0.1", 0, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        words = ["--policy", url, "--episodes", 1, "--workers", 1, *SHORT]
        assert run(tmp_path, *words) == (1, "")
        said = capsys.readouterr().err
        assert f"rynnvla evaluate: {url}: " in said and said.endswith("; after that the same command continues\n")
        well.set()
        assert run(tmp_path, *words, "--replan", 21) == (1, "")
        assert "replan_every is 21 but a chunk has 20 steps" in capsys.readouterr().err
        status, lines = run(tmp_path, *words)
        assert status == 0 and [r["errors"] for r in results(lines)] == [[]]


@pytest.mark.parametrize("ends", ["the command", "the command by Ctrl-C", "a worker"])
def test_nothing_is_left_behind(tmp_path, ends):
    words = ["evaluate", "--policy", "hold", "--episodes", "99", "--workers", "1", "--out", str(tmp_path), *SHORT]
    command = [sys.executable, "-m", "rynnvla_jax.cli", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    lines = tmp_path / "episodes.jsonl"
    while not lines.exists() or not lines.read_text(encoding="utf-8"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    helpers = children(process.pid)
    (worker,) = [pid for pid in helpers if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]
    number = {"the command": signal.SIGTERM, "the command by Ctrl-C": signal.SIGINT, "a worker": signal.SIGKILL}[ends]
    os.kill(worker if ends == "a worker" else process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert gone(helpers) and "Traceback" not in said
    if ends != "the command":
        assert process.returncode == {"the command by Ctrl-C": 130, "a worker": 1}[ends]
        assert "the same command continues" in said.splitlines()[-1]


def test_two_at_once_in_one_folder_are_refused(tmp_path, capsys):
    words = ["--policy", "hold", "--episodes", 1, *SHORT]
    with (tmp_path / "episodes.jsonl").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(tmp_path, *words)[0] == 1
    assert f"another process is evaluating into {tmp_path}" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text('{"pol', encoding="utf-8")
    assert run(tmp_path, *words)[0] == 1
    assert f"{tmp_path / 'evaluation.json'} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "0", "--size is 0; it must be an even number from 32 to 1024"),
        ("--size", "33", "--size is 33; it must be an even number from 32 to 1024"),
        ("--try-seconds", "-1", "--try-seconds is -1.0; it must be at least 0"),
        ("--try-seconds", "nan", "--try-seconds is nan; it must be at least 0"),
        ("--try-seconds", "0", "--try-seconds is 0; it must be positive"),
        ("--episodes", "0", "--episodes is 0; it must be at least 1"),
        ("--out", __file__, "is a file, not a folder"),
    ],
)
def test_bad_arguments(option, value, message, tmp_path, capsys):
    words = {"--policy": "hold", "--out": tmp_path} | {option: value}
    assert cli.main(["evaluate", *(f"{k}={v}" for k, v in words.items())]) == 2
    assert message in capsys.readouterr().err


def test_a_policy_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--policy", tmp_path / "none", "--episodes", 1, "--workers", 1)[0] == 1
    assert "is not a folder, a ws:// or wss:// address, or one of expert, random, hold" in capsys.readouterr().err


def test_a_served_policy_gets_the_api_key(monkeypatch):
    monkeypatch.delenv("RYNNVLA_API_KEY", raising=False)
    with running(api_key="secret") as served:
        with pytest.raises(PolicyError, match="needs its API key"):
            drive.driver(served.url, 10, False)
        monkeypatch.setenv("RYNNVLA_API_KEY", "secret")
        assert drive.driver(served.url, 10, False)
    with pytest.raises(PolicyError, match="check that the server runs"):
        drive.driver(served.url.replace("ws://", "wss://"), 10, False)


def test_observations_are_taken_only_when_the_policy_looks():
    seen = []

    class Policy:
        def act(self, front, wrist, state, instruction, columns=None):
            seen.append((front, wrist, instruction, columns))
            return np.tile(state, (20, 1))

    env = SimpleNamespace(render=lambda c: c, state=np.arange(6.0), instruction="go", columns=None)
    driver = drive._Policy(Policy(), sees_wrist=True, replan=10, ensemble=False)
    driver.begin(env, 0, 1)
    for _ in range(25):
        np.testing.assert_array_equal(driver.target(env), np.arange(6.0))
    assert seen == [("front", "wrist", "go", None)] * 3
    with pytest.raises(PolicyError):
        drive.driver("nowhere", 10, False)


def test_a_policy_that_does_not_exist_is_refused_before_anything_starts(tmp_path, capsys):
    settings = evaluate.Evaluation("nowhere", 0, 1, 1.0, 10, ensemble=False, size=64, held_out=True, fixed_look=True)
    with pytest.raises(PolicyError, match="--policy nowhere is not a folder"):
        evaluate.evaluate(settings, [evaluate.Case("block", "single", 0)], tmp_path / "out", workers=1, videos=0)
    assert not (tmp_path / "out").exists() and not capsys.readouterr().out


def test_a_work_dir_is_opened_by_what_the_command_hands_in(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    opened = []

    def open_workdir(policy):
        opened.append(policy)
        return SimpleNamespace(config=SimpleNamespace(sequence=SimpleNamespace(use_wrist_frame=True, extra_views=())))

    assert drive.driver(str(tmp_path), 10, False, open_workdir)._sees_wrist and opened == [str(tmp_path)]
    with pytest.raises(PolicyError, match="is a work dir of training; use it with `rynnvla evaluate`"):
        drive.driver(str(tmp_path), 10, False)


def test_rates_have_their_textbook_intervals():
    rate = intervals.share(15, 20)
    assert (rate.value, round(rate.low, 3), round(rate.high, 3)) == (0.75, 0.531, 0.888)
    tries = intervals.mean([1, 2, 3, 4])
    assert tries.value == 2.5 and round(tries.low, 3) == 0.446
    rows = evaluate.table(
        [
            {"task": t, "scenario": "single", "success": s, "tries": n}
            for t, s, n in (("block", True, 1), ("block", True, 3), ("pen", False, 5), ("pen", True, 1))
        ],
        tries=5,
    )
    assert [(r["task"], r["success"].value, r["first"].value, r["tries"].value) for r in rows] == [
        ("block", 1.0, 0.5, 2.0),
        ("pen", 0.5, 0.5, 3.0),
        ("all", 0.75, 0.5, 2.5),
    ]
