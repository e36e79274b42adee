"""Turns chunks of targets into the next target: replanning, blending, temporal ensembling, asynchronous inference.

The simulator, clients of the server and the LeRobot plug-in use the same controller. numpy only.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rynnvla_jax.config import ConfigError
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import Acts, Observation
from rynnvla_jax.recording import Recording

# Of the weights exp(-DECAY * i) of ensembled predictions, i = 0 the oldest.
# Source: ACT (arXiv 2304.13705), section IV.B and its published setting.
DECAY = 0.01


@dataclass
class ControlStatistics:
    """What a controller did since it was made; `reset` keeps counting."""

    steps: int = 0  # targets returned
    chunks: int = 0  # chunks adopted
    waits: int = 0  # steps at which the arm had to stand still until a chunk came, without the first of an episode
    longest_delay: int = 0  # steps between an observation and the first target that came from it


class Controller:
    """Call `target` once per control step; it requests a new chunk from `policy` every `replan_every` steps.

    With `ensemble` the target is the weighted mean of the predictions of all chunks that cover this step. With `blend`
    the arm moves from the previous chunk to a new one within that many steps (`blended`), else in one.

    Synchronous (for a simulator): `target` waits for the policy; an observation is taken only when it is needed.

    Asynchronous (for a robot): inference runs in its own thread and never delays a step that already has a target.
    Targets for steps that passed during inference are dropped: row k of a chunk is for the k-th step after its
    observation. While the policy is busy and a new chunk is due, each step's observation replaces the waiting one.
    `target` blocks only when no chunk covers the step: at the first step, and when inference takes longer than a chunk
    lasts; it never continues a chunk beyond its end.

    Not thread-safe: one control loop. A context manager; `close` ends the thread.
    """

    def __init__(
        self,
        policy: Acts,
        replan_every: int,
        ensemble: bool = False,
        asynchronous: bool = False,
        patience: float = 30.0,
        rate: float | None = None,
        blend: int = 0,
    ):
        """`patience`: seconds that an asynchronous `target` waits for the policy before it raises. `rate`: calls of
        `target` per second, which must be the rate of the policy's recordings, where it knows it (`recording`); None:
        not checked. `blend`: steps from one chunk to the next, at least 0.

        Raises PolicyError for another rate, ValueError when `replan_every` is not positive, and for `blend` beside
        `ensemble`; when `replan_every` exceeds the policy's chunk, `target` does.
        """
        check_rate(policy, rate)
        if replan_every < 1:
            raise ValueError(f"replan_every is {replan_every}; it must be at least 1")
        if blend < 0:
            raise ValueError(f"blend is {blend}; it must be at least 0")
        if blend and ensemble:
            raise ValueError("blend and ensemble both smooth the change of chunks; choose one of them")
        self.policy, self.replan_every, self.ensemble, self.patience = policy, replan_every, ensemble, patience
        self.blend, self.statistics = blend, ControlStatistics()
        self._worker = _Worker(policy) if asynchronous else None
        self._plan: list[tuple[int, np.ndarray]]  # (step of the observation, chunk [C, A]), oldest first
        self._failure: BaseException | None
        self._forget()

    def reset(self) -> None:
        """Starts an episode, also after an error: the previous plan is discarded."""
        self._forget()
        if self._worker:
            self._worker.forget()

    def target(self, observe: Callable[[], Observation]) -> np.ndarray:
        """The absolute target float32[A] of the next control step; `observe` takes an observation now.

        Raises:
          PolicyError: the policy failed, was too slow or returned an unusable chunk. There is no motion, the plan is
            dropped, and every further call raises until `reset`. Errors of `observe` propagate with the same effect.
          ValueError: the policy's chunks are shorter than `replan_every`; the same effect.
        """
        if self._failure is not None:
            raise PolicyError(f"stopped after: {self._failure}; call reset() when the robot may move again")
        try:
            if self._worker:
                self._replan_beside(self._worker, observe)
            elif not self._plan or self._step - self._plan[-1][0] >= self.replan_every:
                self._adopt(self._step, act(self.policy, observe()))
            target = self._predicted()
        except BaseException as error:
            self._plan, self._failure = [], error
            raise
        self._step += 1
        self.statistics.steps += 1
        return target

    def close(self) -> None:
        """Ends the thread of an asynchronous controller after its current inference."""
        if self._worker:
            self._worker.close()

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _forget(self) -> None:
        self._step = 0
        self._plan = []
        self._failure = None

    def _replan_beside(self, worker: "_Worker", observe: Callable[[], Observation]) -> None:
        """Offers an observation if a chunk is due, takes finished chunks, waits if none reaches this step."""
        if worker.begun is None or self._step - worker.begun >= self.replan_every:
            worker.offer(self._step, observe())
        for start, chunk in worker.finished():
            self._adopt(start, chunk)
        if self._plan and not self._reaching():
            self.statistics.waits += 1
        while not self._reaching():
            results = worker.finished(self.patience)
            if not results:
                raise PolicyError(
                    f"the policy returned no actions within {self.patience:g} s; check that it runs (if remote: "
                    "network and /healthz)"
                )
            for start, chunk in results:
                self._adopt(start, chunk)

    def _adopt(self, start: int, chunk: np.ndarray) -> None:
        if self.replan_every > len(chunk):
            raise ConfigError(
                f"replan_every is {self.replan_every} but a chunk has {len(chunk)} steps; choose a smaller one"
            )
        delay = self._step - start
        if self.blend and self._plan:
            before, previous = self._plan[-1]
            chunk = blended(previous[start - before :], chunk, delay, self.blend)
        self._plan.append((start, chunk))
        self.statistics.chunks += 1
        self.statistics.longest_delay = max(self.statistics.longest_delay, delay)

    def _reaching(self) -> list[tuple[int, np.ndarray]]:
        return [(start, chunk) for start, chunk in self._plan if self._step - start < len(chunk)]

    def _predicted(self) -> np.ndarray:
        self._plan = self._reaching() if self.ensemble else self._reaching()[-1:]
        predictions = np.array([chunk[self._step - start] for start, chunk in self._plan], np.float64)
        weights = np.exp(-DECAY * np.arange(len(predictions)))
        return (np.tensordot(weights, predictions, 1) / weights.sum()).astype(np.float32)


def blended(previous: np.ndarray, chunk: np.ndarray, delay: int, steps: int) -> np.ndarray:
    """`chunk` as it can follow `previous`: float32[C, A], at first `previous`, then ever less of it.

    Args:
      previous: float[P, A], what is planned already from the first row of `chunk` on; with P = 0 nothing changes.
      chunk: float[C, A], a new plan.
      delay: rows that are executed before the new plan can take effect; they stay those of `previous`.
      steps: rows after them that lead from one plan to the other, with weights that fall linearly.

    Beyond its end `previous` goes on in parallel to `chunk`, so that a late chunk begins where the arm stands.

    Source: Real-Time Chunking (arXiv 2506.07339): actions that are certain to be executed are frozen, and the weights
    of those after them fall to 0, linearly by default in LeRobot. There, they guide the denoising of a flow-matching
    policy. Our policy decodes an embedding in one forward pass and has no denoising to guide, so they weigh the targets
    themselves. The mean of two plans that disagree is a plan of neither; denoising would choose.
    """
    planned = min(len(previous), len(chunk))
    if not planned:
        return np.array(chunk, np.float32)
    old = chunk + (previous[planned - 1] - chunk[planned - 1])
    old[:planned] = previous[:planned]
    weights = np.clip(1 - (np.arange(len(chunk)) - delay + 1) / (steps + 1), 0, 1)[:, None]
    return (weights * old + (1 - weights) * chunk).astype(np.float32)


def check_rate(policy: Acts, rate: float | None) -> None:
    """Raises PolicyError when a policy that knows its recordings' rate is to be controlled at another one."""
    recording = getattr(policy, "recording", Recording())
    if rate is not None and (fault := recording.rate_fault(rate)):
        raise PolicyError(fault)


