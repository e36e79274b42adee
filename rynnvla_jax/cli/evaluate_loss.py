"""`rynnvla evaluate-loss`: a checkpoint on data that it was not trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, Step, parse, step_number
from rynnvla_jax.cli.main import quiet_libraries
from rynnvla_jax.config import ConfigError

PROGRAM = "rynnvla evaluate-loss"


@dataclass(frozen=True)
class EvaluateLoss:
    """Computes the losses and action errors of a checkpoint on held-out data, as training logs them in eval.jsonl.

      rynnvla evaluate-loss runs/robot                              what the run held out
      rynnvla evaluate-loss runs/robot --source lerobot:OTHER       any other data of the same robot
      rynnvla evaluate-loss runs/robot --step 2000 --out loss.json

    Action errors are in the unit of the data, by column and by step ahead, beside those of holding still and of
    repeating the last motion. With --source, use data that the run was not trained on.
    """

    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR"), OR_BUCKET]
    """Work dir of any stage, here or in a bucket."""
    source: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND:PATH")] = ()
    """Data sets to evaluate on; by default what the run held out, or its evaluation.sources."""
    step: Step = None
    """Step to evaluate; by default the newest; "best": that of checkpoint.keep_best."""
    weights: Literal["raw", "ema"] = "raw"
    """The weights, or their average (optimizer.ema)."""
    examples: int | None = None
    """Examples to evaluate, spread evenly over the data; by default as in training."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for all numbers, as JSON."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse(EvaluateLoss, PROGRAM, argv)
    if arguments.examples is not None and arguments.examples < 1:
        raise ConfigError(f"--examples {arguments.examples} must be at least 1")

    from rynnvla_jax.storage import files
    from rynnvla_jax.train.saved_evaluation import evaluate_saved

    quiet_libraries()
    step, values = evaluate_saved(
        files.place(arguments.workdir),
        step_number(arguments.step),
        sources=arguments.source,
        examples=arguments.examples or 0,
        weights=arguments.weights,
    )
    print("\n".join(table(values)))
    if arguments.out is not None:
        files.write_text(arguments.out, json.dumps({"step": step, **values}, indent=2))
    return 0


def table(values: dict[str, float]) -> list[str]:
    """One line per loss; action errors in a table of columns and steps ahead, with a column per baseline."""
    errors = {name: value for name, value in values.items() if "_error" in name}
    lines = [f"{name:<24}{value:>12.5g}" for name, value in values.items() if name not in errors]
    kinds = [name for name in errors if "/" not in name]
    if not kinds:
        return lines
    heads = [kind.removesuffix("_error").replace("_", " ") for kind in kinds]
    lines.append(f"{'error of':<24}" + "".join(f"{head:>16}" for head in heads))
    parts = ["", *(name.partition("/")[2] for name in errors if name.startswith(f"{kinds[0]}/"))]
    for part in parts:
        cells = [errors[f"{kind}/{part}" if part else kind] for kind in kinds]
        lines.append(f"{part.replace('_', ' ') or 'all':<24}" + "".join(f"{cell:>16.5g}" for cell in cells))
    return lines
