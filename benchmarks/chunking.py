"""How far the targets jump from one control step to the next, by the policy's latency, with and without blending.

    python -m benchmarks.chunking [--latencies 50 100 200 300 400] [--blend 8]

Runs the asynchronous `Controller` at 30 Hz with chunks of 20 steps and a new one every 10, as a robot does. A stand-in
policy predicts a smooth motion of six joints, and is wrong by another offset in every chunk, as a trained policy is
when it looks again. In place of the thread there is a clock of steps, so that the figures do not depend on the machine.
`plain` is control without blending.

Prints one JSON line: for each latency the largest step between executed targets and the mean distance from the motion,
in degrees, the steps at which the arm had to stand still, and the ratios to `plain`.
"""

import argparse
import json
import math
from functools import partial

import numpy as np

from rynnvla_jax.columns import Columns
from rynnvla_jax.deploy.control import Controller, act
from rynnvla_jax.deploy.observation import Observation

RATE, CHUNK, JOINTS = 30, 20, 6
COLUMNS = Columns("a stand-in")


def motion(steps: np.ndarray) -> np.ndarray:
    """Degrees [N, 6] at these steps: swings of up to 30 degrees within 3 to 6 seconds."""
    seconds = np.asarray(steps)[:, None] / RATE
    return 30 * np.sin(2 * np.pi * seconds / np.linspace(3, 6, JOINTS) + np.arange(JOINTS))


class Wavering:
    """Predicts the motion, with an offset in every chunk that depends on the step it looks at."""

    def __init__(self, degrees: float, seed: int):
        self.degrees, self.seed = degrees, seed

    def act(self, front, wrist, state, instruction, columns=None, extra_views=None):
        step = int(state[0])
        offset = np.random.default_rng((self.seed, step)).normal(0, self.degrees, JOINTS)
        return motion(np.arange(step, step + CHUNK)) + offset


class Clock:
    """Stands in for a controller's thread: an answer comes `delay` steps of the control loop after its question."""

    def __init__(self, policy: Wavering, delay: float):
        self.policy, self.delay, self.now = policy, delay, 0.0
        self.begun: int | None = None
        self._waiting: tuple[int, Observation] | None = None
        self._answer: tuple[float, int, np.ndarray] | None = None  # when, of which step, chunk

    def offer(self, step: int, observation: Observation) -> None:
        self._waiting = (step, observation)
        self._begin(self.now)

    def finished(self, timeout: float = 0.0) -> list[tuple[int, np.ndarray]]:
        if self._answer is not None and timeout:
            self.now = max(self.now, math.ceil(self._answer[0]))  # the arm stands still
        results = []
        while self._answer is not None and self._answer[0] <= self.now:
            when, step, chunk = self._answer
            results.append((step, chunk))
            self._answer = None
            self._begin(when)
        return results

    def forget(self) -> None:
        self.begun = self._waiting = self._answer = None

    def close(self) -> None:
        pass

    def _begin(self, when: float) -> None:
        if self._answer is None and self._waiting is not None:
            (step, observation), self._waiting = self._waiting, None
            self.begun = step
            self._answer = (when + self.delay, step, act(self.policy, observation))


def run(
    policy: Wavering, delay: float, steps: int, replan_every: int = CHUNK // 2, blend: int = 0, ensemble: bool = False
) -> dict[str, float]:
    """Executes `steps` steps with a policy that answers after `delay` of them."""
    controller = Controller(policy, replan_every, ensemble, asynchronous=True, blend=blend)
    controller.close()
    clock = Clock(policy, delay)
    controller._worker = clock  # type: ignore[assignment]
    blank = np.zeros((1, 1, 3), np.uint8)
    targets = []
    for step in range(steps):
        state = np.array([step], np.float32)
        targets.append(controller.target(partial(Observation, blank, None, state, "move", COLUMNS)))
        clock.now += 1
    executed, did = np.array(targets), controller.statistics
    return {
        "largest_step": round(float(np.abs(np.diff(executed, axis=0)).max()), 3),
        "distance": round(float(np.abs(executed - motion(np.arange(steps))).mean()), 3),
        "waits": did.waits,
        "chunks": did.chunks,
        "longest_delay": did.longest_delay,
    }


def measure(latencies: list[int], blend: int, degrees: float, steps: int, seed: int) -> dict:
    """The results that `main` prints."""
    policy, rows = Wavering(degrees, seed), []
    for latency in latencies:
        delay = latency * RATE / 1000
        kinds = {
            "plain": run(policy, delay, steps),
            "ensemble": run(policy, delay, steps, ensemble=True),
            "blend": run(policy, delay, steps, blend=blend),
        }
        plain = kinds["plain"]
        ratios = {
            name: {key: round(kinds[name][key] / plain[key], 3) for key in ("largest_step", "distance")}
            for name in ("ensemble", "blend")
        }
        rows.append({"latency_ms": latency, **kinds, "ratios": ratios})
    alone = float(np.abs(np.diff(motion(np.arange(steps)), axis=0)).max())
    return {
        "benchmark": "chunking", "rate": RATE, "chunk": CHUNK, "replan_every": CHUNK // 2, "blend": blend,
        "offset_degrees": degrees, "steps": steps, "largest_step_of_the_motion": round(alone, 3), "latencies": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latencies", type=int, nargs="+", default=[50, 100, 200, 300, 400], help="milliseconds")
    parser.add_argument("--blend", type=int, default=8, help="steps from one chunk to the next")
    parser.add_argument("--offset", type=float, default=2.0, help="standard deviation of a chunk's offset, in degrees")
    parser.add_argument("--steps", type=int, default=9000, help="five minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(measure(options.latencies, options.blend, options.offset, options.steps, options.seed)))


if __name__ == "__main__":
    main()
