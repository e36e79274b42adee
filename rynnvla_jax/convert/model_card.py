"""The README.md of an export on the Hugging Face Hub: what it is, where it comes from, and how well it did.

It is a function of the export and of the work dir, so that the same export gives the same bytes.

Source: huggingface.co/docs/hub/model-cards.
"""

from pathlib import Path
from typing import Any

import yaml

from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.columns import Columns, describe
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.deploy import export_format
from rynnvla_jax.recording import hertz
from rynnvla_jax.storage import files, hub

FILE = "README.md"
EVALUATED = "eval.jsonl"
_PAPER = "https://arxiv.org/abs/2509.15212"


def write(
    folder: Path, licence: str, name: str, config: TrainConfig | None = None, metrics: dict | None = None
) -> None:
    """Writes FOLDER/README.md unless there is one, which somebody may have changed.

    Args:
      licence: of the weights, by the Hub's name, such as apache-2.0; "other" where it is none of those.
      name: hf://USER/NAME, for the example.
      config: of the run that trained the model; None where that is not known.
      metrics: the line of eval.jsonl for the exported step.
    """
    if (folder / FILE).exists():
        return
    values = export_format.read_json(folder / export_format.CONFIG)
    sources = _sources(folder)
    head: dict[str, Any] = {"license": licence, "library_name": "rynnvla_jax", "tags": ["robotics", "vla", "rynnvla"]}
    head["pipeline_tag"] = "robotics"
    base = _repository(config.init_from.path) if config else None
    if base:
        head["base_model"] = base
    named = (_repository(str(source["source"]).partition(":")[2]) for source in sources)
    if data := sorted({repository for repository in named if repository}):
        head["datasets"] = data
    title = hub.parse(name).repository.partition("/")[2]
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {title}", _about(folder, values, name)]
    parts += [_table("Data", ("data set", "episodes", "steps", "rate"), [_row(source) for source in sources])]
    if metrics:
        rows: list[tuple[str, ...]] = [(key, f"{value:.6g}") for key, value in metrics.items() if key != "step"]
        parts.append(_table(f"Held-out metrics at step {metrics['step']}", ("metric", "value"), rows))
    parts.append(_origin(config, base))
    files.write_text(folder / FILE, "\n\n".join(part for part in parts if part) + "\n")


def metrics_of(workdir: Path, step: int) -> dict[str, Any] | None:
    """The held-out metrics of a work dir at a step; None where it was not evaluated then."""
    lines = files.read_log(workdir / EVALUATED)
    numbers = [line for line in lines if isinstance(line, dict) and line.get("step") == step]
    if not numbers:
        return None
    return {key: value for key, value in numbers[-1].items() if isinstance(value, int | float)}


def _about(folder: Path, values: dict[str, Any], name: str) -> str:
    if "rynnvla" not in values:
        return f"Weights of RynnVLA-001 ({_PAPER}), for transformers' ChameleonForConditionalGeneration."
    config = export_format.config_from_json(values, export_format.CONFIG)
    columns = ""
    if (folder / export_format.STATISTICS).exists():
        content = files.read_json(folder / export_format.STATISTICS)
        if "columns" in content:
            columns = f"\n- moves {describe(Columns.from_json(content['columns'], export_format.STATISTICS).action)}"
    sizes = config.vla.transformer
    return f"""A robot policy of RynnVLA-001 ({_PAPER}), trained with rynnvla_jax.

- {sizes.num_layers} layers of width {sizes.width}; {config.chunk} steps of {config.action_dim} values at a time
- cameras: {", ".join(config.cameras.by_view(config.sequence).values())}{columns}

```python
from rynnvla_jax.deploy.policy import Policy

policy = Policy.load("{name}", device="cuda")
```"""


def _sources(folder: Path) -> list[dict[str, Any]]:
    """What the last attempt of the run says of its data."""
    if not (folder / "run.json").exists():
        return []
    content = files.read_json(folder / "run.json")
    if not provenance.is_history(content):
        raise ConversionError(f"{folder / 'run.json'} is damaged; export the model again")
    return (content["attempts"] or [{}])[-1].get("sources", [])


def _row(source: dict[str, Any]) -> tuple[str, ...]:
    """Names on the Hub are links; of a path only the last part is told."""
    kind, _, path = source["source"].partition(":")
    shown = f"`{kind}:{path}`" if hub.is_name(path) else f"`{kind}:.../{Path(path).name}`"
    rates = source.get("rates", [])
    return shown, f"{source['episodes']:,}", f"{source['steps']:,}", hertz(tuple(rates)) if rates else ""


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(config: TrainConfig | None, base: str | None) -> str:
    if config is None:
        return "The licences of the base model and of the data apply."
    start = base or (Path(config.init_from.path).name if config.init_from.path else "scratch")
    rate = f"peak learning rate {config.optimizer.peak_lr:g}"
    return (
        f"## Training\n\nStage {config.stage}, from {start}: {config.total_steps} steps of {config.batch_size} examples"
        f", {rate}, seed {config.seed}. The licences of the base model and of the data apply."
    )


def _repository(path: str) -> str | None:
    return hub.parse(path).repository if hub.is_name(path) else None
