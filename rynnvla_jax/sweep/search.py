"""`rynnvla sweep --search optuna`: trials that Optuna proposes, pruned by intermediate values; the study is SQLite.

Trial i is point i of the sweep: it has its own work dir, and its keys are in `OUT/sweep.json`. A trial that a kill
interrupted is RUNNING in the study; the same command gives it the same keys and continues its work dir. The sampled
keys depend on the trial's number and the results known at that time, so with --parallel also on the speed of the runs.
"""

import contextlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from rynnvla_jax.config import ConfigError
from rynnvla_jax.metric import higher_is_better
from rynnvla_jax.progress import Bar
from rynnvla_jax.sweep import listing, plan
from rynnvla_jax.sweep import run as run_lib
from rynnvla_jax.sweep.check import Pod
from rynnvla_jax.sweep.plan import Definition, Point
from rynnvla_jax.sweep.run import Machine, RunningPoint
from rynnvla_jax.train import metrics as metrics_lib

STORAGE = "optuna.db"
SAMPLES = 8  # drawn at random and checked before the first trial
ENOUGH = 10  # completed trials for importances
WARM_UP = 0.1  # of the steps, in which nothing is pruned
WHY = "no_run"  # attribute of a trial whose keys make no run: the reason
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def search(
    definition: Definition,
    out: Path,
    asked: str | None,
    trials: int,
    *,
    direction: str | None = None,
    retries: int = 1,
    parallel: int = 1,
    pod: Pod | None = None,
    dry_run: bool = False,
    utilization: float = 0.4,
) -> int:
    """Runs trials until the study has `trials`. Returns the exit status.

    Args:
      asked: the metric to search by; None: the one of `metric.deciding`.
      direction: minimize or maximize it; None: the better direction for this metric.
      pod: also check the memory of this pod; only with `dry_run`, which lists samples and starts nothing.
      utilization: assumed for the cost estimate.

    Raises:
      ConfigError: before anything runs, when all samples are invalid or the metric does not exist.
      Interrupted: by a signal; the study is consistent.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    points, found = listing.checked(
        definition, samples(definition), out, parallel=parallel, pod=pod, files=pod is None, some=True
    )
    metric = listing.chosen_metric(asked, found)
    if dry_run:
        print(listing.table(points, found.verdicts, utilization, out))
        print(f"{len(points)} of the samples are valid; nothing was started (--dry-run)")
        return 0
    with run_lib.locked(out) as lock:
        better = "maximize" if higher_is_better(metric) else "minimize"
        kind = {"engine": "optuna", "metric": metric, "direction": direction or better}
        known = plan.recalled(out) or {"points": []}
        numbers = [int(p["name"].partition("_")[0]) for p in known["points"]]  # some trials are no points
        before = [plan.make_point(definition, n, p["keys"]) for n, p in zip(numbers, known["points"], strict=True)]
        plan.remember(definition, before, out, metric, kind)
        study = _study(out, kind["direction"], definition.base["total_steps"])
        machine = Machine(definition, out, lock, parallel, found.platform, found.devices)
        known_trials = Trials(definition, study, out, metric, kind, before)
        _run(machine, known_trials, trials, retries)
    print(_table(study, known_trials.points, out, metric))
    failed = [t for t in study.trials if t.state == TrialState.FAIL]
    return 1 if failed or not _complete(study) else 0


class Trials:
    """The trials of a study as points of a sweep; reports their values to Optuna."""

    def __init__(
        self,
        definition: Definition,
        study: optuna.Study,
        out: Path,
        metric: str,
        kind: dict[str, str],
        points: list[Point],
    ):
        self.definition, self.study, self.out, self.metric = definition, study, out, metric
        self.points, self._kind = {p.number: p for p in points}, kind
        self._trials: dict[int, Trial] = {}
        self._reported: dict[int, int] = {}  # number -> steps reported

    def interrupted(self) -> list[Point]:
        """The trials that were running when an earlier command ended."""
        found = []
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.sampler = _sampler(trial.number)  # the kill may have come before its keys were drawn
            found.append(self._take(Trial(self.study, trial._trial_id)))
        return [point for point in found if point]

    def next(self) -> Point | None:
        """A new trial; None if its keys give no valid run, which is reported to Optuna."""
        self.study.sampler = _sampler(len(self.study.trials))
        return self._take(self.study.ask())

    def _take(self, trial: Trial) -> Point | None:
        try:
            keys = _keys(self.definition, trial)
        except optuna.TrialPruned:
            self._no_run(trial, TrialState.PRUNED, "left out by get_search")
            return None
        try:
            point = plan.make_point(self.definition, trial.number, keys)
        except ConfigError as error:
            self._no_run(trial, TrialState.FAIL, str(error))
            return None
        if trial.number not in self.points:  # its keys are in the study before they are here, whenever a kill comes
            self.points[trial.number] = point
            plan.remember(self.definition, list(self.points.values()), self.out, self.metric, self._kind)
        self._trials[trial.number] = trial
        self._reported[trial.number] = max(trial.storage.get_trial(trial._trial_id).intermediate_values, default=0)
        return point

    def _no_run(self, trial: Trial, state: TrialState, why: str) -> None:
        trial.set_user_attr(WHY, why)
        self.study.tell(trial, state=state)
        print(f"{trial.number:03d}: {state.name.lower()}, {why}", file=sys.stderr)

    def bad(self, point: Point) -> bool:
        """Reports the new values to Optuna. Returns whether the trial should be pruned."""
        trial, known = self._trials[point.number], self._reported[point.number]
        new = [(step, x) for step, x in metrics_lib.series(self.out / point.name, self.metric) if step > known]
        for step, value in new:
            trial.report(value, step)
            self._reported[point.number] = step
        return bool(new) and trial.should_prune()

    def pruned(self, point: Point) -> None:
        self.study.tell(point.number, state=TrialState.PRUNED)

    def finished(self, point: Point) -> None:
        """Ends a trial; it has failed if its value is not a number."""
        value = metrics_lib.final([value for _, value in metrics_lib.series(self.out / point.name, self.metric)])
        state = TrialState.COMPLETE if math.isfinite(value) else TrialState.FAIL
        self.study.tell(point.number, value if state == TrialState.COMPLETE else None, state)

    def failed(self, point: Point) -> None:
        self.study.tell(point.number, state=TrialState.FAIL)


def _run(machine: Machine, trials: Trials, count: int, retries: int) -> None:
    """Runs trials until `count` trials of the study have ended."""
    waiting = [RunningPoint(p) for p in trials.interrupted()]
    ended = len(trials.study.get_trials(states=DONE))
    with run_lib.bar(count, ended) as shown, machine:
        while waiting or machine.running or ended < count:
            while machine.free and (waiting or ended + len(machine.running) < count):
                if waiting:
                    machine.start(waiting.pop(0))
                elif point := trials.next():
                    machine.start(RunningPoint(point))
                else:
                    ended += 1
                    shown.update()
            run_lib.show_running(shown, machine)
            gone = machine.ended()
            for run in machine.running:
                if not run.stopped and trials.bad(run.point):
                    machine.stop(run)
            for run in gone:
                if _settle(machine, trials, run, retries, shown):
                    ended += 1
                    shown.update()
                else:
                    waiting.append(run)


def _settle(machine: Machine, trials: Trials, run: RunningPoint, retries: int, shown: Bar) -> bool:
    """Reports to Optuna how a run has ended. Returns False if it should be retried."""
    if run.stopped and not run.point.finished(machine.out):
        machine.note(run.point, "pruned")
        trials.pruned(run.point)
        metrics = run_lib.results(run_lib.last(machine.out, run.point))
        shown.write(f"{run.point.name}: pruned, {metrics}", file=sys.stderr)
        return True
    if run_lib.outcome(machine, run, retries, shown):
        trials.bad(run.point)  # the last values
        trials.finished(run.point)
        return True
    if run.attempt <= retries:
        return False
    trials.failed(run.point)
    return True


def _study(out: Path, direction: str, steps: int) -> optuna.Study:
    return optuna.create_study(
        storage=f"sqlite:///{out.absolute() / STORAGE}",
        study_name="sweep",
        load_if_exists=True,
        direction=optuna.study.StudyDirection[direction.upper()],
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=round(WARM_UP * steps)),
    )


def importances(out: Path) -> dict[str, float]:
    """Shares of the parameters in what makes a trial one of the best, largest first (Optuna: PED-ANOVA).

    {} with fewer than ENOUGH completed trials, with one parameter, or without the study.
    """
    file = out / STORAGE
    if not file.exists():
        return {}
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{file.absolute()}")
    complete = _complete(study)
    if len(complete) < ENOUGH or len({name for trial in complete for name in trial.params}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)


def _sampler(number: int) -> optuna.samplers.BaseSampler:
    """The sampler of a trial; its seed depends on the number, so a continued search does not repeat samples."""
    return optuna.samplers.TPESampler(seed=number)


def samples(definition: Definition) -> list[Mapping[str, Any]]:
    """Distinct random samples of get_search(trial), the same ones every time.

    Raises:
      ConfigError: the file has no get_search, or it does not return a dict of keys.
    """
    if not definition.has("get_search"):
        file = definition.config.partition(":")[0]
        raise ConfigError(
            f"{file} defines no get_search(trial); add one, for example: "
            "def get_search(trial): return {'optimizer.peak_lr': trial.suggest_float('lr', 1e-5, 1e-3, log=True)}"
        )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: list[Mapping[str, Any]] = []
    for _ in range(SAMPLES):
        with contextlib.suppress(optuna.TrialPruned):
            drawn.append(_keys(definition, study.ask()))
    if not drawn:
        raise ConfigError(f"get_search of {definition.config} pruned all of {SAMPLES} samples; make it accept some")
    return [keys for i, keys in enumerate(drawn) if keys not in drawn[:i]]


def _keys(definition: Definition, trial: Trial) -> Mapping[str, Any]:
    try:
        keys = definition.call("get_search", trial, expected=optuna.TrialPruned)
    except ValueError as error:  # Optuna's, too, of choices that are not those of the study
        raise ConfigError(
            f"get_search of {definition.config}: {error}; the choices of a search must not change: restore "
            "the original ones, or choose another --out"
        ) from error
    if not isinstance(keys, Mapping) or not keys:
        raise ConfigError(f"get_search of {definition.config} must return a dict of dotted keys, got {keys!r}")
    return keys


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _table(study: optuna.Study, points: Mapping[int, Point], out: Path, metric: str) -> str:
    """All trials, the best first, and the keys of the best."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    order = sorted(study.trials, key=lambda t: (DONE.index(t.state), 0 if t.value is None else sign * t.value))
    rows = [["point", "state", "step", f"{metric} (mean of the last tenth)"]]
    for trial in order:
        point = points.get(trial.number)
        step = str(run_lib.last(out, point).get("step", 0)) if point else ""
        value = "" if trial.value is None else f"{trial.value:.5g}"
        rows.append([point.name if point else f"{trial.number:03d}", trial.state.name.lower(), step, value])
    text = run_lib.table(rows)
    for trial in study.get_trials(states=(TrialState.FAIL,)):
        point = points.get(trial.number)
        name, why = (point.name, run_lib.log(out, point)) if point else (f"{trial.number:03d}", trial.user_attrs[WHY])
        text += f"\nFAILED {name}: {why}"
    if not _complete(study):
        return f"{text}\nno trial was completed"
    best = points[study.best_trial.number]
    keys = " ".join(f"--config.{k}={v}" for k, v in best.keys.items())
    return f"{text}\nbest: {best.name}, {metric} {study.best_value:.5g}: {keys}"
