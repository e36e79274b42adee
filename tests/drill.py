"""The fault drill, `make drill`: two-process runs are interrupted 30 times and must end with the same result.

There is one run of each kind of model: an ActionVAE, a VLA whose VQ codes are made ahead, and a VQGAN, each with two
worker processes of the loader in each process. SIGKILL or SIGTERM goes to one process or both, or SIGTERM to the
launcher: after some steps, during a save, while codes are made, or at any time, including start-up. The same command is
started again each time. After each strike every process of that start must end, workers too, and leave nothing in
shared memory. At the end parameters, metrics, skipped positions and every file of codes must be bit-identical to those
of an undisturbed run. Prints one line per strike and a JSON summary.

With `--bucket` the work dirs that are struck are in a gs:// bucket, behind a proxy that answers every fifth request
with 503 and cuts every twentieth answer; the undisturbed runs are on the disk.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.storage import files
from tests import stores, tiny
from tests.command import ROOT, Command, read_json

STAGES = ("action_vae", "robot", "vqgan")  # one of each kind of model
PROCESSES = 2
EVERY, IN_A_BUCKET = 7, 26  # steps between saves
STEPS = 13  # of a run for each of its strikes, more than one strike lets pass
CODES = 3  # strikes while codes are made, of a run that makes some: there are twelve files
BAD = "20,30,31"  # positions of batches: an update is skipped, then two in a row are left out
LAUNCH = "import sys; from rynnvla_jax.launch import local; sys.exit(local.run(sys.argv[1:], 2, 1))"
LONGEST, MOST = 20.0, 12  # "at any time" is within so many seconds from the start, and so many steps from the first
IN_THE_LOOP = ("first batch", "step", "save")  # phases of a run that has cut off what it will do again
EXIT_SECONDS = 900  # for the launcher to end after a strike: saves through a store that fails take minutes
REFUSE, CUT = 5, 20  # of the requests to the bucket: every n-th is answered 503, or in part
PATIENCE = 60.0  # seconds after the launcher in which all other processes of a start end
MARK = "RYNNVLA_DRILL"  # environment variable by which the processes of a start are found
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Strike:
    """One interruption of the command."""

    number: int
    who: str  # "0", "1", "both" or "launcher"
    when: str  # "steps", "save", "codes" or "any time"
    amount: float  # steps, files of codes, or seconds


@dataclass
class Tally:
    """What all strikes have shown so far."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    longest_exit: float = 0.0  # seconds from a strike to the end of the launcher
    longest_rest: float = 0.0  # seconds from there to the end of the last process, with shared memory given back
    left: list[str] = field(default_factory=list)  # processes and shared memory that stayed
    same: dict[str, dict[str, bool]] = field(default_factory=dict)  # {stage: {what: whether it is identical}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__.split("\n")[0])
    parser.add_argument("--strikes", type=int, default=30, help="of all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "drill", help="emptied first")
    parser.add_argument("--bucket", action="store_true", help="the struck work dirs are in a bucket, see above")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    (options.out / "assets").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        proxy = None
        if options.bucket:
            port = stack.enter_context(stores.gcs())
            os.environ.update(stores.environment(port))  # of the one who looks on
            proxy = stores.Proxy(port)
            proxy.refuse, proxy.cut = REFUSE, CUT
        return run_all(options, proxy)


def run_all(options: argparse.Namespace, proxy: stores.Proxy | None) -> int:
    """All stages, then the summary. Returns the exit status."""
    began, rng, tally = time.monotonic(), random.Random(options.seed), Tally()
    assets = tiny.assets(options.out / "assets")
    for i, stage in enumerate(options.stages):
        count = (options.strikes + i) // len(options.stages)
        strikes = [draw(rng, "codes") for _ in range(min(count, CODES) if stage == "robot" else 0)]
        strikes += [draw(rng) for _ in range(count - len(strikes))]
        workdirs = [f"{options.out}/{stage}_whole", f"{options.out}/{stage}_struck"]
        if proxy:
            workdirs[1] = f"gs://{stores.BUCKET}/{stage}"
        every = IN_A_BUCKET if proxy else EVERY
        whole, struck = (make_command(options.out, stage, w, assets, STEPS * count, every) for w in workdirs)
        if proxy:
            struck.environment.update(stores.environment(proxy.port), UPLOAD_SECONDS="1")
            struck.patience = 3600
        tally.same[stage] = run_stage(stage, whole, struck, strikes, tally)
    if proxy:
        tally.counts["requests that were spoiled"] = proxy.spoiled
    return summarise(options, tally, time.monotonic() - began)


def draw(rng: random.Random, when: str = "") -> Strike:
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    who = rng.choice(("0", "1", "both", *(["launcher"] if number == signal.SIGTERM else [])))
    when = when or rng.choices(("steps", "save", "any time"), (0.4, 0.35, 0.25))[0]
    amount = {"steps": rng.randint(1, MOST), "save": 0, "codes": rng.randint(1, 2), "any time": rng.uniform(0, LONGEST)}
    return Strike(number, who, when, amount[when])


def make_command(out: Path, stage: str, workdir: str, assets: dict[str, str], steps: int, every: int) -> Command:
    """A run of a stage, saved every so many steps. Its pixels are few, because compiled programs are not optimised
    here."""
    keys = {"total_steps": steps, "checkpoint__every_steps": every, "data__num_workers": 2, "max_skipped_in_a_row": 2}
    faults = {"SLOW": "0.02", "SLOW_CODES": "0.5", "BAD_BATCHES": BAD}
    if stage == "robot":
        keys |= {"data__frame_codes": "ahead", "tokenizer": assets["tokenizer.json"], "batch_size": 4}
        keys |= {"vqgan": assets["vqgan"], "action_vae": assets["vae_robot"]}
    if stage == "vqgan":
        keys |= {"data__image__shortest_edge": 32, "batch_size": 2}
        del faults["BAD_BATCHES"]  # pixels are never NaN
    config = f"tests/tiny.py:{stage}"
    return Command(workdir, out / "cache", PROCESSES, faults=faults, config=config, **keys)


def run_stage(stage: str, whole: Command, struck: Command, strikes: list[Strike], tally: Tally) -> dict[str, bool]:
    """The undisturbed run, then the other one with all its strikes. Returns what is identical in both."""
    print(f"{stage}: undisturbed run", flush=True)
    with clean_end(whole, f"{stage} undisturbed", tally):
        whole.finish()
    for i, strike in enumerate(strikes, 1):
        before, name = struck.lines(), signal.Signals(strike.number).name
        with clean_end(struck, f"{stage} {i}", tally):
            status, seconds, hit = endure(struck, strike)
        print(
            f"{stage:10} {i:2}/{len(strikes)}  {name} to {strike.who:8} {strike.when:8}  "
            f"step {before:3} to {struck.lines():3}, {files_of_codes(struck):2} files of codes, "
            f"exit {status:3} after {seconds:4.1f} s  {'' if hit else 'the run had ended before'}",
            flush=True,
        )
        if not hit or status == 0:
            told = struck.log().read_text(encoding="utf-8")[-5000:]
            raise SystemExit(f"strike {i} came too late (exit status {status}): the drill needs more steps\n{told}")
        tally.counts.update((name, f"to {strike.who}", f"at {strike.when}", f"of {stage}"))
        tally.longest_exit = max(tally.longest_exit, seconds)
    with clean_end(struck, f"{stage} at last", tally):
        struck.finish()
    return compare(stage, whole, struck)


def endure(command: Command, strike: Strike) -> tuple[int, float, bool]:
    """One start with one strike. Returns (exit status, seconds from the strike to the end, whether it struck)."""
    launch = [sys.executable, "-c", LAUNCH, *command.arguments]
    with command.log().open("w", encoding="utf-8") as log:
        launcher = subprocess.Popen(launch, cwd=ROOT, env=command.environment, stdout=log, stderr=log)
    due = make_due(command, strike)
    while launcher.poll() is None:
        pids = children(launcher.pid)
        if len(pids) == PROCESSES and due():
            targets = {"both": pids, "launcher": [launcher.pid]}.get(strike.who) or [pids[int(strike.who)]]
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, strike.number)
            struck = time.monotonic()
            return launcher.wait(timeout=EXIT_SECONDS), time.monotonic() - struck, True
        time.sleep(0.2 if files.is_bucket(command.workdir) else 0.005)
    return launcher.returncode, 0.0, False