def act(policy: Acts, observation: Observation) -> np.ndarray:
    """The policy's chunk float32[C, A], C > 0, finite. Raises PolicyError, for errors of any other type too."""
    # Not passed where there are none, so that other projects' policies need not know them.
    extra = (observation.extra_views,) if observation.extra_views else ()
    try:
        chunk = np.asarray(policy.act(*observation[:5], *extra))
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError(f"the policy failed ({type(error).__name__}: {error}); no motion was produced") from error
    if chunk.ndim != 2 or not len(chunk) or chunk.dtype.kind not in "iuf":
        raise PolicyError(f"the policy returned {chunk.dtype} {list(chunk.shape)}, expected numbers [steps, joints]")
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        chunk = chunk.astype(np.float32)
    if not np.isfinite(chunk).all():
        raise PolicyError("the policy returned targets that are not finite; check its weights")
    return chunk


class _Worker:
    """A thread that runs the policy on the newest observation that was offered."""

    def __init__(self, policy: Acts):
        self._policy = policy
        self._changed = threading.Condition()
        self._waiting: tuple[int, Observation] | None
        self._begun: int | None
        self._results: list[tuple[int, np.ndarray]]
        self._failure: PolicyError | None
        self._closed = False
        self._episode = 0  # chunks of an earlier one are dropped
        self._clear()
        threading.Thread(target=self._run, name="policy", daemon=True).start()

    @property
    def begun(self) -> int | None:
        """The step of the observation that inference last began with; None before the first."""
        return self._begun

    def offer(self, step: int, observation: Observation) -> None:
        """Replaces the waiting observation, if there is one."""
        with self._changed:
            self._waiting = (step, observation)
            self._changed.notify_all()

    def finished(self, timeout: float = 0.0) -> list[tuple[int, np.ndarray]]:
        """(step, chunk) pairs finished since the last call, after at most `timeout` seconds.

        Raises the policy's error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._failure, timeout)
            if self._failure:
                raise self._failure
            results, self._results = self._results, []
            return results

    def forget(self) -> None:
        with self._changed:
            self._episode += 1
            self._clear()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _clear(self) -> None:
        self._waiting = self._begun = self._failure = None
        self._results = []

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed or self._waiting is None:
                    return
                (step, observation), self._waiting = self._waiting, None
                self._begun, episode = step, self._episode
            outcome: Any
            try:
                outcome = act(self._policy, observation)
            except PolicyError as error:
                outcome = error
            with self._changed:
                if episode != self._episode:
                    continue
                if isinstance(outcome, PolicyError):
                    self._failure = outcome
                else:
                    self._results.append((step, outcome))
                self._changed.notify_all()
