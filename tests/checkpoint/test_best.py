"""The best step by a held-out metric: which one it is, that it is kept, and what is kept when its save fails."""

import math

import pytest

from rynnvla_jax.checkpoint import best, reader
from rynnvla_jax.checkpoint import manager as manager_lib
from rynnvla_jax.checkpoint.best import Best
from rynnvla_jax.checkpoint.manager import Checkpointer
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import BEST, CheckpointConfig
from tests.checkpoint.test_checkpoint import drawn, mesh_of

ERROR = "eval/action_error"
CONFIG = CheckpointConfig(every_steps=1, every_minutes=0.0, keep_best=ERROR)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(fsdp=4, tensor=2)


def save(checkpointer, step, mesh):
    checkpointer.save(step, *drawn(step, mesh), {"step": step, "skipped": []})


def restored(workdir, mesh, config=CONFIG):
    checkpointer = Checkpointer(workdir, config)
    checkpointer.restore(checkpointer.latest(), *drawn(0, mesh))
    return checkpointer


def test_lower_is_better_of_equal_values_the_first_and_never_what_is_no_number():
    five = Best(ERROR, 1, 5.0)
    assert five.beats(None) and Best(ERROR, 2, 4.9).beats(five)
    assert not Best(ERROR, 2, 5.0).beats(five) and not Best(ERROR, 2, 5.1).beats(five)
    for value in (math.nan, math.inf, -math.inf):
        assert not Best(ERROR, 2, value).beats(five) and not Best(ERROR, 2, value).beats(None)
    assert math.isnan(best.evaluated(ERROR, 2, {"loss": 1.0}).value)
    for metric in ("eval/token_accuracy", "eval/perplexity"):
        assert Best(metric, 2, 5.1).beats(Best(metric, 1, 5.0)) and not Best(metric, 2, 4.9).beats(Best(metric, 1, 5.0))


