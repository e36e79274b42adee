"""The fault drill, `make drill`: a two-process run is interrupted 30 times and must end with the same result.

It sends SIGKILL or SIGTERM to one process or both, or SIGTERM to the launcher: after some steps, during a save, or at
any time, including start-up. The same command is started again each time. At the end parameters, metrics and skipped
positions must be bit-identical to those of an undisturbed run. Prints one line per strike and a JSON summary.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from rynnvla_jax.checkpoint import model_dir
from tests.command import ROOT, Command

PROCESSES, STEPS, EVERY = 2, 300, 7
LAUNCH = "import sys; from rynnvla_jax.launch import local; sys.exit(local.run(sys.argv[1:], 2, 1))"
START = 12.0  # seconds from the start within which "at any time" lies


@dataclass
class Strike:
    """One interruption of the command."""

    number: int
    who: str  # "0", "1", "both" or "launcher"
    when: str  # "steps", "save" or "any time"
    amount: float  # steps, or seconds


def draw(rng: random.Random) -> Strike:
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    who = rng.choice(("0", "1", "both", *(["launcher"] if number == signal.SIGTERM else [])))
    when = rng.choices(("steps", "save", "any time"), (0.4, 0.35, 0.25))[0]
    amount = {"steps": rng.randint(1, 12), "save": 0, "any time": rng.uniform(0, START)}[when]
    return Strike(number, who, when, amount)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__.split("\n")[0])
    parser.add_argument("--strikes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "drill", help="emptied first")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    keys = {"total_steps": STEPS, "checkpoint__every_steps": EVERY, "faults": {"SLOW": "0.02", "BAD_BATCHES": "40"}}
    whole, struck = (
        Command(options.out / name, options.out / "cache", PROCESSES, **keys) for name in ("whole", "struck")
    )

    began, rng = time.monotonic(), random.Random(options.seed)
    print(f"undisturbed run of {STEPS} steps", flush=True)
    whole.finish()
    counts, longest = {}, 0.0
    for i in range(1, options.strikes + 1):
        strike = draw(rng)
        before = struck.lines()
        status, seconds, hit = endure(struck, strike)
        name = signal.Signals(strike.number).name
        print(
            f"{i:2}/{options.strikes}  {name} to {strike.who:8} {strike.when:8}  step {before:3} to {struck.lines():3} "
            f"exit {status:3} after {seconds:4.1f} s  {'' if hit else 'the run had ended before'}",
            flush=True,
        )
        if not hit or status == 0:
            raise SystemExit(
                f"strike {i} came too late (exit status {status}): the drill needs more steps\n{said(struck)}"
            )
        for key in (name, f"to {strike.who}", f"at {strike.when}"):
            counts[key] = counts.get(key, 0) + 1
        longest = max(longest, seconds)
    struck.finish()
    return judge(options, whole, struck, counts, longest, time.monotonic() - began)


def endure(command: Command, strike: Strike) -> tuple[int, float, bool]:
    """One start with one strike. Returns (exit status, seconds from the strike to the end, whether it struck)."""
    launch = [sys.executable, "-c", LAUNCH, *command.arguments]
    with command.log().open("w", encoding="utf-8") as log:
        launcher = subprocess.Popen(launch, cwd=ROOT, env=command.environment, stdout=log, stderr=log)
    start, wall, lines = time.monotonic(), time.time(), None
    beat = command.workdir / "heartbeat.json"
    while launcher.poll() is None:
        if lines is None and beat.exists() and beat.stat().st_mtime > wall:
            lines = command.lines()  # the loop has begun, and has cut off what it will do again
        if strike.when == "any time":
            now = time.monotonic() - start >= strike.amount
        else:
            now = lines is not None and (
                command.saving() if strike.when == "save" else command.lines() >= lines + strike.amount
            )
        pids = children(launcher.pid)
        if now and len(pids) == PROCESSES:
            targets = {"both": pids, "launcher": [launcher.pid]}.get(strike.who) or [pids[int(strike.who)]]
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, strike.number)
            struck = time.monotonic()
            return launcher.wait(timeout=180), time.monotonic() - struck, True
        time.sleep(0.001)
    return launcher.returncode, 0.0, False


def children(pid: int) -> list[int]:
    """Process ids of the run's processes, in order; empty when the launcher has ended."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def said(command: Command) -> str:
    return command.log().read_text(encoding="utf-8")[-5000:]


def judge(options, whole: Command, struck: Command, counts: dict, longest: float, seconds: float) -> int:
    """Prints the summary; returns 0 when both runs ended with the same result."""
    first, second = (jax.tree.map(np.asarray, model_dir.load_params(c.workdir)[0]) for c in (whole, struck))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), first, second)
    parameters = all(jax.tree.leaves(same))
    metrics = (whole.workdir / "metrics.jsonl").read_bytes() == (struck.workdir / "metrics.jsonl").read_bytes()
    summary = {
        "parameters_identical": parameters,
        "metrics_identical": metrics,
        "strikes": options.strikes,
        **dict(sorted(counts.items())),
        "longest_exit_seconds": round(longest, 1),
        "steps": STEPS,
        "seed": options.seed,
        "minutes": round(seconds / 60, 1),
    }
    print(json.dumps(summary))
    return 0 if parameters and metrics else 1


if __name__ == "__main__":
    sys.exit(main())
