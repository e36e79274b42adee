"""A scripted person: knows all positions, plans way-points for the hand, and tries again when a grasp failed."""

import math
from collections.abc import Generator, Iterator

import numpy as np

from rynnvla_jax.sim import hand
from rynnvla_jax.sim.human import SHOULDER, HandCommand, HandTable, between, turned

_TRIES = 3  # of one target
_WIDTHS = {"block": 0.025, "strawberry": 0.028, "pen": 0.011}  # metres between thumb and index
_HIGH = {"plate": 0.11, "holder": 0.21}  # metres above the table on the way: a pen hangs from the hand
_PEN_END = 0.022  # metres from its middle to where a pen is held: the rest goes into the holder
_IN_HOLDER = 0.118  # metres above the table of the hand that drops a pen
_ON_PLATE = 0.009  # metres above the table of what is let go over the plate
_SLOTS = {  # metres beside the goal's middle, the thumb's side first: the fingers are on the other
    "plate": {1: (0.0,), 2: (0.020, -0.020), 3: (0.032, 0.0, -0.032)},
    "holder": {1: (0.0,), 2: (0.012, -0.012)},
}


def demonstrate(env: HandTable, seed: int) -> Iterator[HandCommand]:
    """Commands for the episode that `env` was reset to; step the environment with each before taking the next.

    Args:
      env: is read, never stepped.
      seed: of speed and small variations.
    """
    return _Person(env, np.random.default_rng([seed, 0])).run()


