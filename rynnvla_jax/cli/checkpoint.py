"""`rynnvla checkpoint list | verify | restore-shape`: reads checkpoints without JAX, so on any machine."""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from rynnvla_jax.checkpoint import reader
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.errors import shorten
from rynnvla_jax.progress import progress_bar

_DESCRIPTION = """\
Looks at the checkpoints of a training work dir or any other model directory. Needs no accelerator.
"""
_LIST = """\
One line a step: size on disk, date, state, and how many batches the run had skipped by then. States:

  verified         read back after the save; every array had the fingerprint that the devices computed
  unverified       not read back yet, or the run was killed before it was; `verify` tells
  no fingerprints  an import, a frozen model or an older version's: nothing to compare with
  damaged          set aside in checkpoints/damaged; training does not use it, and nothing deletes it
"""
_VERIFY = """\
Reads every value of every step (or of --step) and compares with the fingerprints that the devices computed at the
save; memory stays under about 0.3 GB. Without fingerprints, that everything can be read and is finite is all that is
checked. The exit status is 1 when anything is wrong; the arrays are named.

A step with damage loses its mark "verified", so that training passes over it at the next start.
"""
_SHAPE = """\
Lists path, shape, dtype and bytes of every array of a step, from metadata alone: no values are read. These are the
shapes to restore onto; how the run that saved them had cut them does not matter.
"""


def main(argv: list[str]) -> int:
    """Runs one sub-command. Returns the exit status; expected errors are one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (CheckpointError, OSError) as error:
        print(f"rynnvla checkpoint {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rynnvla checkpoint", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, help_, description in (
        ("list", _list, "steps, sizes, dates, states", _LIST),
        ("verify", _verify, "read everything and compare with what was saved", _VERIFY),
        ("restore-shape", _restore_shape, "every array's shape and dtype", _SHAPE),
    ):
        one = commands.add_parser(
            name, help=help_, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        one.set_defaults(run=run)
        one.add_argument("directory", metavar="DIR", type=epath.Path, help="work dir or model directory")
        if name == "verify":
            one.add_argument("--step", type=int, help="only this one")
        if name == "restore-shape":
            one.add_argument("--step", type=int, default=-1, help="the newest by default")
            one.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    directory = arguments.directory
    rows = [_row(reader.step_folder(directory, step)) for step in reader.steps(directory)]
    rows += [_row(folder, "damaged") for folder in reader.damaged(directory)]
    if not rows:
        reader.find_step(directory)  # says what it looked for
    print(f"{'step':>10}  {'size':>10}  {'date':<16}  {'state':<15}  skipped batches")
    for name, size, date, state, skipped in rows:
        print(f"{name:>10}  {_size(size):>10}  {date:<16}  {state:<15}  {skipped}")
    return 0


def _row(folder: epath.Path, state: str = "") -> tuple[str, int, str, str, str]:
    files = [*_files(folder)]
    date = datetime.datetime.fromtimestamp(max((f.mtime for f in files), default=folder.stat().mtime))
    if not state:
        known = (folder / "fingerprints").exists()
        state = "verified" if reader.is_marked(folder) else "unverified" if known else "no fingerprints"
    try:
        data = reader.read_json(folder, "data")
        skipped = "" if data is None else str(len(data.get("skipped", ())))
    except CheckpointError as error:
        skipped = f"? ({error})"
    return folder.name, sum(f.length for f in files), f"{date:%Y-%m-%d %H:%M}", state, skipped


def _files(folder: epath.Path) -> Iterator[Any]:
    """`stat` of all files below a folder."""
    for path in folder.iterdir():
        stat = path.stat()
        if stat.is_directory:
            yield from _files(path)
        else:
            yield stat


def _verify(arguments: argparse.Namespace) -> int:
    directory, bad = arguments.directory, 0
    newest = reader.find_step(directory, -1 if arguments.step is None else arguments.step)
    for step in reader.steps(directory) if arguments.step is None else [newest]:
        folder = reader.step_folder(directory, step)
        with progress_bar(total=_bytes(folder), desc=f"step {step}", unit="B", scale=True, leave=False) as bar:
            problems = reader.verify(folder, progress=bar.update)
        if not problems:
            known = (folder / "fingerprints").exists()
            print(f"step {step}: {'intact' if known else 'no fingerprints: everything can be read and is finite'}")
            continue
        bad += 1
        print(f"step {step}: damaged")
        for problem in problems:
            print(f"  {problem}")
        if reader.is_marked(folder):
            reader.unmark(folder)
            print('  the mark "verified" was removed')
    if bad:
        print(f"rynnvla checkpoint verify: {bad} damaged in {directory}", file=sys.stderr)
    return 1 if bad else 0


def _bytes(folder: epath.Path) -> int | None:
    """Bytes of all arrays; None when the metadata does not tell, which the verification then says."""
    try:
        return sum(array.nbytes for array in reader.open_step(folder).values())
    except (CheckpointError, ValueError):
        return None


def _restore_shape(arguments: argparse.Namespace) -> int:
    step = reader.find_step(arguments.directory, arguments.step)
    arrays: dict[str, dict[str, Any]] = {}
    for path, array in sorted(reader.open_step(reader.step_folder(arguments.directory, step)).items()):
        try:
            arrays[path] = {"shape": list(array.shape), "dtype": array.dtype.name, "bytes": array.nbytes}
        except ValueError as error:
            raise CheckpointError(f"step {step}: the metadata of {path} cannot be read: {shorten(error)}") from None
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


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
