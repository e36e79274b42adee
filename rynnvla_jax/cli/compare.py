"""`rynnvla compare`: how runs differ in their config and in their results."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, parse
from rynnvla_jax.cli.main import UsageError


@dataclass(frozen=True)
class Compare:
    """Writes one self-contained HTML page that compares runs.

    It shows the config keys that differ and the final metrics, the best run first; which configuration beats which,
    from differences of runs of one seed with 95 % intervals; means over seeds, curves, and the metric against each key.
    Of a search it shows the best trial so far and the importance of parameters. It needs no accelerator and reads no
    checkpoint.

      rynnvla compare runs/rates --out rates.html --csv rates.csv
      rynnvla compare runs/first runs/second --out two.html --metric action_l1
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ..."), OR_BUCKET]
    """Work dirs of runs; any other directory, such as that of a sweep, means all work dirs in it; also in buckets."""
    out: Annotated[Path, tyro.conf.arg(metavar="PAGE.html")]
    """The page to write."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="TABLE.csv")] = None
    """Also write the table of the runs to this file."""
    metric: str | None = None
    """The metric that decides between the runs; by default the sweep's own, or else one of held-out data, or loss."""
    title: str = "Comparison of runs"
    """Heading of the page."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse(Compare, "rynnvla compare", argv)
    if not arguments.directories:
        raise UsageError("give at least one work dir, or the directory of a sweep")
    from rynnvla_jax.report import compare, compare_page
    from rynnvla_jax.report.page import ReportError

    written = [path for path in (arguments.out, arguments.csv) if path]
    for out in written:
        if out.is_dir():
            raise ReportError(f"{out} is a directory; give the path of a file")
    rows, missing = compare.read(arguments.directories)
    metric, decides = compare.main_metric(arguments.directories, rows, arguments.metric or "")
    print(decides, file=sys.stderr)
    found = compare.importances(arguments.directories, metric)
    # fmt: off
    compare_page.write(
        rows, arguments.out, title=arguments.title, metric=metric, decides=decides, missing=missing, importances=found
    )
    # fmt: on
    if arguments.csv:
        compare.write_csv(compare.ranked(rows, metric), arguments.csv)
    print(*written, sep="\n")
    return 0
