"""`rynnvla checkpoint list | verify | restore-shape | base`: reads checkpoints on any machine, without JAX."""

import contextlib
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, Step, parse, step_number
from rynnvla_jax.cli.main import Command, dispatch
from rynnvla_jax.storage import files

_ABOUT = "WORKDIR is the work dir of a training run or any other model directory. No command needs an accelerator.\n"
COMMANDS = {
    "list": Command("list steps with size, date and state", __name__, function="list_steps"),
    "verify": Command("read everything and compare with what was saved", __name__, function="verify"),
    "restore-shape": Command("list shape and dtype of every array", __name__, function="restore_shape"),
    "base": Command("tell where the weights are that a run did not train", __name__, function="base"),
}
Directory = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR"), OR_BUCKET]


@dataclass(frozen=True)
class List:
    """Prints one line per step: size on disk, date, state, and how many batches the run had skipped by then.

    The states are

      verified         read back after the save; every array has the fingerprint that the devices computed
      unverified       not read back yet, or the run was killed before that; run `rynnvla checkpoint verify`
      no fingerprints  an import, a frozen model, or saved by an older version: there is nothing to compare with
      damaged          moved to checkpoints/damaged; training does not use it, and nothing deletes it

    The best step by checkpoint.keep_best is marked; --step best names it in every command that has --step.
    """

    workdir: Directory
    """Work dir or model directory, here or in a bucket."""


@dataclass(frozen=True)
class Verify:
    """Reads every value of every step, or of --step, and compares it with the fingerprints computed at the save.

    Memory stays under about 0.3 GB. Without fingerprints it only checks that all values can be read and are finite.
    When anything is wrong it names the arrays, and the exit status is 1.

    A damaged step loses its mark "verified", so that training skips it at the next start.
    """

    workdir: Directory
    """Work dir or model directory, here or in a bucket."""
    step: Step = None
    """Verify this step only; "best": that of checkpoint.keep_best."""


@dataclass(frozen=True)
class RestoreShape:
    """Lists path, shape, dtype and bytes of every array of a step, from metadata alone: no values are read.

    These are the shapes to restore onto; they do not depend on how the run that saved them sharded its arrays.
    """

    workdir: Directory
    """Work dir or model directory, here or in a bucket."""
    step: Step = None
    """Step to read; by default the newest; "best": that of checkpoint.keep_best."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Base:
    """Tells where the weights are that a run with config.finetune did not train, and whether they are still the same.

    Such a run stores what trains; whatever reads it takes the other weights from there. With --path, DIR becomes the
    place where they are looked for, if its weights are those of the run.
    """

    workdir: Directory
    """Work dir, here or in a bucket."""
    path: Annotated[Path | None, OR_BUCKET] = None
    """Model directory or work dir with the weights, where they have moved."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    return dispatch("rynnvla checkpoint", COMMANDS, argv, _ABOUT)


def list_steps(argv: list[str]) -> int:
    """`rynnvla checkpoint list`. Returns the exit status."""
    arguments = parse(List, "rynnvla checkpoint list", argv)

    from rynnvla_jax.checkpoint import reader

    directory = arguments.workdir
    best = None
    with contextlib.suppress(reader.CheckpointError):  # its line says it
        best = reader.best_step(directory)
    rows = [_row(reader.step_folder(directory, step)) for step in reader.readable_steps(directory)]
    rows += [_row(folder, "damaged") for folder in reader.damaged(directory)]
    if not rows:
        reader.find_step(directory)  # says what it looked for
    print(f"{'step':>10}  {'size':>10}  {'date':<16}  {'state':<15}  skipped batches")
    for name, size, date, state, skipped in rows:
        state += ", best" if name == str(best) and state != "damaged" else ""
        print(f"{name:>10}  {_size(size):>10}  {date:<16}  {state:<15}  {skipped}")
    return 0


def _row(folder: Path, state: str = "") -> tuple[str, int, str, str, str]:
    from rynnvla_jax.checkpoint import reader

    found = [stat for _, stat in files.walk(folder)]
    date = datetime.datetime.fromtimestamp(max((f.st_mtime for f in found), default=folder.stat().st_mtime))
    if not state:
        known = (folder / "fingerprints").exists()
        state = "verified" if reader.is_marked(folder) else "unverified" if known else "no fingerprints"
    try:
        data = reader.read_json(folder, "data")
        skipped = "" if data is None else str(len(data.get("skipped", ())))
    except reader.CheckpointError as error:
        skipped = f"? ({error})"
    return folder.name, sum(f.st_size for f in found), f"{date:%Y-%m-%d %H:%M}", state, skipped


