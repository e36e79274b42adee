"""`rynnvla evaluate`: the expert succeeds, those that do not try fail, and results are the same for any workers."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest

from rynnvla_jax import cli
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.sim import drive, evaluate
from tests.exports import write_tiny
from tests.simulator import need_eyes

SHORT = ["--size", "64", "--videos", "1", "--try_seconds", "1", "--tries", "2", "--fixed_look"]


@pytest.fixture(scope="module", autouse=True)
def eyes():
    need_eyes()


def run(out, *words):
    status = cli.main(["evaluate", "--out", str(out), *map(str, words)])
    lines = (out / "episodes.jsonl").read_text() if (out / "episodes.jsonl").exists() else ""
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
    page = (tmp_path / "index.html").read_text()
    assert results(lines)[0]["instruction"] in page and "videos/block_single_0000.mp4" in page


def test_results_do_not_depend_on_workers_or_interruptions(tmp_path):
    words = ["--policy", "random", "--episodes", 3, *SHORT]
    _, alone = run(tmp_path / "one", *words, "--workers", 1)
    _, several = run(tmp_path / "three", *words, "--workers", 3)
    assert alone == several and len(results(alone)) == 3
    assert not any(r["success"] for r in results(alone)) and {r["tries"] for r in results(alone)} == {2}
    file = tmp_path / "one" / "episodes.jsonl"
    file.write_text(alone[: alone.rindex('"success"')])  # killed while the last line was written
    assert run(tmp_path / "one", *words, "--workers", 1)[1] == alone
    status, _ = run(tmp_path / "one", *words, "--seed", 1)
    assert status == 1


def test_an_exported_policy_of_another_unit_refuses_every_try(tmp_path):
    write_tiny(tmp_path / "export")
    words = ["--policy", tmp_path / "export", "--episodes", 1, "--workers", 1, *SHORT]
    status, lines = run(tmp_path / "out", *words)
    (result,) = results(lines)
    assert status == 0 and not result["success"] and (result["tries"], result["steps"]) == (2, 0)
    assert [e[:6] for e in result["errors"]] == ["try 1:", "try 2:"] and "degrees" in result["errors"][0]


def test_a_policy_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--policy", tmp_path / "none", "--episodes", 1, "--workers", 1)[0] == 1
    assert "is no folder, no ws:// address and none of expert, random, hold" in capsys.readouterr().err


def test_observations_are_taken_only_when_the_policy_looks():
    seen = []

    class Policy:
        def act(self, front, wrist, state, instruction, unit=None):
            seen.append((front, wrist, instruction, unit))
            return np.tile(state, (20, 1))

    env = SimpleNamespace(render=lambda c: c, state=np.arange(6.0), instruction="go", unit="u")
    driver = drive._Policy(Policy(), sees_wrist=True, replan=10, ensemble=False)
    driver.begin(env, 0, 1)
    for _ in range(25):
        np.testing.assert_array_equal(driver.target(env), np.arange(6.0))
    assert seen == [("front", "wrist", "go", "u")] * 3
    with pytest.raises(PolicyError):
        drive.driver("nowhere", 10, False)


def test_rates_have_their_textbook_intervals():
    rate = evaluate.share(15, 20)
    assert (rate.value, round(rate.low, 3), round(rate.high, 3)) == (0.75, 0.531, 0.888)
    tries = evaluate.mean([1, 2, 3, 4])
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
