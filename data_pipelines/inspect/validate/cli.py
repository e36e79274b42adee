"""`rynnvla data validate SOURCE`: every fault of a data set, where training stops at the first."""

import argparse
import json
import sys
from pathlib import Path

from data_pipelines.episode import DataError
from data_pipelines.inspect.summary import column_names
from data_pipelines.inspect.validate import egodex, episodes, lerobot
from data_pipelines.inspect.validate.findings import Enough, Findings
from data_pipelines.inspect.validate.opening import open_rest
from data_pipelines.sources.command_line import add_arguments, data_config, source_of
from data_pipelines.sources.exclude import kind_and_path, left_out
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.storage import files

_DATA = DataConfig()
_DESCRIPTION = """\
Reads all of a data set, decodes every frame and lists every fault with its file and index: rows that are out of order,
missing or not finite; frames that do not match the rows or cannot be decoded; files that the metadata names and that
are absent, and the reverse; totals; empty instructions; episodes that are there twice; actions far from all others,
joints that never change, episodes in another unit.

Exit status: 0 no error (warnings at most), 1 errors, 2 nothing could be read.
"""
_EPILOG = """\
An index counts from 0 in the file that is named: rows of a table, frames of a video, steps of a recording.

--fix OUT.json leaves the data as it is and writes the episodes with errors; training leaves them out with
--config.data.exclude=OUT.json
"""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    findings = Findings(arguments.stop_after)
    try:
        source = source_of(arguments.source)
        if arguments.fix and not arguments.fix.parent.is_dir():
            raise ConfigError(f"--fix {arguments.fix}: the folder does not exist; make it, or give another file")
        stopped = validate(source, findings, data_config(arguments.data), progress=not arguments.json)
        lines = [] if not arguments.fix else _write_fix(arguments.fix, source, findings)
    except (ConfigError, DataError, OSError) as error:
        print(f"rynnvla data validate: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        for line in findings.lines_of_json():
            print(line)
    else:
        for line in findings.table():
            print(line)
    summary = findings.summary()
    if arguments.json:
        print(json.dumps({"summary": {"source": source, "complete": not stopped, **summary}}))
    else:
        print(_closing(source, summary, stopped, arguments.stop_after))
    for line in lines:
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    return 1 if summary["errors"] else 0


def validate(source: str, findings: Findings, config: DataConfig = _DATA, progress: bool = True) -> bool:
    """Fills `findings` with every fault of "KIND:PATH"; True when it stopped early at `findings.stop_after`.

    Episodes that `config.exclude` names do not count.

    Raises DataError or ConfigError when nothing can be read.
    """
    kind, _, path = source.partition(":")
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{source}: {root} does not exist; correct the path")
    findings.left_out = left_out(source, config.exclude) if config.exclude else set()
    try:
        if kind == "lerobot":
            lerobot.check(root, config, findings, progress)
        elif kind == "egodex":
            egodex.check(root, findings, progress)
        else:
            opened = open_rest(source, root, config, findings, progress)
            if opened is not None:
                names = column_names(source, opened.action_width)
                episodes.check(opened, root, names, findings, progress)
    except Enough:
        return True
    return False


def _closing(source: str, summary: dict, stopped: bool, stop_after: int) -> str:
    looked = ", ".join(f"{n:,} {what}" for what, n in summary["looked_at"].items())
    found = f"{summary['errors']} error{'s' * (summary['errors'] != 1)}"
    found += f", {summary['warnings']} warning{'s' * (summary['warnings'] != 1)}"
    head = "\n" if summary["checks"] else ""
    if stopped:
        return f"{head}{source}: stopped at error {stop_after}; so far {found} ({looked})"
    return f"{head}{source}: {found} ({looked})"


def _write_fix(out: Path, source: str, findings: Findings) -> list[str]:
    """Writes the exclude file; lines that say what it does and what it cannot do."""
    kind, path = kind_and_path(source)  # the same file must do from another folder
    content, rest = findings.exclude(f"{kind}:{path}")
    files.write_json(out, content)
    bad = len(content["episodes"][f"{kind}:{path}"]) - len(findings.left_out)
    total = findings.looked_at["episodes"]
    lines = [f"{out}: {bad} of {total} episodes have errors; train with --config.data.exclude={out}"]
    if total and bad >= total:
        lines.append("  that is every episode: nothing is left to train on")
    lines += [f"  not mended by leaving episodes out: {f.line()}" for f in rest]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rynnvla data validate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a finding, then a summary")
    parser.add_argument("--fix", metavar="OUT.json", type=Path, help="write the list of episodes to leave out")
    parser.add_argument("--stop_after", metavar="N", type=int, default=0, help="stop at the N-th error")
    return parser
