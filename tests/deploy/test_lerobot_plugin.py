"""LeRobot's own programs run our exports, and `rynnvla evaluate` runs LeRobot's policies. Needs LeRobot's environment.

python3.11 -m venv OLD; OLD/bin/pip install 'lerobot[async]==0.4.4'
python3.12 -m venv NEW; NEW/bin/pip install 'lerobot[async,core-scripts,evaluation]==0.6.1'
{OLD,NEW}/bin/pip install . './plugins/lerobot_policy_rynnvla[sim]'
RYNNVLA_LEROBOT_PYTHON=OLD/bin/python:NEW/bin/python pytest -m slow tests/deploy/test_lerobot_plugin.py
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rynnvla_jax.actions import Statistics
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.sim import arm
from rynnvla_jax.sim.env import TableTop
from tests.exports import write_tiny
from tests.lerobot_environments import ENVIRONMENT, python  # noqa: F401  a fixture
from tests.simulator import need_eyes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def eyes():
    need_eyes()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A tiny policy in LeRobot's unit that accepts any state of the simulated arm."""
    folder = write_tiny(tmp_path_factory.mktemp("policies") / "export")
    statistics = Statistics.from_json(folder / export_format.STATISTICS)
    replace(statistics, columns=arm.COLUMNS, std_state=np.full(6, 30.0)).to_json(folder / export_format.STATISTICS)
    return folder


@pytest.fixture(scope="module")
def found(python, export, tmp_path_factory):  # noqa: F811
    """What `inside_lerobot` found, and beside it the ACT policy that it wrote and its Python."""
    folder = tmp_path_factory.mktemp("inside")
    program = Path(__file__).with_name("inside_lerobot.py")
    lerobot(folder, python, str(program), str(export), str(folder / "act"))
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return {**found, "act": folder / "act", "python": python}