def make_due(command: Command, strike: Strike) -> Callable[[], bool]:
    """Whether it is time for the strike, as a function; the command was started just now."""
    start, wall, codes, steps = time.monotonic(), time.time(), files_of_codes(command), [0]

    def done() -> int:
        """Steps since the loop began; -1 before."""
        if len(steps) == 1 and in_the_loop(command, wall):
            steps.append(command.lines())
        return command.lines() - steps[1] if len(steps) == 2 else -1

    return {
        "steps": lambda: done() >= strike.amount,
        "save": lambda: done() >= 0 and command.saving(),
        "codes": lambda: files_of_codes(command) >= codes + strike.amount,
        "any time": lambda: time.monotonic() - start >= strike.amount or done() >= MOST,
    }[strike.when]


def in_the_loop(command: Command, since: float) -> bool:
    """Whether a start at `since` (Unix time) trains."""
    beat = command.workdir / "heartbeat.json"
    return beat.exists() and beat.stat().st_mtime > since and read_json(beat)["phase"] in IN_THE_LOOP


def files_of_codes(command: Command) -> int:
    return len(list(command.workdir.glob("codes/*/*/[!.]*.npy")))


# Processes and shared memory of a start


@contextlib.contextmanager
def clean_end(command: Command, name: str, tally: Tally) -> Iterator[None]:
    """Around one start: waits until all its processes have ended and its shared memory is given back."""
    command.environment[MARK] = mark = f"{name}, {os.getpid()}"
    before = shared_memory()
    yield
    ended = time.monotonic()
    while left := running(mark) + held_by_nobody(shared_memory() - before):
        if time.monotonic() > ended + PATIENCE:
            print(f"{name}: left after {PATIENCE:g} s: {', '.join(left)}", flush=True)
            tally.left += left
            break
        time.sleep(0.05)
    tally.longest_rest = max(tally.longest_rest, time.monotonic() - ended)


