"""One self-contained page about one or several training runs.

Shows the logged metrics of each run, and results of its newest weights on a few fixed examples of its own data.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rynnvla_jax
from rynnvla_jax.checkpoint import model_dir, provenance, reader
from rynnvla_jax.config import NEWEST, ConfigError, TrainConfig
from rynnvla_jax.metric import has_best, higher_is_better
from rynnvla_jax.pages import templates
from rynnvla_jax.pages.plot_style import address
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.report import examples, figures
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.train.evaluation import EMA

METRICS = {
    "loss": "loss",
    "cross_entropy": "cross-entropy",
    "token_accuracy": "token accuracy, teacher forced",
    "action_l1": "L1 of action embeddings",
    "z_loss": "z-loss, before its weight",
    "reconstruction": "L1 of pixels in [-1, 1]",
    "codebook": "codebook loss",
    "perplexity": "perplexity of codes in a batch",
    "l1": "L1 of normalised actions",
    "kl": "KL divergence",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "action_error": "action error in the data's units",
    "hold_still_error": "action error of holding still",
    "repeat_motion_error": "action error of repeating the last motion",
}


class ReportError(ValueError):
    """A directory that cannot be shown on a page; the message names it and the remedy."""


@dataclass(frozen=True)
class Run:
    """The content of a work dir. `metrics`, `timing` and `evaluations` (on held-out data) are the logged lines, oldest
    first."""

    directory: Path
    config: TrainConfig
    metrics: list[dict[str, float]]
    timing: list[dict[str, float]]
    evaluations: list[dict[str, float]]

    @property
    def step(self) -> int:
        """Last logged step; 0 before the first."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Wall-clock time of all logged steps, compilation included."""
        steps = np.diff([0, *(line["step"] for line in self.timing)])
        return float(sum(n / t["steps_per_second"] for n, t in zip(steps, self.timing, strict=True) if n > 0))


def read_run(directory: Path) -> Run:
    """Reads a work dir of `rynnvla train`, finished or running.

    Raises:
      ReportError: not a directory, or not a work dir.
      ConfigError: its configuration is not one of this version.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory; pass work dirs of `rynnvla train`")
    file = directory / "assets" / "config.json"
    if not file.exists():
        raise ReportError(f"{directory} is not a work dir of `rynnvla train`: assets/config.json is missing")
    config = model_dir.read_train_config(directory)
    logs = (read_lines(directory / f"{name}.jsonl") for name in ("metrics", "timing", "eval"))
    return Run(directory, config, *logs)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that may still grow: an incomplete last line is left out."""
    try:
        return files.read_log(path)
    except files.DamagedFileError as error:
        raise ReportError(f"{path} has a damaged line ({error}); resume the run, which repairs it") from None