def verify(argv: list[str]) -> int:
    """`rynnvla checkpoint verify`. Returns the exit status."""
    arguments = parse(Verify, "rynnvla checkpoint verify", argv)

    from rynnvla_jax.checkpoint import reader
    from rynnvla_jax.progress import progress_bar

    directory, bad = arguments.workdir, 0
    newest = reader.find_step(directory, step_number(arguments.step))
    for step in reader.readable_steps(directory) if arguments.step is None else [newest]:
        folder = reader.step_folder(directory, step)
        with progress_bar(total=_bytes(folder), desc=f"step {step}", unit="B", scale=True, leave=False) as bar:
            problems = reader.verify(folder, progress=bar.update)
        if not problems:
            known = (folder / "fingerprints").exists()
            print(f"step {step}: {'intact' if known else 'no fingerprints; all values can be read and are finite'}")
            continue
        bad += 1
        print(f"step {step}: damaged")
        for problem in problems:
            print(f"  {problem}")
        if reader.is_marked(folder):
            reader.unmark(folder)
            print('  the mark "verified" was removed')
    if bad:
        raise reader.CheckpointError(f"{bad} damaged in {directory}")
    return 0


def _bytes(folder: Path) -> int | None:
    """Bytes of all arrays; None when the metadata cannot be read, which the verification then reports."""
    from rynnvla_jax.checkpoint import reader

    try:
        return sum(array.nbytes for array in reader.open_step(folder).values())
    except (reader.CheckpointError, ValueError):
        return None


def restore_shape(argv: list[str]) -> int:
    """`rynnvla checkpoint restore-shape`. Returns the exit status."""
    arguments = parse(RestoreShape, "rynnvla checkpoint restore-shape", argv)

    from rynnvla_jax.checkpoint import reader
    from rynnvla_jax.errors import shorten

    directory = arguments.workdir
    step = reader.find_step(directory, step_number(arguments.step))
    arrays: dict[str, dict[str, Any]] = {}
    for path, array in sorted(reader.open_step(reader.step_folder(directory, step)).items()):
        try:
            arrays[path] = {"shape": list(array.shape), "dtype": array.dtype.name, "bytes": array.nbytes}
        except ValueError as error:
            text = f"step {step}: the metadata of {path} cannot be read: {shorten(error)}"
            raise reader.CheckpointError(text) from None
    totals = {}
    for item in reader.ITEMS:
        own = [a for path, a in arrays.items() if path.startswith(f"{item}.")]
        if own:
            values = sum(math.prod(a["shape"]) for a in own)
            totals[item] = {"arrays": len(own), "values": values, "bytes": sum(a["bytes"] for a in own)}
    if arguments.json:
        print(json.dumps({"step": step, "arrays": arrays, "totals": totals}, indent=2))
        return 0
    width = max(map(len, arrays))
    for path, a in arrays.items():
        print(f"{path:<{width}}  {a['dtype']:<9} {_size(a['bytes']):>10}  {tuple(a['shape'])}")
    for item, t in totals.items():
        print(f"step {step} {item}: {t['arrays']} arrays, {t['values']:,} values, {_size(t['bytes'])}")
    return 0


def base(argv: list[str]) -> int:
    """`rynnvla checkpoint base`. Returns the exit status."""
    arguments = parse(Base, "rynnvla checkpoint base", argv)

    from rynnvla_jax.checkpoint import base as base_lib
    from rynnvla_jax.checkpoint import reader

    directory = files.place(arguments.workdir)
    newest = reader.find_step(directory)
    base = base_lib.of_step(reader.step_folder(directory, newest))
    if base is None:
        raise reader.CheckpointError(f"{directory} trained all its weights, so there is no base")
    path = base_lib.path_of(directory) if arguments.path is None else files.place(arguments.path)
    arrays = base_lib.opened(base, path, directory)
    if arguments.path is not None:
        base_lib.record_path(directory, path)
    size = sum(math.prod(array.shape) for array in arrays.values())
    print(f"{directory} takes {len(arrays)} arrays, {size:,} values, from step {base.step} of {path}: unchanged")
    return 0


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
