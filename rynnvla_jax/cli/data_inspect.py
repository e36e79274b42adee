"""`rynnvla data stats | validate | show`: what a data set holds, what is wrong with it, and how it looks."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET
from rynnvla_jax.cli.data_source import parse_with_data
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import ConfigError

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]


@dataclass(frozen=True)
class Stats:
    """Prints lengths, instructions, and the statistics of every column of states and actions.

    It reads the rows of every episode but no frames. Relative actions are computed as in training, over chunks of
    --chunk steps. Several sources get one row each, followed by their differences.

      rynnvla data stats lerobot:DATA
      rynnvla data stats lerobot:ONE lerobot:TWO
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Data sets as KIND:PATH, or only PATH when its files show the kind."""
    json: bool = False
    """Print JSON."""
    chunk: int = 20
    """Steps per chunk of relative actions."""


@dataclass(frozen=True)
class Validate:
    """Reads a whole data set, decodes every frame, and lists every fault with its file and index.

    It finds rows that are out of order, missing or not finite; frames that do not match the rows or cannot be decoded;
    files that the metadata lists but that are missing, and the reverse; wrong totals; empty instructions; duplicate
    episodes; outlier actions, joints that never change, and episodes in another unit. An index counts from 0 in the
    file that is named: rows of a table, frames of a video, steps of a recording.

    Warnings also name what can be read and is probably not meant: cameras that are black, frozen, swapped or the same,
    pictures that repeat, actions equal to the state, angles that wrap, pauses, and episodes too short for a stage.

    --fix does not change the data; it writes a list of the episodes with errors. Training leaves them out with
    --config.data.exclude=OUT.json.

    The exit status is 0 without errors (there may be warnings), 1 with errors, and 2 when nothing could be read.
    """

    source: Source
    """Data set as KIND:PATH, or only PATH when its files show the kind."""
    json: bool = False
    """Print one JSON object per fault, then a summary."""
    fix: Annotated[Path | None, tyro.conf.arg(metavar="OUT.json"), OR_BUCKET] = None
    """File for the list of episodes that training should leave out."""
    stop_after: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Stop after this many errors; 0: no limit."""


@dataclass(frozen=True)
class Show:
    """Writes one self-contained HTML page that shows a data set.

    It shows the lengths of the episodes, the instructions, and, for some evenly spaced episodes, frames of every camera
    and curves of states and actions. Where only VQ codes are stored, each code is a coloured square. The exit status is
    1 when an episode cannot be shown.
    """

    source: Source
    """Data set as KIND:PATH, or only PATH when its files show the kind."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 6
    """How many episodes to show."""
    out: Annotated[Path, tyro.conf.arg(metavar="PAGE.html"), OR_BUCKET] = Path("data.html")
    """The page to write."""


def stats(argv: list[str]) -> int:
    """`rynnvla data stats`. Returns the exit status."""
    arguments, config = parse_with_data(Stats, "rynnvla data stats", argv)
    if not arguments.sources:
        raise UsageError("name at least one data set")
    from data_pipelines.inspect import summary
    from data_pipelines.sources import open_source
    from data_pipelines.sources.recognize import source_of

    found, progress = [], not arguments.json
    for text in arguments.sources:
        source = source_of(text)
        episodes = open_source(source, config, None, progress=progress)
        found.append(summary.summarise(source, episodes, arguments.chunk, progress))
    if arguments.json:
        dicts = [s.to_dict() for s in found]
        several = {"sources": dicts, "differences": summary.differences(found)}
        print(json.dumps(dicts[0] if len(dicts) == 1 else several))
    else:
        print("\n".join(summary.text(found[0], arguments.chunk) if len(found) == 1 else summary.rows(found)))
    return 0


def validate(argv: list[str]) -> int:
    """`rynnvla data validate`. Returns the exit status, which is 2 when nothing could be read."""
    arguments, config = parse_with_data(Validate, "rynnvla data validate", argv)
    from data_pipelines.episode import DataError
    from data_pipelines.inspect.validate import run
    from data_pipelines.inspect.validate.findings import Findings
    from data_pipelines.sources.recognize import source_of
    from rynnvla_jax.storage import files

    findings = Findings(arguments.stop_after)
    try:
        source = source_of(arguments.source)
        if arguments.fix and files.is_bucket(arguments.fix):
            files.check(arguments.fix, write=True)
        elif arguments.fix and not arguments.fix.parent.is_dir():
            raise ConfigError(f"--fix {arguments.fix}: the folder does not exist; create it, or give another file")
        stopped = run.validate(source, findings, config, progress=not arguments.json)
        notes = run.write_exclude(arguments.fix, source, findings) if arguments.fix else []
    except (ConfigError, DataError, OSError) as error:  # 1 is the status of a data set with errors
        raise UsageError(str(error)) from error
    for line in findings.lines_of_json() if arguments.json else findings.table():
        print(line)
    summary = findings.summary()
    if arguments.json:
        print(json.dumps({"summary": {"source": source, "complete": not stopped, **summary}}))
    else:
        print(run.closing(source, summary, stopped, arguments.stop_after))
    for line in notes:
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    return 1 if summary["errors"] else 0


def show(argv: list[str]) -> int:
    """`rynnvla data show`. Returns the exit status: 1 when an episode could not be shown."""
    program = "rynnvla data show"
    arguments, config = parse_with_data(Show, program, argv)
    from data_pipelines import sources
    from data_pipelines.inspect import show
    from data_pipelines.sources.recognize import source_of
    from rynnvla_jax.storage import files

    source = source_of(arguments.source)
    files.check(arguments.out, write=True)
    if arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is a folder; give the path of a file, such as PAGE.html")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    episodes = sources.open_source(source, config, None)
    if not episodes.views and (why := show.why_no_pictures(source, config)):
        print(f"{program}: no frames: {why}", file=sys.stderr)
    html, problems = show.page(source, episodes, arguments.episodes)
    files.write_text(arguments.out, html)
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr)
    print(f"{arguments.out} ({len(html) / 1e6:.1f} MB)")
    return 1 if problems else 0