def write_report(
    workdirs: Sequence[Path],
    out: Path,
    *,
    title: str,
    notes: Sequence[tuple[str, str]] = (),
    weights: str = "raw",
    step: int = NEWEST,
) -> Path:
    """Writes the page and returns its path.

    Args:
      workdirs: of any stages, in any order: the page follows the curriculum.
      out: the HTML file; its folder is made.
      notes: further (label, value) rows of the overview, such as wall time.
      weights: that predict: "raw", or "ema", their average; `step` as `reader.find_step` takes it.

    Raises:
      ReportError, ConfigError: a directory is not a work dir. If data or checkpoints are missing, the page says so and
        shows the rest.
    """
    runs = [read_run(files.place(directory)) for directory in workdirs]
    runs.sort(key=lambda run: (list(STAGES).index(run.config.stage), not of_humans(run.config)))  # stable
    out = Path(out)
    if out.is_dir():
        raise ReportError(f"{out} is a directory; give the path of a file, for example {out}/report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    bar = progress_bar(runs, desc="report", unit="stage")
    for number, run in enumerate(bar, 1):
        bar.set_postfix_str(run.directory.name, refresh=True)
        sections.append(section(number, run, weights, step))
    device = jax.devices()[0]
    page = templates.render(
        Path(__file__).with_name("report.html"),
        title=title,
        sections=sections,
        notes=notes,
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        version=rynnvla_jax.__version__,
        machine=f"{jax.device_count()} x {device.device_kind} ({os.cpu_count()} CPU cores)",
        image=figures.frame,
    )
    files.write_text(out, page)
    return out


def section(number: int, run: Run, weights: str = "raw", step: int = NEWEST) -> dict[str, Any]:
    """The values for the template of one run."""
    from data_pipelines.episode import DataError

    config, problems, evidence, data = run.config, [], None, "; ".join(sources(run.config))
    stage = STAGES[config.stage]
    try:
        loader = examples.open_loader(run.directory, config)
        data = "; ".join([*loader.describe(), *(f"held out: {part.said}" for part in loader.splits)])
    except (ValueError, OSError) as error:  # data, statistics or tokenizer; the curves need none of them
        problems.append(f"No examples are shown, because the run's data cannot be opened: {error}")
    else:
        try:
            evidence = examples.evaluate(run.directory, config, loader, weights, step)
            problems += evidence.warnings
        except (ConfigError, DataError, reader.CheckpointError) as error:
            problems.append(f"No examples are shown: {error}")
    if any(not np.isfinite(v) for line in run.metrics for v in line.values()):
        problems.append("Some logged values are not finite; the curves leave them out.")
    charts = ""
    if evidence and evidence.chunks:
        charts = figures.chunks(evidence.chunks, evidence.dimensions, evidence.unit, evidence.quantity)
    return {
        "id": f"stage-{number}",
        "number": number,
        "stage": stage,
        "title": stage_title(config),
        "learns": stage.learns,
        "run": run.directory.resolve().name,
        "source": config_source(config),
        "progress": f"{run.step} of {config.total_steps} steps",
        "finished": run.step >= config.total_steps,
        "time": duration(run.seconds) if run.timing else "not logged",
        "facts": facts(run, data),
        "curves": figures.curves(run.metrics, run.evaluations) if run.metrics else "",
        "metrics": metric_rows(run.metrics) + held_out_rows(run.evaluations),
        "evidence": evidence,
        "charts": charts,
        "pictures": newest_pictures(run.directory),
        "problems": problems,
        "config": (run.directory / "assets" / "config.json").read_text(encoding="utf-8"),
    }


def newest_pictures(directory: Path) -> list[tuple[str, str]]:
    """(caption, `data:` URL) of the pictures of the last evaluation on held-out data."""
    folder, shown = directory / "pictures", []
    for name, said in (("frames", "frames, from all that was recorded before each code"), ("actions", "action chunks")):
        found = sorted(folder.glob(f"{name}_*.png")) if folder.exists() else []
        if found:
            step = int(found[-1].stem.rpartition("_")[2])
            shown.append(
                (f"Held-out examples after {step} steps: {said}", address("image/png", found[-1].read_bytes()))
            )
    return shown


def stage_title(config: TrainConfig) -> str:
    """The title of a stage; of the two ActionVAEs it names the data: human wrists or robot."""
    stage = STAGES[config.stage]
    if stage.model != "action_vae":
        return stage.title
    return f"{stage.title}, {'human wrists' if of_humans(config) else 'robot'}"


def sources(config: TrainConfig) -> list[str]:
    """The run's data, "KIND:PATH" each."""
    return [source for source, _ in config.data.mixture] or [config.data.source]


def of_humans(config: TrainConfig) -> bool:
    return sources(config)[0].startswith("egodex:")


def facts(run: Run, data: str) -> list[tuple[str, str]]:
    """Rows about the run: data, model, recipe, code and machine."""
    config, rows = run.config, [("Data", data)]
    model = model_line(config)
    try:
        count = parameters(run.directory)
        rows.append(("Model", f"{model}; {count / 1e6:,.2f} M parameters" if count else model))
    except reader.CheckpointError as error:
        rows.append(("Model", f"{model}; {error}"))
    recipe = config.optimizer
    rows.append(
        (
            "Training",
            f"{run.step} of {config.total_steps} steps of {config.batch_size} examples, {config.compute_dtype}, "
            f"AdamW, peak learning rate {recipe.peak_lr:g}, weight decay {recipe.weight_decay:g}, seed {config.seed}",
        )
    )
    if seen := seen_line(run.metrics):
        rows.append(("Seen so far", seen))
    if config.init_from.path:
        fresh = f"; randomly initialised: {', '.join(config.init_from.new)}" if config.init_from.new else ""
        rows.append(("Started from", f"{Path(config.init_from.path).name}{fresh}"))
    if run.timing:
        rows.append(("Speed", speed_line(run)))
    machine = run.directory / "assets" / "machine.json"
    if machine.exists():
        rows.append(("Device", files.read_json(machine)["devices"]))
    if starts := provenance.attempts(run.directory):
        code, *others = dict.fromkeys(provenance.code_line(start["code"]) for start in reversed(starts))
        rows.append(("Code", f"{code}; other starts with {'; '.join(others)}" if others else code))
        rows.append(("Versions", provenance.versions_line(starts[-1])))
    return rows


def seen_line(metrics: list[dict[str, float]]) -> str:
    """Examples and epochs of each source of a mixture; "" of a run with one source."""
    last = metrics[-1] if metrics else {}
    ends = {key: key.removesuffix("/examples") for key in last if key.endswith("/examples")}
    return "; ".join(
        f"{start.removeprefix(figures.SOURCE)}: {last[key]:,.0f} examples, {last[f'{start}/epochs']:.3g} epochs"
        for key, start in ends.items()
    )


def speed_line(run: Run) -> str:
    """Median rates without the first reading, which includes the compilation."""
    lines = run.timing[1:] or run.timing

    def median(key: str) -> float:
        return float(np.median([line[key] for line in lines if key in line]))

    parts = [f"{median('steps_per_second'):.3g} steps/s"]
    if any("tokens_per_second" in line for line in lines):
        parts.append(f"{median('tokens_per_second'):,.0f} tokens/s")
    if any("model_flop_utilization" in line for line in lines):
        parts.append(f"{median('model_flop_utilization'):.1%} of peak FLOP/s")
    parts.append(f"{median('data_wait_share'):.1%} of the time waiting for data")
    return f"{', '.join(parts)}; {duration(run.seconds)} in total, including compilation"


def model_line(config: TrainConfig) -> str:
    """The main sizes of a model, in words."""
    kind = STAGES[config.stage].model
    if kind == "vqgan":
        vqgan = config.vqgan_model
        return (
            f"VQGAN, {vqgan.num_codes} codes of width {vqgan.code_width}, one code per {vqgan.downsampling} x "
            f"{vqgan.downsampling} patch"
        )
    if kind == "action_vae":
        vae = config.action_vae_model
        return (
            f"transformer VAE of width {vae.width}, chunks of {vae.chunk} x {vae.action_dim}, embedding of {vae.latent}"
        )
    c = config.vla.transformer
    return (
        f"Chameleon decoder, {c.num_layers} layers of width {c.width}, {c.num_heads} heads, vocabulary "
        f"{c.vocab_size}; {config.sequence.num_frames} frames in {config.sequence.length} tokens"
    )


def parameters(directory: Path) -> int:
    """Number of stored parameters, from the checkpoint's metadata; 0 without a checkpoint. Raises CheckpointError."""
    steps = reader.steps(directory)
    return sum(int(np.prod(s)) for s in model_dir.stored_shapes(directory, steps[-1]).values()) if steps else 0


def metric_rows(metrics: list[dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """(name, first, last, best with its step) of every logged value."""
    rows = []
    single = [f"{figures.SOURCE}{s}/{name}" for name, of in figures.by_source(metrics).items() for s in of]
    for key in figures.parts(metrics) + single:
        lines = [line for line in metrics if key in line and np.isfinite(line[key])]
        if not lines:
            continue
        best = ""
        if has_best(key):
            chosen = (max if higher_is_better(key) else min)(lines, key=lambda line: line[key])
            best = f"{number_text(key, chosen[key])} at step {chosen['step']}"
        name = METRICS.get(key, key.replace("_", " "))
        if key in single:
            _, source, loss = key.split("/")
            name = f"{METRICS.get(loss, loss)}, of {source}"
        rows.append((name, number_text(key, lines[0][key]), number_text(key, lines[-1][key]), best))
    return rows


def held_out_rows(evaluations: list[dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """As `metric_rows`, of held-out data, without columns and steps ahead; then those of the average of the weights."""
    rows = []
    for start, said in (("", "held out"), (EMA, "held out, average of the weights")):
        lines = [{k.removeprefix(start): x for k, x in line.items() if k.startswith(start)} for line in evaluations]
        lines = [{"step": line["step"]} | of for line, of in zip(evaluations, lines, strict=True) if of]
        lines = [{key: value for key, value in line.items() if "/" not in key} for line in lines]
        rows += [(f"{name}, {said}", first, last, best) for name, first, last, best in metric_rows(lines)]
    return rows


def number_text(key: str, value: float) -> str:
    return f"{value:.1%}" if key.endswith("accuracy") else f"{value:.4g}"


def config_source(config: TrainConfig) -> str:
    """Kind and folder name of the data, without the full path."""
    pairs = [source.partition(":") for source in sources(config) if source]
    return "; ".join(f"{kind}: {Path(root).name}" for kind, _, root in pairs) or "none"


def duration(seconds: float) -> str:
    """`75.2` -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
