"""A measured step beside the estimated one: reads the profile of a run (`--config.profile_steps`) on a TPU.

The profiler writes one `*.xplane.pb` per host. On a TPU's plane, "XLA Modules" has an event for each execution of a
program, and "XLA Ops" one for each operation, whose name is the operation's text in the compiled program; a loop's
event lies around those of its body. Operations are sorted into the parts of `estimate` by the compiled program at
hand; those that it does not have (another version of the compiler, another setting) by their own text.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from rynnvla_jax.aot.estimate import PARTS, parts_of
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import listing, shorten

MODULES = "XLA Modules"  # the line of a plane that has the programs
STEP = "jit_update"  # the name of the train step's program, see `train.step.make_step`
COPIES, OTHER = "copies", "other"  # waiting for copies to vector memory; nothing at all, and the counters of loops
OP = re.compile(r"%?([^\s=]+)(?: = (?:\([^=]*?\)|\S+) ([\w\-]+)\((.*))?", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step on one chip, the mean over steps and chips.

    Attributes:
      known: share of the time of operations that is of operations of the compiled program.
      between: from the end of a step to the start of the next one; None for a single step.
    """

    steps: int
    chips: int
    seconds: float
    parts: dict[str, float]
    between: float | None
    known: float


@dataclass(frozen=True)
class _Event:
    name: str
    start: float  # ns
    end: float


def opened(directory: Path) -> list[ProfileData]:
    """The newest profile in a directory, one for each host.

    Args:
      directory: WORKDIR/profile, or a folder in it.

    Raises:
      ConfigError: there is no profile, it cannot be read, or it has no train step on a TPU.
    """
    files = sorted(directory.rglob("*.xplane.pb"))
    if not files:
        raise ConfigError(
            f"--against {directory} has no *.xplane.pb; give WORKDIR/profile of a run with "
            '--config.profile_steps="(10,12)"'
        )
    newest = max(files, key=lambda file: file.stat().st_mtime).parent
    profiles = []
    for file in (file for file in files if file.parent == newest):
        try:
            profiles.append(ProfileData.from_serialized_xspace(file.read_bytes()))
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--against {file} cannot be read: {shorten(error)}") from error
    _check(profiles, newest)
    return profiles


def _check(profiles: Sequence[ProfileData], where: Path) -> None:
    """Raises ConfigError when a profile, read from `where`, has no train step on a TPU."""
    programs = {e.name for p in _planes(profiles) for line in p.lines if line.name == MODULES for e in line.events}
    if not any(name.startswith(STEP) for name in programs):
        names = {plane.name for profile in profiles for plane in profile.planes}
        had = f"programs {listing(sorted(programs), 5)}" if programs else f"planes {listing(sorted(names), 5)}"
        raise ConfigError(
            f"--against {where} has no train step ({STEP}) on a TPU; it has {had}. Profile a run on a TPU with "
            '--config.profile_steps="(10,12)"'
        )


def _planes(profiles: Sequence[ProfileData]) -> list[Any]:
    """What TPUs did; other planes are of hosts."""
    return [plane for profile in profiles for plane in profile.planes if plane.name.startswith("/device:TPU:")]


def measured(profiles: Sequence[ProfileData], text: str) -> Measured:
    """The steps of a profile that has some (`opened`); `text` is the compiled program."""
    parts = parts_of(text)
    durations: list[float] = []
    gaps: list[float] = []
    spent: dict[str, float] = defaultdict(float)
    known = total = 0.0
    chips = 0
    for plane in _planes(profiles):
        lines = {line.name: [_Event(e.name, e.start_ns, e.end_ns) for e in line.events] for line in plane.lines}
        steps = sorted((e for e in lines.get(MODULES, []) if e.name.startswith(STEP)), key=lambda e: e.start)
        if not steps:  # for example a SparseCore's plane
            continue
        chips += 1
        durations += [step.end - step.start for step in steps]
        gaps += [after.start - before.end for before, after in zip(steps, steps[1:], strict=False)]
        for event, alone in _alone(lines.get("XLA Ops", [])):
            if not any(step.start <= event.start < step.end for step in steps):
                continue
            part, named = _part(event.name, parts)
            spent[part] += alone
            known, total = known + alone * named, total + alone
    count = len(durations)
    seconds = {part: spent[part] / count / 1e9 for part in (*PARTS, COPIES)}
    step = sum(durations) / count / 1e9
    seconds[OTHER] = step - sum(seconds.values())
    between = sum(gaps) / len(gaps) / 1e9 if gaps else None
    return Measured(count // chips, chips, step, seconds, between, known / total if total else 0.0)


def _alone(events: list[_Event]) -> list[tuple[_Event, float]]:
    """Each event with its duration (ns) without that of the events in it."""
    found: list[tuple[_Event, float]] = []
    around: list[int] = []  # positions in `found`, outermost first
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        while around and found[around[-1]][0].end <= event.start:
            around.pop()
        if around:
            outer, alone = found[around[-1]]
            found[around[-1]] = outer, alone - (min(event.end, outer.end) - event.start)
        around.append(len(found))
        found.append((event, event.end - event.start))
    return found


def _part(name: str, parts: dict[str, str]) -> tuple[str, bool]:
    """The part of an operation, and whether the compiled program has it."""
    found = OP.match(name)
    assert found, "the pattern matches any name"
    if found[1] in parts:
        return parts[found[1]], True
    opcode, rest = found[2] or re.sub(r"[.\d]+$", "", found[1]), found[3] or ""
    if re.match(r"(copy|slice)-(start|done)", opcode):
        return COPIES, False
    if re.match(r"while|conditional|call$", opcode):
        return OTHER, False
    if re.match(r"(send|recv)-done", opcode):
        return "between slices", False
    if any(re.match(r"all-|reduce-scatter|collective-|ragged-all|async-(start|done)", x) for x in (opcode, found[1])):
        return "collectives", False
    if "splash" in found[1]:
        return "attention", False
    products = opcode in ("convolution", "dot") or (opcode == "fusion" and "kind=kOutput" in rest)
    return "products" if products else "elementwise", False
