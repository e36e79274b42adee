"""A stand-in for `rynnvla train` in sweeps, and the sweep that runs it: `python -m tests.sweeping sweep|train ...`.

The stand-in takes the same arguments, writes metrics and checkpoint markers like the real command, continues from its
work dir and saves on SIGTERM. With RYNNVLA_TESTS_HELD_OUT=N in the environment it evaluates every N steps, too. Seed 7
fails once, seed 13 always. With HOLD_AT in the environment a first attempt waits at that step until it is told to end.
From point 7 on, a bad learning rate waits at step 20 for at most half a minute.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from tests import ROOT

STAND_IN = [sys.executable, "-m", "tests.sweeping"]
HELD_OUT = "RYNNVLA_TESTS_HELD_OUT"
METRICS = ["grad_norm", "loss", "skipped_total", "token_accuracy"]
CONFIG = """
from rynnvla_jax.configs import action_vae

get_config = action_vae.get_config


def get_hyper(h):
    return {hyper}


def get_search(trial):
    return {search}
"""


def write_config(
    path: Path,
    hyper: str = "h.product([h.sweep('optimizer.peak_lr', [1e-3, 2e-3]), h.sweep('seed', [0, 1])])",
    search: str = "{'optimizer.peak_lr': trial.suggest_float('lr', 1e-6, 1.0, log=True)}",
) -> str:
    """A config file with a sweep; FILE:ARG."""
    path.write_text(CONFIG.format(hyper=hyper, search=search), encoding="utf-8")
    return f"{path}:tiny"


def attempts(workdir: Path) -> list[dict]:
    """The state that each start of the stand-in found."""
    file = workdir / "attempts.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def ask(configs, *_):
    """Instead of the check that traces the models."""
    from rynnvla_jax.sweep import check

    held_out = ["eval/action_error", "eval/hold_still_error"] if HELD_OUT in os.environ else []
    return check.Found("cpu", 1, [check.Verdict([], METRICS + held_out)] * len(configs))


def sweep(argv: list[str]) -> int:
    """The command with the stand-in, without the check that traces the models."""
    from rynnvla_jax.cli.main import main
    from rynnvla_jax.sweep import check, run

    run.PROGRAM, check.ask = STAND_IN, ask
    return main(["sweep", *argv])


def train(argv: list[str]) -> int:
    given = dict(argument.removeprefix("--").split("=", 1) for argument in argv)
    workdir, total = Path(given["workdir"]), int(given["config.total_steps"])
    seed, rate = int(given.get("config.seed", 0)), float(given.get("config.optimizer.peak_lr", 1e-3))
    workdir.mkdir(parents=True, exist_ok=True)
    left = []
    signal.signal(signal.SIGTERM, lambda *_: left.append(True))
    before, file = len(attempts(workdir)), workdir / "metrics.jsonl"
    done = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
    with (workdir / "attempts.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"from": done, "cores": sorted(os.sched_getaffinity(0))}) + "\n")
    if seed == 13 or (seed == 7 and not before):
        print("this seed brings bad luck", file=sys.stderr)
        return 3
    started = time.monotonic()
    for step in range(done + 1, total + 1):
        while not before and step > int(os.environ.get("HOLD_AT", total)) and not left:
            time.sleep(0.01)
        loss = abs(math.log10(rate) + 3) + 1 / step  # best at 1e-3
        while step == 21 and loss > 2.2 and int(workdir.name[:3]) >= 7 and not left and time.monotonic() < started + 30:
            time.sleep(0.01)
        with file.open("a", encoding="utf-8") as log:
            values = {"grad_norm": 1.0, "loss": loss, "skipped_total": 0.0, "token_accuracy": 1 / (1 + loss)}
            log.write(json.dumps({"step": step, **values}) + "\n")
        every = int(os.environ.get(HELD_OUT, 0))
        if every and step % every == 0:
            with (workdir / "eval.jsonl").open("a", encoding="utf-8") as log:
                error = abs(math.log10(rate) + 5) + 1 / step  # best at 1e-5
                log.write(json.dumps({"step": step, "action_error": error, "hold_still_error": 9.0}) + "\n")
        if left and step < total:
            return 143
    folder = workdir / "checkpoints" / str(total)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verified.json").write_text("{}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit({"sweep": sweep, "train": train}[sys.argv[1]](sys.argv[2:]))
