"""Drivers of the arm in an evaluation: a policy, the expert, or a trivial baseline."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rynnvla_jax.deploy.control import Controller
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import KEYS, Acts, Observation
from rynnvla_jax.sim.env import TableTop
from rynnvla_jax.sim.expert import demonstrate
from rynnvla_jax.storage import files

BUILT_IN = ("expert", "random", "hold")
ADDRESSES = ("ws://", "wss://")
# The policy of a work dir of training, with its `config`. Raises PolicyError. The command hands it in: its policies run
# in JAX, which the simulator does without.
OpenWorkdir = Callable[[str], Any]
PATIENCE = 600.0  # seconds for an answer: simulated time waits, and a large policy serves several workers


class Driver(Protocol):
    """Drives one try at a time."""

    def begin(self, env: TableTop, seed: int, number: int) -> None:
        """Starts try `number` (from 1 on) of the episode of `seed`."""
        ...

    def target(self, env: TableTop) -> np.ndarray | None:
        """Absolute target [6] of the next step in the environment's unit; None when there is nothing more to do."""
        ...


def check_policy(policy: str) -> None:
    """Raises PolicyError when `policy` is neither a built-in name, an address nor an existing folder."""
    if policy not in BUILT_IN and not policy.startswith(ADDRESSES) and not files.place(policy).is_dir():
        raise PolicyError(
            f"--policy {policy} is not a folder, a ws:// or wss:// address, or one of {', '.join(BUILT_IN)}; for a "
            "LeRobot policy use lerobot:FOLDER"
        )


def driver(policy: str, replan: int, ensemble: bool, open_workdir: OpenWorkdir | None = None) -> Driver:
    """The driver for a name, folder or address. Raises PolicyError."""
    check_policy(policy)
    if policy == "expert":
        return _Expert()
    if policy == "random":
        return _Random()
    if policy == "hold":
        return _Hold()
    if policy.startswith(ADDRESSES):
        from rynnvla_jax.deploy.remote import RemotePolicy
        from rynnvla_jax.deploy.server import API_KEY

        remote = RemotePolicy(policy, os.environ.get(API_KEY), timeout=PATIENCE)
        keys = remote.metadata.get("keys", KEYS.values())
        _check_cameras(policy, [key for key in keys if key not in KEYS.values()])
        return _Policy(remote, KEYS["wrist"] in keys, replan, ensemble)
    if (files.place(policy) / "checkpoints").is_dir():
        if open_workdir is None:
            raise PolicyError(f"--policy {policy} is a work dir of training; use it with `rynnvla evaluate`")
        loaded = open_workdir(policy)
    else:
        from rynnvla_jax.deploy.policy import Policy

        loaded = Policy.load(policy, keep_memory=True)  # a worker's own process
    layout = loaded.config.sequence
    _check_cameras(policy, layout.extra_views)
    return _Policy(loaded, layout.use_wrist_frame, replan, ensemble)


def _check_cameras(policy: str, others: Sequence[str]) -> None:
    """Raises PolicyError for a policy that needs a camera which is not on the table top."""
    if others:
        raise PolicyError(
            f"--policy {policy} also needs {', '.join(others)}, but the simulator has a front and a wrist camera only; "
            "use a policy that was trained without data.extra_views"
        )


class _Policy:
    """A policy; frames are rendered only when it needs an observation."""

    def __init__(self, policy: Acts, sees_wrist: bool, replan: int, ensemble: bool):
        self._controller, self._sees_wrist = Controller(policy, replan, ensemble), sees_wrist

    def begin(self, env: TableTop, seed: int, number: int) -> None:
        self._controller.reset()

    def target(self, env: TableTop) -> np.ndarray:
        return self._controller.target(lambda: self._observe(env))

    def _observe(self, env: TableTop) -> Observation:
        wrist = env.render("wrist") if self._sees_wrist else None
        return Observation(env.render("front"), wrist, env.state, env.instruction, env.columns)


class _Expert:
    """The scripted expert, which knows all positions; a try is its whole plan, with its own corrections."""

    _commands: Iterator

    def begin(self, env: TableTop, seed: int, number: int) -> None:
        self._commands = demonstrate(env, seed + number)

    def target(self, env: TableTop) -> np.ndarray | None:
        command = next(self._commands, None)
        return None if command is None else command.executed


class _Random:
    """Random targets in the joints' range, for half a second each."""

    def begin(self, env: TableTop, seed: int, number: int) -> None:
        self._rng, self._step = np.random.default_rng([seed, number]), 0

    def target(self, env: TableTop) -> np.ndarray:
        if self._step % 15 == 0:
            self._target = self._rng.uniform((-100,) * 5 + (0,), 100)
        self._step += 1
        return self._target


class _Hold:
    """Does not move."""

    def begin(self, env: TableTop, seed: int, number: int) -> None:
        self._target = env.state.copy()

    def target(self, env: TableTop) -> np.ndarray:
        return self._target
