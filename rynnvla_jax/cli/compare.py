"""`rynnvla compare DIR ... --out PAGE.html --csv TABLE.csv`: what differs between runs, and what came of it."""

import argparse
import sys
from pathlib import Path

from rynnvla_jax.config import ConfigError
from rynnvla_jax.report import compare
from rynnvla_jax.report.page import ReportError


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="rynnvla compare",
        description="One self-contained HTML page that compares runs: the configuration keys that differ, final "
        "metrics, means over seeds with 95 %% t-intervals, curves, parallel coordinates. A directory that is no work "
        "dir, such as that of a sweep, stands for the work dirs in it. Needs no accelerator and reads no checkpoint.",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="work dirs and sweep directories")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page to write")
    parser.add_argument("--csv", type=Path, metavar="TABLE.csv", help="the table of the runs, too")
    parser.add_argument("--metric", default="", help="what colours the runs (the sweep's own, else loss)")
    parser.add_argument("--title", default="Comparison of runs", help="heading of the page (%(default)s)")
    arguments = parser.parse_args(argv)
    from rynnvla_jax.report import compare_page  # plotly: a missing package is said after a wrong argument

    try:
        for out in filter(None, (arguments.out, arguments.csv)):
            if out.is_dir():
                raise ReportError(f"{out} is a directory; name the file")
        rows, missing = compare.read(arguments.directories)
        metric = compare.main_metric(arguments.directories, rows, arguments.metric)
        compare_page.write(rows, arguments.out, title=arguments.title, metric=metric, missing=missing)
        if arguments.csv:
            compare.write_csv(rows, arguments.csv)
    except (ReportError, ConfigError, OSError) as error:
        print(f"rynnvla compare: {error}", file=sys.stderr)
        return 1
    print(*filter(None, (arguments.out, arguments.csv)), sep="\n")
    return 0
