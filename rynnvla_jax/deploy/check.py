"""Checks an exported policy on this machine: whether it runs, its latency and its range of motion."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.policy import Policy


def check(
    export_dir: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    repeats: int = 3,
    frame: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Loads an export and acts on one synthetic observation, with `frame` as in `Policy.example`.

    Returns JSON-ready values: seconds to load and to act (the first call and the median of `repeats`), the prompt's
    length, for each rate of the recordings whether an asynchronous loop would have to wait (`asynchronous`, by the
    slowest call but the first), for each joint the range of states that is accepted, and for each action the smallest
    and largest target, with the mean state it starts from.

    Raises:
      PolicyError: as `Policy.load` and `Policy.act`.
    """
    if repeats < 1:
        raise PolicyError(f"repeats is {repeats}; at least 1 call is needed")
    start = time.perf_counter()
    policy = Policy.load(export_dir, device, dtype, compiled, keep_memory=True)
    load_seconds = time.perf_counter() - start
    observation = policy.example(frame)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        targets = policy.act(*observation)
        seconds.append(time.perf_counter() - start)
    low, high = policy.state_range
    return {
        "device": str(policy.device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in policy.vla.parameters()),
        "load_seconds": load_seconds,
        "first_act_seconds": seconds[0],
        "act_seconds": statistics.median(seconds[1:]),
        "prompt_tokens": len(policy.observe([observation])[0].prompt),
        "chunk": targets.shape[0],
        "action_dim": targets.shape[1],
        "columns": policy.statistics.columns.to_json(),
        "rates": policy.recording.rates,
        "frames": policy.recording.frames,
        "asynchronous": [asynchronous(max(seconds[1:]), rate, targets.shape[0]) for rate in policy.recording.rates],
        "state": [] if observation.state is None else observation.state.tolist(),
        "state_min": low.tolist(),
        "state_max": high.tolist(),
        "action_min": targets.min(0).tolist(),
        "action_max": targets.max(0).tolist(),
    }


def asynchronous(seconds: float, rate: float, chunk: int) -> dict[str, Any]:
    """Whether answers within `seconds` come in time for an asynchronous `Controller` of `rate` steps per second.

    A chunk must last until the answer to the next observation, which is taken `replan_every` steps later, or as soon as
    the policy is free. Returns the steps that an answer takes, whether it `fits`, and the largest `replan_every` with
    which the arm need not stand still (null where there is none).
    """
    delay = math.ceil(seconds * rate)
    fits = 2 * delay <= chunk
    slow = "the arm would stand still; use a faster device, --dtype bfloat16, --compile or a smaller model"
    return {
        "rate": rate,
        "delay_steps": delay,
        "fits": fits,
        "largest_replan_every": chunk - delay if fits else None,
        "says": f"at {rate:g} Hz a chunk lasts {chunk} steps and two answers take {2 * delay}: "
        + (f"replan_every may be at most {chunk - delay}" if fits else slow),
    }
