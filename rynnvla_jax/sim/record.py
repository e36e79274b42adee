"""Expert demonstrations of one task as a LeRobot v3.0 data set, or human hands in EgoDex's layout."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from rynnvla_jax.progress import progress_bar
from rynnvla_jax.sim import gl
from rynnvla_jax.sim.recordings import Recording
from rynnvla_jax.sim.worker_pool import lock, processes
from rynnvla_jax.storage import files

SEEDS = 1_000_000  # attempts of one --seed
_ASIDE = ".recording"  # episodes that are not yet in the data set
_DONE = ".recorded"  # the same, about to be removed


class RecordError(RuntimeError):
    """A recording cannot be made; the message says why and what to do."""


def record(recording: Recording, episodes: int, out: Path, workers: int) -> None:
    """Records into `out`, or continues. Raises RecordError, WorkError, FetchError, RenderingError."""
    aside, how = out / _ASIDE, out / "meta" / "recording.json"
    recording.prepare()
    gl.check()
    wanted = dataclasses.asdict(recording)
    shutil.rmtree(out / _DONE, ignore_errors=True)
    if how.exists() and not aside.exists():
        done = files.read_json(how)
        if {name: done.get(name) for name in wanted} != wanted:
            raise RecordError(f"{out} contains another recording (see meta/recording.json); choose another --out")
        if (there := len(done["episode_seeds"])) != episodes:
            raise RecordError(
                f"{out} is finished with {there} episodes of this recording, and their number cannot change; choose "
                f"another --out for {episodes}"
            )
        print(f"{out}: all {episodes} episodes are already recorded")
        return
    if out.exists() and files.contents(out) and not aside.exists():
        raise RecordError(f"{out} is not empty; choose another --out")
    aside.mkdir(parents=True, exist_ok=True)
    locked = (aside / "lock").open("w", encoding="utf-8")
    lock(locked, f"recording into {out}")
    _same(wanted, aside / "recording.json", out)
    files.remove_partial(aside)
    known = _outcomes(aside)
    print(
        f"Recording {recording.title} of {recording.task}, {recording.scenario}: {episodes} episodes "
        f"({recording.size} pixels, {recording.fps} Hz{recording.describe()}, seed {recording.seed}, "
        f"{'fixed' if recording.fixed_look else 'varied'} look) in {out}\n"
        f"{workers} worker{'s' * (workers > 1)}, rendered with {gl.backend()}"
        + (f"; {sum(o['success'] for o in known.values())} of {episodes} are already recorded" if known else ""),
        flush=True,
    )
    known = _attempt_all(recording, episodes, aside, known, workers)
    good = [i for i in sorted(known) if known[i]["success"]][:episodes]
    failed = good[-1] + 1 - len(good)
    folders = [_folder(aside, i) for i in good]
    texts = [known[i]["instruction"] for i in good]
    seeds = {"episode_seeds": [recording.seed * SEEDS + i for i in good], "failed_attempts": failed}
    how.parent.mkdir(exist_ok=True)
    files.write_json(how, {**wanted, **seeds, **recording.notes})
    with files.naming(out):
        recording.assemble(folders, texts, out)
    os.rename(aside, out / _DONE)  # at once: a half of it would look like an unfinished recording
    shutil.rmtree(out / _DONE)
    frames = sum(known[i]["frames"] for i in good)
    print(
        f"{out}: episodes {episodes}, frames {frames}, instructions {len(set(texts))}, unit {recording.unit}; "
        f"{failed} of {good[-1] + 1} attempts failed and were left out",
        flush=True,
    )


def _attempt_all(recording: Recording, episodes: int, aside: Path, known: dict[int, dict], workers: int) -> dict:
    """Runs attempts 0, 1, ... until `episodes` have succeeded.

    A further attempt is started only if the running ones would not be enough, so the set of attempts does not depend on
    the number of workers.
    """
    known = dict(known)
    good = sum(o["success"] for o in known.values())
    upcoming = max(known, default=-1) + 1
    gaps = sorted(set(range(upcoming)) - set(known))  # were under way when it was interrupted
    running: dict[Future, int] = {}
    bar = progress_bar(
        total=episodes,
        initial=good,
        desc=f"{recording.task} {recording.scenario}",
        unit="episode",
    )
    with processes(workers) as pool, bar:
        while True:
            while len(running) < 2 * workers and (gaps or good + len(running) < episodes):
                attempt = gaps.pop(0) if gaps else upcoming
                upcoming = max(upcoming, attempt + 1)
                running[pool.submit(_attempt, recording, attempt, aside)] = attempt
            if not running:
                return known
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = known[running.pop(future)] = future.result()
                good += outcome["success"]
                bar.update(int(outcome["success"]))
            failed = len(known) - good
            bar.set_postfix(failed=failed, refresh=False)
            if failed > 20 + episodes:
                raise RecordError(f"the expert failed in {failed} of {len(known)} attempts; {recording.remedy}")


def _attempt(recording: Recording, attempt: int, aside: Path) -> dict:
    """Runs one attempt, written atomically, and returns its outcome."""
    with files.replacing(_folder(aside, attempt)) as part:
        part.mkdir()
        outcome = recording.attempt(recording.seed * SEEDS + attempt, part)
        if not outcome["success"]:
            for file in part.iterdir():
                file.unlink()
        files.write_text(part / "outcome.json", json.dumps(outcome))
    return outcome


def _outcomes(aside: Path) -> dict[int, dict]:
    return {int(file.parent.name): files.read_json(file) for file in sorted(aside.glob("[0-9]*/outcome.json"))}


def _folder(aside: Path, attempt: int) -> Path:
    return aside / f"{attempt:06d}"


def _same(wanted: dict, file: Path, out: Path) -> None:
    """Stores the settings of a recording, or checks that an unfinished one has the same settings."""
    if not file.exists():
        files.write_text(file, json.dumps(wanted))
        return
    there = files.read_json(file)
    for name, value in wanted.items():
        if there.get(name) != value:
            raise RecordError(
                f"{out} contains an unfinished recording with {name} {there.get(name)}, not {value}; "
                "repeat its command, or choose another --out"
            )