def lerobot(where, *words):
    done = subprocess.run(words, cwd=where, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def chunk(export, state):
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    return Policy.load(export).act(frame, None, np.asarray(state, np.float32), "pick up the block", arm.COLUMNS)


def evaluation(found, out, *words):
    policy = ["--policy", f"lerobot:{found['act']}", "--lerobot-python", found["python"]]
    words = [*policy, "--size", "64", "--videos", "0", *words]
    return [sys.executable, "-m", "rynnvla_jax.cli", "evaluate", "--out", str(out), "--fixed-look", *words]


def rollout(found, export, where, *words):
    """(status, what it wrote, targets that the arm without hardware got) of `lerobot-rollout`."""
    program = Path(found["python"]).with_name("lerobot-rollout")
    if not program.exists():
        pytest.skip(f"{found['python']} has a LeRobot before 0.6, which has no lerobot-rollout")
    arm = ["--robot.discover_packages_path=still_arm", "--robot.type=still_arm", f"--robot.log={where / 'targets'}"]
    arm += [f"--robot.calibration_dir={where}", "--task=pick up the block", "--play_sounds=false"]
    policy = ["--policy.type", "rynnvla", "--policy.path", str(export), "--device=cpu", "--policy.device=cpu"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([program, *policy, *arm, *words], cwd=where, env=environment, capture_output=True, text=True)
    log = where / "targets"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return done.returncode, done.stderr, np.array([json.loads(line) for line in lines])


STAY = "--return_to_initial_position=false"


def test_lerobot_rollout_runs_an_export(found, export, tmp_path):
    status, said, targets = rollout(found, export, tmp_path, "--policy.n_action_steps=2", "--duration=1", STAY)
    assert status == 0, said[-4000:]
    assert len(targets) > 4
    np.testing.assert_allclose(targets[:2], found["chunk"][:2], rtol=1e-4, atol=1e-4)


def test_after_a_refused_observation_lerobot_drives_the_arm_back_unless_told(found, export, tmp_path):
    words = ["--policy.n_action_steps=1", "--robot.broken_at=6", "--duration=60"]  # the first is LeRobot's own
    status, said, targets = rollout(found, export, tmp_path, *words, STAY)
    assert status != 0 and "state is out of the training data's range" in said
    assert len(targets) == 5
    status, said, targets = rollout(found, export, tmp_path, *words)
    assert status != 0 and "state is out of the training data's range" in said
    assert len(targets) == 5 + 5 + 150  # both runs; 3 s of 50 Hz
    np.testing.assert_allclose(targets[-1], np.arange(6), atol=1e-5)


def test_real_time_chunking_runs_an_export(found, export, tmp_path):
    slowly = ["--fps=5", "--policy.fps=5", "--duration=3"]  # LeRobot drops what its answer comes too late for
    status, said, targets = rollout(found, export, tmp_path, "--inference.type=rtc", *slowly, STAY)
    assert status == 0, said[-4000:]
    assert len(targets) > 4 and "inference error" not in said


def test_real_time_chunks_keep_what_will_be_executed(found):
    asked, plain = found["real_time"], np.array(found["chunk"])
    np.testing.assert_allclose(asked["first"], [plain], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(asked["empty"], [plain], rtol=1e-5, atol=1e-5)
    thirds = np.array([1000 * np.ones(6), (2000 + plain[1]) / 3, (1000 + 2 * plain[2]) / 3, plain[3]])
    np.testing.assert_allclose(asked["frozen"], [thirds], rtol=1e-5, atol=1e-3)
    ahead = 1000 - plain[1]  # LeRobot's padding is no target: from its last row on the old plan keeps its distance
    quarters = np.array([1000 * np.ones(6), plain[1] + 0.75 * ahead, plain[2] + 0.5 * ahead, plain[3] + 0.25 * ahead])
    np.testing.assert_allclose(asked["padded"], [quarters], rtol=1e-5, atol=1e-3)
    assert "is [4, 5] for 1 observations and 6 columns" in asked["width"]
    good, off, other = asked["settings"]
    assert good is None and "--inference.type=sync" in off and "choose LINEAR" in other


def test_a_type_beside_the_path_of_an_export_is_dropped(found, export):
    joined, apart, other, only = found["without_type"]
    assert joined == [f"--policy.path={export}", "--env.type=pusht"]
    assert apart == ["--policy.path", str(export), "--env.type=pusht"]
    assert other == ["--policy.path=ELSEWHERE", "--policy.type=rynnvla"] and only == ["--policy.type", "act"]


def test_lerobot_eval_runs_an_export(python, export, tmp_path):  # noqa: F811
    words = [f"--policy.path={export}", "--policy.type=rynnvla", "--policy.device=cpu", "--policy.n_action_steps=4"]
    words += ["--env.type=rynnvla_so100", "--env.size=64", "--env.episode_length=6", f"--output_dir={tmp_path / 'out'}"]
    lerobot(
        tmp_path, python, "-m", "lerobot.scripts.lerobot_eval", *words, "--eval.n_episodes=2", "--eval.batch_size=2"
    )
    info = json.loads((tmp_path / "out" / "eval_info.json").read_text(encoding="utf-8"))
    assert info["overall"]["n_episodes"] == 2 and info["overall"]["pc_success"] == 0.0
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 2


def test_chunks_and_actions_are_the_policys_own(export, found):
    state = np.arange(6.0)
    np.testing.assert_allclose(found["chunk"], chunk(export, state), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["later"], chunk(export, state + 2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["steps"], [*found["chunk"][:2], *found["later"][:2]], rtol=1e-5, atol=1e-5)
    assert np.ptp(found["chunk"], axis=0).max() > 1e-3  # rows of a chunk differ, so their order was tested


def test_what_the_policy_refuses_lerobot_does_not_execute(found):
    assert "state is out of the training data's range" in found["out_of_range"]
    for mode, unit in (("range_m100_100", "-100..100"), ("degrees", "degrees")):
        assert found["robots"][mode] == ["lerobot:so_follower", *[unit] * 5, "0..100"]
    assert "state column 0 (shoulder_pan) in -100..100 and in degrees" in found["unit"]
    assert found["rates"]["10"] is found["rates"]["0"] is None
    assert "recorded at 10 Hz but is controlled at 30 Hz" in found["rates"]["30"]
    assert found["rates"]["30"].endswith("say so with --policy.fps")


def test_asynchronous_control_gets_the_same_chunk(found):
    np.testing.assert_allclose(found["over_grpc"], found["chunk"], rtol=1e-5, atol=1e-5)


def test_episodes_are_those_of_rynnvla_evaluate(found):
    env = TableTop("block", "single", size=32)
    env.reset(10**12 + 7, held_out=True)
    assert found["first"]["instruction"] == env.instruction
    np.testing.assert_allclose(found["first"]["state"], env.state, atol=1e-3)
    assert abs(found["first"]["front"] - int(env.render("front").sum())) < 0.001 * found["first"]["front"]
    env.close()


def test_evaluate_runs_a_lerobot_policy_the_same_with_any_workers(found, tmp_path):
    short = ["--episodes", "2", "--tries", "1", "--try-seconds", "0.5"]
    lines = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        words = evaluation(found, out, "--workers", workers, *short)
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        lines.append((out / "episodes.jsonl").read_text(encoding="utf-8"))
    results = [json.loads(line) for line in lines[0].splitlines()]
    assert lines[0] == lines[1] and [(r["errors"], r["steps"]) for r in results] == [([], 15)] * 2


def test_another_size_of_frames_is_refused(found, tmp_path):
    words = evaluation(found, tmp_path / "out", "--episodes", "1", "--tries", "1", "--workers", "1")
    words[words.index("64")] = "96"
    assert subprocess.run(words).returncode == 0
    (result,) = [
        json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert result["steps"] == 0 and "evaluate with --size 64" in result["errors"][0]


def test_no_peer_outlives_a_killed_evaluation(found, tmp_path):
    words = evaluation(found, tmp_path / "out", "--workers", "1", "--episodes", "50")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        said = "".join(running.stdout.readline() for _ in range(2))
        number = int(re.search(r"process (\d+)", said)[1])
        assert Path(f"/proc/{number}").exists()
        running.kill()
    limit = time.monotonic() + 60
    while Path(f"/proc/{number}").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not Path(f"/proc/{number}").exists()
