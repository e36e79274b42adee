"""Kills at system calls, `python -m tests.injection`: no state may be lost, whatever call a kill comes before.

strace kills a command on entry to each write, rename, unlink, mkdir, link and truncate by which it changes a file or a
folder; where names are random, at some of those of each kind. Then the same command runs again, undisturbed, and must
end with what an undisturbed run writes, byte for byte (of checkpoints: every value; times and random names are left
out).

Each attempt is a fork of a process that has imported everything, so that it takes seconds. Prints one line per command
and per lost state, and a JSON summary; exits with status 1 when a state was lost. Needs Linux and strace.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=1")

import jax

from rynnvla_jax.checkpoint import reader
from rynnvla_jax.cli.main import main as rynnvla
from rynnvla_jax.progress import progress_bar
from tests import ROOT, recordings, sweeping, tiny

CALLS = (
    *("write", "pwrite64", "writev", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *("mkdir", "mkdirat", "link", "linkat", "ftruncate", "truncate"),
)
LIMIT = 300  # seconds for one run
ANY_TRACER = 0x59616D61  # PR_SET_PTRACER: where Yama is on, only an ancestor may trace otherwise
# Not compared: times, what processes said of themselves, and leftovers that no reader looks at.
LEFT_OUT = re.compile(
    r"lease\.json|(.*/)?\.[^/]+\.partial(/.*)?|heartbeat\.json|timing\.jsonl|tensorboard/.*|assets/(run|machine)\.json|status\.jsonl|lock|.*\.log|logs/.*"
    r"|.*/attempts\.jsonl|.*\.html|.*\.png"
)
STEP = re.compile(r"checkpoints/\d+/")
RANDOM = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?=\.partial)|(?<=tmp-)\d+|(?<=timestamp-)\d+")


@dataclass(frozen=True)
class Command:
    """One command, with the modules that it imports."""

    run: Callable[[Path, Path], int]  # (root with the assets, folder) -> exit status
    modules: tuple[str, ...] = ()


def train(root: Path, out: Path) -> int:
    """Codes made ahead, then four steps with two saves."""
    from rynnvla_jax.train.loop import train as run

    given = {"action_vae": str(root / "vae_hand"), "vqgan": str(root / "vqgan"), "data.frame_codes": "ahead"}
    given |= {"tokenizer": str(root / "tokenizer.json"), "total_steps": 4, "checkpoint.every_steps": 2}
    given |= {"data.num_threads": 0, "data.image.shortest_edge": 32, "data.image.fit": "square"}
    run(tiny.typed(tiny.config("trajectory", f"egodex:{root / 'egodex'}", **given)), out)
    return 0


def tokenize(root: Path, out: Path) -> int:
    words = [
        "--source",
        f"egodex:{root / 'egodex'}",
        "--vqgan",
        str(root / "vqgan"),
        "--out",
        str(out),
        "--stride",
        "2",
    ]
    image = ["--stride", "2", "--config.data.image.shortest_edge=32", "--config.data.image.fit=square"]
    return rynnvla(["data", "tokenize", *words, *image])


def record(root: Path, out: Path) -> int:
    words = ["--task", "block", "--episodes", "2", "--size", "32", "--workers", "1", "--out", str(out)]
    return rynnvla(["record", *words])


def evaluate(root: Path, out: Path) -> int:
    words = ["--policy", "random", "--task", "block", "--scenario", "single", "--episodes", "2", "--workers", "1"]
    words += ["--size", "32", "--videos", "1", "--try-seconds", "1", "--tries", "1", "--fixed-look"]
    return rynnvla(["evaluate", *words, "--out", str(out)])


def sweep(root: Path, out: Path) -> int:
    """With a stand-in for training, see `tests.sweeping`; the points' own folders are the stand-in's."""
    os.chdir(ROOT)
    config = sweeping.write_config(root / "sweep.py", hyper="h.sweep('optimizer.peak_lr', [1e-3, 2e-3])")
    return sweeping.sweep(["--config", config, "--out", str(out), "--config.total_steps=3", "--parallel", "1"])


COMMANDS = {
    "train": Command(train, ("rynnvla_jax.train.loop",)),
    "tokenize": Command(tokenize, ("rynnvla_jax.cli.data_tokenize", "rynnvla_jax.inference.tokenize")),
    "record": Command(record, ("rynnvla_jax.cli.record", "rynnvla_jax.sim.record")),
    "evaluate": Command(evaluate, ("rynnvla_jax.cli.evaluate", "rynnvla_jax.sim.evaluate")),
    "sweep": Command(sweep, ("rynnvla_jax.sweep.run", "rynnvla_jax.sweep.check")),
}


@dataclass(frozen=True)
class Kill:
    """On entry to the `number`-th such call of a thread; with a path, only calls that concern it are counted."""

    call: str
    number: int
    path: str = ""  # as of the folder


# One attempt


@contextlib.contextmanager
def forked(work: Callable[[], int], log: Path):
    """A forked process that does `work` once the yielded function has been called, with its output in `log`."""
    waiting, go = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(go)
            ctypes.CDLL(None).prctl(ANY_TRACER, ctypes.c_ulong(-1), 0, 0, 0)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1), os.dup2(output, 2)
            os.read(waiting, 1)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(waiting)
    try:
        yield pid, lambda: os.write(go, b"x")
    finally:
        os.close(go)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # its workers, too


def attempt(work: Callable[[], int], log: Path, trace: Path | None = None, options: Sequence[str] = ()) -> int:
    """Does `work` in a forked process, under strace if there is a file for its lines. Returns the wait status."""
    with forked(work, log) as (pid, go):
        tracer = None
        if trace:
            shown = ["--quiet=attach,exit,path-resolution,personality", "--signal=none", f"--trace={','.join(CALLS)}"]
            command = ["strace", "-f", "-y", "-s", "0", *shown, *options, "-o", str(trace), "-p", str(pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8"):
                if tracer.poll() is not None:
                    raise SystemExit(f"strace cannot trace: {tracer.communicate()[1]}")
                time.sleep(0.01)
        go()
        began = time.monotonic()
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - began > LIMIT:
                os.kill(pid, signal.SIGKILL)
                print(f"it had not ended after {LIMIT} s: {log}", flush=True)
            time.sleep(0.02)
    if tracer:
        tracer.communicate()
    return ended[1]


def calls(trace: Path, folder: Path) -> list[tuple[str, int, str]]:
    """(system call, its number in its thread from 1, what it changes) of the calls that change `folder`."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.match(r"(\d+) +(\w+)\((.*)", line):
            thread, call, arguments = match.groups()
            counts[thread, call] += 1
            if (place := arguments.find(str(folder))) >= 0:
                path = re.split(r'[">]', arguments[place:])[0].removeprefix(str(folder)).removeprefix("/")
                found.append((call, counts[thread, call], RANDOM.sub("*", path)))
    return found


def content(folder: Path) -> dict[str, str]:
    """What must be the same: SHA-256 of files, and of checkpoints the fingerprints of what is really on the disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not LEFT_OUT.fullmatch(name) and not STEP.search(f"{name}/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and re.fullmatch(r"(.*/)?checkpoints/\d+", name) and (path / "params").exists():
            report = reader.read_back(path)
            problems = reader.judge(path, [report])
            data = (path / "data" / "metadata").read_text(encoding="utf-8") if (path / "data").exists() else ""
            found[name] = json.dumps([sorted(report["sums"].items()), problems, data])
    return found


# The attempts of one command


class Trial:
    """All kills of one command, in a folder of its own."""

    def __init__(self, name: str, root: Path, of_each: int):
        self.name, self.command, self.root, self.of_each = name, COMMANDS[name], root, of_each
        self.folder = root / name / "out"  # the same path in every attempt: it is part of some contents
        self.log = root / name / "log.txt"
        self.folder.parent.mkdir(parents=True)
        self.tried: Counter[str] = Counter()  # by system call
        self.places: set[tuple[str, str]] = set()  # (system call, what it would have changed)
        self.lost: list[str] = []

    def run(self, **traced) -> int:
        return attempt(lambda: self.command.run(self.root, self.folder), self.log, **traced)

    def result(self) -> dict[str, str]:
        """The folder's content, computed in a process of its own, as libraries that do it start threads."""
        file = self.root / self.name / "content.json"
        work = lambda: int(not file.write_text(json.dumps(content(self.folder)), encoding="utf-8"))  # noqa: E731
        assert attempt(work, self.log) == 0, self.log
        return json.loads(file.read_text(encoding="utf-8"))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def all(self) -> None:
        trace = self.root / self.name / "trace.txt"
        assert self.run() == 0, f"the undisturbed run fails: {self.log.read_text(encoding='utf-8')[-3000:]}"
        whole = self.result()
        self.clear()
        assert self.run(trace=trace) == 0, self.log
        assert self.result() == whole, f"two undisturbed runs differ: {differences(whole, self.result())}"
        found = calls(trace, self.folder)
        todo = chosen(found, self.of_each)
        every = {(call, what) for call, _, what in found}
        print(f"{self.name}: {len(found)} changes of its folder, {len(todo)} kills", flush=True)
        with progress_bar(total=len(todo), desc=self.name, unit="kill") as bar:
            for kill in todo:
                self.one(whole, trace, kill)
                bar.update()
        missed = len(every - self.places)
        print(
            f"{self.name}: {sum(self.tried.values())} kills ({dict(self.tried)}), lost {len(self.lost)}; "
            f"{len(every & self.places)} of {len(every)} kinds of changes were hit, {missed} were not",
            flush=True,
        )

    def one(self, whole: dict[str, str], trace: Path, kill: Kill) -> None:
        """One kill, the same command again, and the comparison."""
        self.clear()
        options = [f"--inject={kill.call}:signal=KILL:when={kill.number}"]
        if kill.path:
            options += ["-P", str(self.folder / kill.path)]
        if self.run(trace=trace, options=options) == 0:  # threads took turns differently: none came so far this time
            return
        self.tried[kill.call] += 1
        hit = [what for call, number, what in calls(trace, self.folder) if (call, number) == (kill.call, kill.number)]
        self.places.add((kill.call, kill.path or (hit or [""])[-1]))
        told = f"{self.name}: {kill.call} number {kill.number} ({kill.path or hit})"
        before = self.log.read_text(encoding="utf-8")
        again = self.run()
        if again and "are still running" in self.log.read_text(encoding="utf-8"):  # runs of a killed sweep
            time.sleep(5)
            again = self.run()
        said = self.log.read_text(encoding="utf-8").removeprefix(before)
        if again:
            self.lost.append(told)
            print(f"LOST {told}: the same command ends with {again}: {said[-1500:]}", flush=True)
        elif (result := self.result()) != whole:
            self.lost.append(told)
            print(f"LOST {told}: another result: {differences(whole, result)}", flush=True)
        elif "Traceback" in said:
            self.lost.append(told)
            print(f"LOST {told}: the same command prints a traceback: {said[-1500:]}", flush=True)


def chosen(found: list[tuple[str, int, str]], of_each: int) -> list[Kill]:
    """Every call with its path, where no name in it is random; of the others at most `of_each` of every kind."""
    kinds: dict[tuple[str, str], set[int]] = {}
    for call, number, what in found:
        kinds.setdefault((call, what if "*" not in what else re.sub(r"\d+", "0", what)), set()).add(number)
    todo = []
    for (call, what), numbers in sorted(kinds.items()):
        if "*" not in what:
            todo.append(Kill(call, 1, what))
            continue
        ordered, step = sorted(numbers), max(1.0, (len(numbers) - 1) / max(1, of_each - 1))
        todo += [Kill(call, ordered[round(i * step)]) for i in range(min(of_each, len(ordered)))]
    return list(dict.fromkeys(todo))


def differences(whole: dict[str, str], result: dict[str, str]) -> list[str]:
    return [
        f"{'missing' if name not in result else 'new' if name not in whole else 'different'}: {name}"
        for name in sorted({*whole, *result})
        if whole.get(name) != result.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.injection", description=__doc__.split("\n")[0])
    parser.add_argument("--commands", default=",".join(COMMANDS), help="separated by commas")
    parser.add_argument("--of-each", type=int, default=10, help="kills at like calls for files with random names")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "injection", help="emptied first")
    options = parser.parse_args()
    if not shutil.which("strace"):
        raise SystemExit("this needs strace: apt install strace")
    root = options.out.absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    began, trials = time.monotonic(), []
    for name in ("0", "1"):
        recordings.write_egodex(root / "egodex", count=20, name=name)
    assert attempt(lambda: int(not tiny.assets(root)), root / "assets.log") == 0, root / "assets.log"
    for name in options.commands.split(","):
        for module in COMMANDS[name].modules:
            importlib.import_module(module)
        trials.append(Trial(name, root, options.of_each))
        trials[-1].all()
    summary = {
        "injections": sum(sum(t.tried.values()) for t in trials),
        "states_lost": sum(len(t.lost) for t in trials),
        "by_command": {t.name: sum(t.tried.values()) for t in trials},
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(summary))
    return int(summary["states_lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
