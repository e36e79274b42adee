"""Measures predicted frames over a data set: code accuracy, PSNR, SSIM per future frame, with two baselines."""

import dataclasses
import json
from pathlib import Path

import numpy as np

import rynnvla_jax
from rynnvla_jax.config import ConfigError
from rynnvla_jax.inference import imagine
from rynnvla_jax.inference.generate import Sampling, TokenBar
from rynnvla_jax.inference.image_metrics import psnr, ssim
from rynnvla_jax.pages import templates
from rynnvla_jax.report import figures
from rynnvla_jax.report.examples import UPPER_BOUND, Recorded, frame_table, record
from rynnvla_jax.storage import files

SHOWN = 8  # examples on the page
MEASURES = ("codes_right", "psnr", "ssim")
LABELS = ("predicted", "copy", "vqgan")


def measure(
    model: imagine.Model,
    source: str,
    examples: int,
    frames: int | None,
    sampling: Sampling,
    seed: int,
    batch: int,
    out: Path,
) -> list[dict]:
    """Writes `out` (.html and a .jsonl of the same name, or only .jsonl), prints the table and returns the lines.

    A code is right if the VQGAN gives the recorded frame the same code at this position. The model gets only the first
    recorded frame and, if it uses them, the recorded states.

    Raises ConfigError, DataError, CheckpointError; all but a damaged frame before the weights are read.
    """
    from data_pipelines.loader import Loader

    T = 1 + (model.config.sequence.num_frames - 1 if frames is None else frames)
    if T < 2 or min(examples, batch) < 1:
        raise ConfigError("--frames, --examples and --batch must be at least 1 (and the model must predict frames)")
    if out.suffix not in (".html", ".jsonl"):
        raise ConfigError(f"--out {out}: give a page (.html) or a file of numbers (.jsonl)")
    config = dataclasses.replace(
        model.config,
        batch_size=1,
        sequence=dataclasses.replace(model.config.sequence, clips=1),
        # "ahead" also allows a tokenized corpus; of other data the frames are encoded here.
        data=dataclasses.replace(model.config.data, source=source, mixture=(), frame_codes="ahead"),
    )
    loader = Loader(config, tokenizer=model.tokenizer, statistics=model.statistics, progress=False)
    size = loader.frame_size
    assert size is not None  # the model reads frames
    imagine.check_frames(model, loader.sources[0].texts or ["a corpus tells them later"], size, T)
    out.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    imagine.announce(
        model, f"{T - 1} frames of {height} x {width} pixels from {examples} examples of {source}", sampling, out
    )

    imagination = imagine.load(model)
    recorded = record(imagination, loader, examples, T)
    imagine.check_frames(model, recorded.texts, size, T)
    predicted, speed = _predict(imagination, recorded, sampling, seed, batch)
    decoded = {
        "predicted": {v: imagination.codec.decode(c) for v, c in predicted.items()},
        "vqgan": {v: imagination.codec.decode(c) for v, c in recorded.codes.items()},
    }
    decoded["copy"] = {v: np.broadcast_to(p[:, :1], p.shape) for v, p in decoded["vqgan"].items()}
    lines = scores(recorded, predicted, decoded)
    print(f"{table(lines)}\n{speed}", flush=True)
    if recorded.decoded.any():
        print(
            f"{source} has no camera frames: PSNR and SSIM compare with its decoded codes, so vqgan is no upper bound"
        )
    files.write_text(out.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    if out.suffix == ".html":
        write_page(model, source, recorded, predicted, decoded, lines, sampling, out)
    print(out, flush=True)
    return lines


def _predict(imagination, recorded: Recorded, sampling: Sampling, seed: int, batch: int) -> tuple[imagine.Codes, str]:
    """Codes of all examples, `batch` at a time by one program, and a line about the speed."""
    first, T = {v: c[:, 0] for v, c in recorded.codes.items()}, recorded.codes["front"].shape[1]
    layout = imagine.lay_out(imagination.model, recorded.texts, first, T)
    total, parts = len(recorded.windows), []
    batch = min(batch, total)
    chosen = [np.minimum(np.arange(i, i + batch), total - 1) for i in range(0, total, batch)]  # the last is filled up
    with TokenBar(int(sum(layout.predict[rows].sum() for rows in chosen))) as bar:
        for begin, rows in zip(range(0, total, batch), chosen, strict=True):
            states = None if recorded.states is None else recorded.states[rows]
            codes = imagination.predict(layout.rows(rows), states, sampling=sampling, seed=seed + begin, progress=bar)
            parts.append({v: c[: total - begin] for v, c in codes.items()})
    return {v: np.concatenate([part[v] for part in parts]) for v in first}, bar.speed()


def scores(recorded: Recorded, predicted: imagine.Codes, decoded: dict[str, imagine.Codes]) -> list[dict]:
    """One line per view and future frame: means over the examples."""
    lines = []
    for view, codes in recorded.codes.items():
        chosen = {"predicted": predicted[view], "copy": np.broadcast_to(codes[:, :1], codes.shape), "vqgan": codes}
        for t in range(1, codes.shape[1]):
            real = recorded.frames[view][:, t]
            shown = {label: decoded[label][view][:, t] for label in LABELS}
            lines.append(
                {
                    "view": view,
                    "frame": t,
                    "seconds": round(t * float(recorded.seconds[0]), 4),
                    "examples": len(real),
                    "codes_right": {k: float((chosen[k][:, t] == codes[:, t]).mean()) for k in LABELS},
                    "psnr": {k: psnr(real, shown[k]) for k in LABELS},
                    "ssim": {k: ssim(real, shown[k]) for k in LABELS},
                }
            )
    return lines


def mean_line(lines: list[dict]) -> dict:
    """The mean of all lines."""
    means = {m: {k: float(np.mean([line[m][k] for line in lines])) for k in LABELS} for m in MEASURES}
    return {"view": "mean", "frame": "", "seconds": "", **means}


def cells(line: dict) -> list[str]:
    """The cells of a line in the table: three labels per measure, without the code accuracy of vqgan (always 1)."""
    right, quality, likeness = (line[m] for m in MEASURES)
    return [
        *(f"{right[k]:.1%}" for k in LABELS[:2]),
        *(f"{quality[k]:.2f}" for k in LABELS),
        *(f"{likeness[k]:.3f}" for k in LABELS),
    ]


def table(lines: list[dict]) -> str:
    """The table for a terminal."""
    text = [
        f"\n{'':<18}{'codes right':<22}{'PSNR, dB':<33}{'SSIM':<33}".rstrip(),
        f"{'view':<8}{'ahead':<10}" + "".join(f"{k:<11}" for k in (*LABELS[:2], *LABELS, *LABELS)).rstrip(),
    ]
    for line in [*lines, mean_line(lines)]:
        ahead = f"{1000 * line['seconds']:.0f} ms" if line["frame"] else ""
        text.append(f"{line['view']:<8}{ahead:<10}" + "".join(f"{c:<11}" for c in cells(line)).rstrip())
    return "\n".join(text)


def write_page(
    model, source: str, recorded: Recorded, predicted, decoded, lines, sampling: Sampling, out: Path
) -> None:
    """One self-contained page: the table, and true, rebuilt, generated and copied frames of some examples."""
    count = len(recorded.windows)
    shown = np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)).tolist()
    rows = {
        UPPER_BOUND: decoded["vqgan"],
        "predicted": decoded["predicted"],
        "first frame again": decoded["copy"],
    }
    page = templates.render(
        Path(__file__).with_name("imagine.html"),
        model=model,
        source=source,
        count=count,
        states=recorded.states is not None,
        filmed=not recorded.decoded.any(),
        sampling=sampling,
        lines=[*lines, mean_line(lines)],
        cells=cells,
        tables=[frame_table(number, i, recorded, rows, predicted) for number, i in enumerate(shown, 1)],
        image=figures.frame,
        version=rynnvla_jax.__version__,
    )
    files.write_text(out, page)