def children(pid: int) -> list[int]:
    """Process ids of the run's processes, in order; empty when the launcher has ended."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def running(mark: str) -> list[str]:
    """The living processes of a start, whoever is their parent now; those that wait to be collected have no content."""
    return [f"process {n}" for n, content in of_all_processes("environ") if f"{MARK}={mark}\0".encode() in content]


def shared_memory() -> set[str]:
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def held_by_nobody(names: set[str]) -> list[str]:
    """Those that no living process maps; the others are of other programs, or `running` counts their processes."""
    if names:
        pattern = re.compile(rb" %s/([^/\n]+?)(?: \(deleted\))?\n" % os.fsencode(SHARED_MEMORY))
        for _, content in of_all_processes("maps"):
            names = names - {os.fsdecode(name) for name in pattern.findall(content)}
    return [f"{SHARED_MEMORY}/{name}" for name in sorted(names)]


def of_all_processes(file: str) -> Iterator[tuple[int, bytes]]:
    """(process id, content of a file of /proc) of every process that may be looked at."""
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes()


# The result


def compare(stage: str, whole: Command, struck: Command) -> dict[str, bool]:
    """What is identical in both runs; codes only where the stage makes some."""
    first, second = (jax.tree.map(np.asarray, model_dir.load_params(c.workdir)[0]) for c in (whole, struck))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), first, second)
    codes, codes_again = (content(c.workdir / "codes") for c in (whole, struck))
    if (stage == "robot") != bool(codes):
        raise SystemExit(f"{stage}: the undisturbed run made {len(codes)} files of codes")
    return {
        "parameters": all(jax.tree.leaves(same)),
        **{
            name: same_file(whole, struck, f"{name}.{end}") for name, end in (("metrics", "jsonl"), ("skipped", "json"))
        },
        **({"codes": codes == codes_again} if codes else {}),
    }


def same_file(whole: Command, struck: Command, name: str) -> bool:
    """Whether a file of both work dirs is the same, or absent in both."""
    first, second = ((c.workdir / name).read_bytes() if (c.workdir / name).exists() else None for c in (whole, struck))
    return first == second


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, partial files of killed runs too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def summarise(options: argparse.Namespace, tally: Tally, seconds: float) -> int:
    """Prints the summary; returns 0 when all runs ended with the same result and left nothing."""
    same = collections.defaultdict(list)
    for found in tally.same.values():
        for what, identical in found.items():
            same[what].append(identical)
    summary = {
        **{f"{what}_identical": all(each) for what, each in same.items()},
        "left_running_or_in_shared_memory": len(tally.left),
        "strikes": options.strikes,
        **dict(sorted(tally.counts.items())),
        "longest_exit_seconds": round(tally.longest_exit, 1),
        "longest_rest_seconds": round(tally.longest_rest, 1),
        "seed": options.seed,
        "minutes": round(seconds / 60, 1),
    }
    print(json.dumps(summary))
    return 0 if not tally.left and all(map(all, same.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
