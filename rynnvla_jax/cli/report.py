"""`rynnvla report`: one self-contained page about one or several training runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, Step, parse, step_number
from rynnvla_jax.cli.main import UsageError, quiet_libraries


@dataclass(frozen=True)
class Report:
    """Writes one self-contained HTML page about training runs, finished or running.

    It shows curves and numbers, and predicted next to recorded frames and actions. The predictions are made with the
    newest checkpoint, or that of --step, on examples of the run's own data, so run the command in the directory where
    training was started.

      rynnvla report runs/video runs/robot --out report.html
    """

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR ..."), OR_BUCKET]
    """Work dirs of `rynnvla train`, here or in buckets, in any order."""
    out: Annotated[Path, tyro.conf.arg(metavar="PAGE.html")]
    """The page to write."""
    title: str = "Training report"
    """Heading of the page."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights that predict: as trained, or their average (optimizer.ema)."""
    step: Step = None
    """Checkpoint step that predicts; by default the newest; "best": that of checkpoint.keep_best."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse(Report, "rynnvla report", argv)
    if not arguments.workdirs:
        raise UsageError("give at least one work dir")

    from rynnvla_jax.report.page import write_report

    quiet_libraries()
    step = step_number(arguments.step)
    print(write_report(arguments.workdirs, arguments.out, title=arguments.title, weights=arguments.weights, step=step))
    return 0