def test_it_is_kept_beside_the_newest(tmp_path, mesh, capsys):
    """The values of steps 1 to 6; then a start whose first value is no better, and one that is."""
    checkpointer = Checkpointer(tmp_path, CONFIG)
    assert checkpointer.latest() is None
    for step, value in enumerate((5.0, 3.0, 4.0, 3.0, math.nan, 3.5), 1):
        assert checkpointer.evaluated(step, {"action_error": value}) == (step in (1, 2))
        save(checkpointer, step, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    assert reader.steps(tmp_path) == [2, 5, 6]
    assert reader.find_step(tmp_path) == 6 and reader.find_step(tmp_path, BEST) == 2
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    said = capsys.readouterr()
    states = [line.split()[5:-1] for line in said.out.splitlines()[1:]]
    assert states == [["verified,", "best"], ["verified"], ["verified"]]
    assert "step 2 is the best so far: eval/action_error 3" in said.err

    checkpointer = restored(tmp_path, mesh)
    assert not checkpointer.evaluated(7, {"action_error": 3.0})
    save(checkpointer, 7, mesh)
    assert checkpointer.evaluated(8, {"action_error": 2.0})
    save(checkpointer, 8, mesh)
    assert checkpointer.wait()
    assert reader.steps(tmp_path) == [2, 7, 8]  # until another save, so that a save is never the only copy of a best
    save(checkpointer, 9, mesh)
    save(checkpointer, 10, mesh)
    save(checkpointer, 11, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    assert reader.steps(tmp_path) == [8, 10, 11] and reader.find_step(tmp_path, BEST) == 8


ERRORS = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: math.nan, 12: 2.0, 14: 2.5}
TOTAL = 15


def run(workdir, mesh, kill=lambda step, point: False):
    """Like the loop: evaluates every second step, saves every fifth one and the best. `kill` ends it at a point."""
    checkpointer = Checkpointer(workdir, CheckpointConfig(every_steps=5, every_minutes=0.0, keep_best=ERROR))
    step = checkpointer.latest() or 0
    if step:
        checkpointer.restore(step, *drawn(step, mesh))
    saved = step
    if step in ERRORS:
        checkpointer.evaluated(step, {"action_error": ERRORS[step]})
    while step < TOTAL:
        step += 1
        due = checkpointer.due(step)
        if step in ERRORS:
            if kill(step, "before the evaluation"):
                break
            due |= checkpointer.evaluated(step, {"action_error": ERRORS[step]})
            if kill(step, "after the evaluation"):
                break
        if due and step != saved:
            save(checkpointer, step, mesh)
            if kill(step, "after the save"):
                break
    checkpointer.close()
    return step


def kept(workdir):
    """{step: the best one that it names}."""
    return {
        step: reader.read_json(reader.step_folder(workdir, step), "data").get("best", {}).get("step")
        for step in reader.steps(workdir)
    }


def test_a_kill_anywhere_changes_nothing(tmp_path, mesh):
    run(tmp_path / "whole", mesh)
    assert kept(tmp_path / "whole") == {12: 12, 15: 12} and reader.find_step(tmp_path / "whole", BEST) == 12
    points = [(step, point) for step in (2, 4, 8, 12) for point in ("before the evaluation", "after the evaluation")]
    points += [(step, "after the save") for step in (4, 5, 12)]
    for number, at in enumerate(points):
        workdir = tmp_path / str(number)
        assert run(workdir, mesh, lambda *now, at=at: now == at) == at[0]
        for mark in workdir.glob("checkpoints/*/verified.json"):
            mark.unlink()  # killed before the step was read back
        run(workdir, mesh)
        assert kept(workdir) == kept(tmp_path / "whole"), at


@pytest.mark.usefixtures("short_pause")
def test_a_best_step_whose_save_fails_is_not_the_best(tmp_path, mesh, monkeypatch, capsys):
    checkpointer = Checkpointer(tmp_path, CONFIG)
    assert checkpointer.evaluated(1, {"action_error": 3.0})
    for step in (1, 2, 3):
        save(checkpointer, step, mesh)
    assert checkpointer.wait()
    assert checkpointer.evaluated(4, {"action_error": 1.0})
    with monkeypatch.context() as patch:
        read_back = reader.read_back
        patch.setattr(reader, "read_back", lambda *a: {**read_back(*a), "problems": ["params.embed cannot be read: x"]})
        save(checkpointer, 4, mesh)
        assert not checkpointer.wait()
    assert reader.steps(tmp_path) == [1, 3]
    assert checkpointer.evaluated(5, {"action_error": 2.0})  # better than step 1
    save(checkpointer, 5, mesh)
    assert checkpointer.wait()
    save(checkpointer, 6, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    assert reader.find_step(tmp_path, BEST) == 5 and 1 not in reader.steps(tmp_path)


@pytest.fixture
def short_pause(monkeypatch):
    monkeypatch.setattr(manager_lib, "PAUSE", 0.1)


def test_a_start_with_another_metric_and_one_without_the_step_begin_anew(tmp_path, mesh, capsys):
    checkpointer = Checkpointer(tmp_path, CONFIG)
    checkpointer.evaluated(1, {"action_error": 3.0})
    for step in (1, 2, 3):
        save(checkpointer, step, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    other = CheckpointConfig(every_steps=1, every_minutes=0.0, keep_best="eval/token_accuracy")
    checkpointer = restored(tmp_path, mesh, other)
    assert (
        "it is so by eval/action_error, and checkpoint.keep_best is eval/token_accuracy now" in capsys.readouterr().err
    )
    assert checkpointer.evaluated(4, {"token_accuracy": 0.1})
    checkpointer.close()
    reader.set_aside(reader.step_folder(tmp_path, 1))
    checkpointer = restored(tmp_path, mesh)
    assert "step 1 is not kept as the best one: it is not in" in capsys.readouterr().err
    assert checkpointer.evaluated(4, {"action_error": 9.0})
    checkpointer.close()
    with pytest.raises(CheckpointError, match="has no step 1; it has 2, 3"):
        reader.find_step(tmp_path, BEST)


def test_a_run_without_it_has_none(tmp_path, mesh):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every_steps=1, every_minutes=0.0))
    assert not checkpointer.evaluated(1, {"action_error": 3.0})
    save(checkpointer, 1, mesh)
    assert checkpointer.wait()
    checkpointer.close()
    with pytest.raises(CheckpointError, match="has no best step: .*keep_best.*; name one of its steps, 1$"):
        reader.find_step(tmp_path, BEST)
    assert reader.read_json(reader.step_folder(tmp_path, 1), "data") == {"step": 1, "skipped": []}