class _Person:
    """Generators of commands; each motion starts from the last one."""

    def __init__(self, env: HandTable, rng: np.random.Generator):
        self.env, self.rng, self.things = env, rng, env.things
        self.speed = rng.uniform(0.75, 1.25)
        self.tilt = rng.uniform(-0.08, 0.08)
        self.start = self.last = env.command
        self.goal = env.layout.goal
        self.high = _HIGH[self.goal]
        self.yaw = self._natural(self.things.position(self.goal)) + rng.normal(0, 0.12)  # when it places

    def run(self) -> Iterator[HandCommand]:
        targets = self.env.layout.targets
        slots = _SLOTS[self.goal][len(targets)]
        yield from self._wait(int(self.rng.integers(1, 6)))
        for name, slot in zip(targets, slots, strict=True):
            for _ in range(_TRIES):
                yield from self._once(name, slot)
                if self.things.placed(name):
                    break
        home = self.start.position + self.rng.normal(0, 0.01, 3)
        yield from self._to(home, self.start.rotation, self.start.fingers)
        yield from self._wait(4)

    def _once(self, name: str, slot: float) -> Iterator[HandCommand]:
        kind = self.env.layout[name].kind
        rest = self.things.position(name)[2]
        if (yield from self._pick(name, kind)):
            opened = hand.pinch(_WIDTHS[kind], True, kind == "pen")
            yield from (self._insert(name, slot, opened) if kind == "pen" else self._place(name, slot, rest, opened))
        yield from self._wait(3)

    def _pick(self, name: str, kind: str) -> Generator[HandCommand, None, bool]:
        """Returns whether the object is in the hand."""
        site, yaw = self._grasp(name, kind)
        site = site + (*self.rng.normal(0, 0.001, 2), 0)
        rotation = turned(yaw, 0.0, self.tilt)
        opened, closed = (hand.pinch(_WIDTHS[kind], o, kind == "pen") for o in (True, False))
        above = site + (0, 0, self.rng.uniform(0.05, 0.08))
        if self.last.position[2] < self.high - 0.02 and self.last is not self.start:
            yield from self._to(np.array([*self.last.position[:2], self.high]), self.last.rotation, opened)
        yield from self._to(above, rotation, opened)
        yield from self._to(site, rotation, opened, fastest=0.25)
        yield from self._fingers(closed, 8)
        yield from self._wait(2, holds=True)
        held = self.env.held == name
        if not held:
            yield from self._fingers(opened, 6)
        yield from self._to(np.array([*site[:2], self.high]), rotation, self.last.fingers, fastest=0.35)
        return held

    def _grasp(self, name: str, kind: str) -> tuple[np.ndarray, float]:
        """Where the pinch goes, and its yaw."""
        position, axes = self.things.position(name), self.things.rotation(name)
        wish = self._natural(position) + self.rng.normal(0, 0.15)
        site = np.array([*position[:2], max(position[2], 0.010)])
        if kind == "block":
            face = axes[:, np.argmin(np.abs(axes[2]))]  # the most level of its three axes
            return site, _nearest(math.atan2(face[1], face[0]), wish, math.pi / 2)
        if kind == "pen":
            yaw = _nearest(math.atan2(axes[1, 2], axes[0, 2]) - math.pi / 2, wish, math.pi)
            return site + _PEN_END * np.array([-math.sin(yaw), math.cos(yaw), 0]), yaw
        return site, wish

    def _place(self, name: str, slot: float, rest: float, opened: np.ndarray) -> Iterator[HandCommand]:
        spread = 0.006 if len(self.env.layout.targets) == 1 else 0.001
        spot = self._slot(slot) + self.rng.normal(0, spread, 2)
        rotation = turned(self.yaw, 0.0, self.tilt)
        yield from self._to(np.array([*spot, self.high]), rotation, self.last.fingers)
        yield from self._wait(1)
        offset = self.things.position(name) - self.last.position
        low = np.array([*spot, rest + _ON_PLATE]) - offset
        yield from self._to(low, rotation, self.last.fingers, fastest=0.3)
        yield from self._wait(2)
        yield from self._fingers(opened, 8)
        yield from self._to(low + (0, 0, 0.07), rotation, opened, fastest=0.35)

    def _insert(self, name: str, slot: float, opened: np.ndarray) -> Iterator[HandCommand]:
        """Turns the thumb up so that the pen stands, lowers it into the holder, lets go and draws the hand aside."""
        spot = self._slot(slot)
        rotation = turned(self.yaw - 0.95, math.pi / 2)
        yield from self._to(np.array([*spot, self.high]), rotation, self.last.fingers)
        yield from self._wait(2)
        offset = (self.things.position(name) - self.last.position)[:2]
        low = np.array([*(spot - offset), _IN_HOLDER])
        yield from self._to(low, rotation, self.last.fingers, fastest=0.3)
        yield from self._wait(2)
        yield from self._fingers(opened, 8)
        yield from self._to(low + 0.09 * rotation[:, 2], rotation, opened, fastest=0.35)

    def _slot(self, along: float) -> np.ndarray:
        goal = self.things.position(self.goal)[:2]
        return goal + along * np.array([-math.sin(self.yaw), math.cos(self.yaw)])

    def _natural(self, position: np.ndarray) -> float:
        """Yaw of a hand that comes straight from the shoulder."""
        return math.atan2(*(position[:2] - SHOULDER)[::-1])

    def _to(self, position, rotation, fingers, fastest: float = 0.5) -> Iterator[HandCommand]:
        """Straight, without a jerk (a quintic); `fastest` m/s."""
        start = self.last
        far = float(np.linalg.norm(position - start.position)) / fastest
        turn = math.acos(np.clip((np.trace(start.rotation.T @ rotation) - 1) / 2, -1, 1)) / 3.0  # rad/s
        steps = max(5, round(self.env.fps * 1.875 * max(far, turn) / self.speed))
        for i in range(1, steps + 1):
            s = i / steps
            s = s * s * s * (10 - 15 * s + 6 * s * s)
            yield from self._say(
                start.position + s * (position - start.position),
                between(start.rotation, rotation, s),
                start.fingers + s * (fingers - start.fingers),
                start.holds,
            )

    def _fingers(self, fingers: np.ndarray, steps: int) -> Iterator[HandCommand]:
        """Opens or closes; what is held is let go of."""
        start = self.last
        for i in range(1, steps + 1):
            angles = start.fingers + i / steps * (fingers - start.fingers)
            yield from self._say(start.position, start.rotation, angles, False)

    def _wait(self, steps: int, holds: bool | None = None) -> Iterator[HandCommand]:
        last = self.last
        for _ in range(steps):
            yield from self._say(last.position, last.rotation, last.fingers, last.holds if holds is None else holds)

    def _say(self, position, rotation, fingers, holds: bool) -> Iterator[HandCommand]:
        self.last = HandCommand(position, rotation, fingers, holds)
        yield self.last


def _nearest(angle: float, wish: float, period: float) -> float:
    """`angle`, up to a multiple of `period`, nearest to `wish`."""
    return wish + (angle - wish + period / 2) % period - period / 2
