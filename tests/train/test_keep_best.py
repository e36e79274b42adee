"""`checkpoint.keep_best` in a run: what is saved and kept, also after a kill, and what is refused before it starts."""

import json

import jax
import numpy as np
import pytest

from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.manager import Checkpointer
from rynnvla_jax.cli.main import main
from rynnvla_jax.config import BEST, ConfigError
from rynnvla_jax.distributed import preemption
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.monitor import Progress
from rynnvla_jax.train.saved_evaluation import evaluate_saved
from tests.train.test_evaluation import SHARE, assert_same_training
from tests.train.test_train import run_config

KEEP = {
    **{"checkpoint.keep_best": "eval/action_error", "checkpoint.every_steps": 5, "checkpoint.every_minutes": 0.0},
    **SHARE,
    "total_steps": 8,
}
RATES = ("optimizer.peak_lr", "optimizer.min_lr", "optimizer.warmup_lr")
ERRORS = {2: 4.0, 4: 2.0, 6: 3.0, 8: 2.0}  # step 4 is the best, and step 8 as good


@pytest.fixture
def config(assets):
    return run_config("action_vae", assets, **KEEP)


@pytest.fixture
def errors(monkeypatch):
    """Evaluations give ERRORS, whatever the weights."""
    evaluate = Progress.evaluate

    def planned(self, done, evaluator, params, opt_state):
        def of_state(params, opt_state):
            return type(evaluator).of_state(evaluator, params, opt_state) | {"action_error": ERRORS[done]}

        monkeypatch.setattr(evaluator, "of_state", of_state)
        return evaluate(self, done, evaluator, params, opt_state)

    monkeypatch.setattr(Progress, "evaluate", planned)


def kept(workdir):
    """{step: the best one that it names}."""
    data = {step: reader.read_json(reader.step_folder(workdir, step), "data") for step in reader.steps(workdir)}
    return {step: item["best"]["step"] for step, item in data.items()}


@pytest.mark.usefixtures("errors")
def test_the_best_is_saved_and_kept_also_when_the_run_is_killed(config, tmp_path, monkeypatch, capsys):
    train(config, tmp_path / "whole")
    said = capsys.readouterr().err
    assert "a checkpoint every 5 steps, and at the best eval/action_error, where lower is better" in said
    assert [line for line in said.splitlines() if "is the best so far" in line] == [
        "step 2 is the best so far: eval/action_error 4",
        "step 4 is the best so far: eval/action_error 2",
    ]
    assert kept(tmp_path / "whole") == {4: 4, 5: 4, 8: 4}
    assert reader.find_step(tmp_path / "whole", BEST) == 4

    save, calls = Checkpointer.save, iter(range(1, 100))

    def killed(self, *arguments):
        """After the save of step 4."""
        save(self, *arguments)
        if next(calls) == 2:
            self.wait()  # in a thread of this process, which goes on
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    assert kept(tmp_path / "killed") == {2: 2, 4: 4}
    train(config, tmp_path / "killed")
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    assert_same_training(tmp_path / "killed", tmp_path / "whole")
    assert (tmp_path / "killed" / "eval.jsonl").read_bytes() == (tmp_path / "whole" / "eval.jsonl").read_bytes()


@pytest.mark.usefixtures("errors")
def test_a_run_that_is_stopped_before_its_best_step_is_evaluated(config, tmp_path, monkeypatch):
    """SIGTERM at step 4: it is saved, and evaluated by the next start, which does not save it again."""
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(preemption.Notice, "came", lambda self: next(calls) == 4)
        with pytest.raises(preemption.Preempted):
            train(config, tmp_path / "run")
    assert kept(tmp_path / "run") == {2: 2, 4: 2}
    train(config, tmp_path / "run")
    assert kept(tmp_path / "run") == {4: 2, 5: 4, 8: 4} and reader.find_step(tmp_path / "run", BEST) == 4


def test_every_command_finds_it(assets, tmp_path, capsys):
    """A real run, whose evaluations are what they are: the values of the best step are those that were logged."""
    config = run_config("action_vae", assets, **{**KEEP, "total_steps": 6, "checkpoint.keep_best": "eval/kl"})
    train(config, tmp_path / "run")
    lines = {line["step"]: line for line in metrics.read(tmp_path / "run", "eval.jsonl")}
    assert [name for name in lines[2] if "/" not in name][1:4] == ["kl", "l1", "action_error"]  # as below
    best = min(lines, key=lambda step: lines[step]["kl"])
    step, values = evaluate_saved(tmp_path / "run", BEST)
    assert step == best and values["kl"] == pytest.approx(lines[best]["kl"], rel=1e-5)
    for command in (["checkpoint", "restore-shape"], ["checkpoint", "verify"]):
        assert main([*command, str(tmp_path / "run"), "--step", "best"]) == 0
    assert f"step {best}" in capsys.readouterr().out
    out = tmp_path / "values.json"
    assert main(["evaluate-loss", str(tmp_path / "run"), "--step=best", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["step"] == best
    assert main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "export"), "--step", "best"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "run"), "--step", "first"]) == 2
    start = {"init_from.path": str(tmp_path / "run"), "init_from.step": BEST}
    next_config = run_config("action_vae", assets, total_steps=1, **dict.fromkeys(RATES, 0.0), **start)
    train(next_config, tmp_path / "next")
    one, other = (model_dir.load_params(tmp_path / name, step=s)[0] for name, s in (("next", -1), ("run", best)))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("vqgan", "codebook reconstruction perplexity"),
        ("action_vae", "kl l1 action_error"),
        ("video", "cross_entropy token_accuracy"),
        ("robot", "action_l1 cross_entropy token_accuracy action_error"),
    ],
)
def test_a_metric_that_the_stage_has_not_is_refused_before_training(assets, tmp_path, stage, names):
    config = run_config(stage, assets, **{**KEEP, "checkpoint.keep_best": "eval/hold_still_error"})
    listed = ", ".join(f"eval/{name}" for name in names.split())
    with pytest.raises(ConfigError, match=f"keep_best is 'eval/hold_still_error'; choose one of {listed}"):
        train(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ConfigError, match="keep_best is 'loss'; name a metric of held-out data, such as"):
        run_config(stage, assets, **{**KEEP, "checkpoint.keep_best": "loss"})
    off = run_config(stage, assets, **{"checkpoint.keep_best": "eval/l1"})
    with pytest.raises(ConfigError, match="keep_best is 'eval/l1', but nothing is evaluated; set config.evaluation"):
        train(off, tmp_path)
