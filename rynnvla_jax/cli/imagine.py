"""`rynnvla imagine`: the frames that a trained stage 1, 2 or 3 sees coming."""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.images import preprocess
from rynnvla_jax.inference import imagine
from rynnvla_jax.inference.generate import Sampling, TokenBar
from rynnvla_jax.models.params import count
from rynnvla_jax.storage.mp4 import write_video

_DESCRIPTION = """\
Decodes future frames from a picture and an instruction, or measures such frames against recordings.

  rynnvla imagine --model stage1 --image cup.png --text "lift the cup" --frames 3 --out lift.mp4
  rynnvla imagine --model stage3 --image front.png --wrist wrist.png --state 10,-60,45,30,0,5 \\
      --text "pick up the block" --samples 4 --top_p 0.9 --out samples.png
  rynnvla imagine --model stage1 --data egodex:DIR --examples 64 --out quality.html

MODEL is a work dir of stage video, trajectory or robot, or an imported model. Several --image and --text (and --wrist,
--state) make pairs that are decoded together; one of them serves all. An .mp4 plays at the data's frame interval, a
.png is a strip, one row a sample; both begin with the given frame.

With --data, frames are decoded from the first frame of --examples moments of a data set (any kind that `rynnvla data`
knows) and compared with what was recorded: the share of right codes, PSNR and SSIM for each frame ahead, beside those
of the first frame shown again (copy) and of the recording's own codes (vqgan: no prediction can do better). All three
are pictures of the VQGAN. Judge on data that the model was not trained on. OUT.html shows examples, too, and has its
numbers beside it in OUT.jsonl; OUT.jsonl alone has the numbers only.
"""
_LABEL = 18  # pixels for a line of text
_LETTER = 7  # pixels of a letter, about
_LEAST = 192  # pixels of a frame's shorter edge in a picture: smaller ones are enlarged


def main(argv: list[str]) -> int:
    """Returns the exit status; expected errors are one line on stderr."""
    a = _parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax talks a lot
    from data_pipelines.episode import DataError

    try:
        sampling = _sampling(a)
        model = imagine.find(a.model)
        if a.data:
            if a.image or a.text or a.wrist or a.state or a.samples > 1:
                raise ConfigError("--data measures over a data set; leave out --image, --text, --samples and the like")
            from rynnvla_jax.report import imagine_quality

            imagine_quality.measure(model, a.data, a.examples, a.frames, sampling, a.seed, a.batch, a.out)
        else:
            _imagine(model, a, sampling)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f"rynnvla imagine: {error}", file=sys.stderr)
        return 1
    return 0


def _imagine(model: imagine.Model, a: argparse.Namespace, sampling: Sampling) -> None:
    """Everything that can be wrong is found before the weights are read."""
    frames = model.config.sequence.num_frames - 1 if a.frames is None else a.frames
    if frames < 1:
        raise ConfigError("--frames must be at least 1: future frames are asked for")
    if a.out.suffix not in (".mp4", ".png"):
        raise ConfigError(f"--out {a.out}: name a video (.mp4) or a strip of pictures (.png)")
    if not a.image or not a.text:
        raise ConfigError("give --image FILE and --text, or --data SOURCE to measure over a data set")
    if not 0.001 <= a.fps <= 1000 or a.samples < 1:
        raise ConfigError("--fps must be between 0.001 and 1000, and --samples at least 1")
    texts, views, states = _inputs(model, a, frames + 1)
    size = views["front"].shape[1:3]
    imagine.check_frames(model, texts, size, frames + 1)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(a.fps).limit_denominator(1000) / model.config.sequence.frame_interval
    imagine.announce(
        model,
        f"{len(texts)} x {frames} frames of {size[0]} x {size[1]} pixels, {float(rate):g} a second",
        sampling,
        a.out,
    )

    imagination = imagine.load(model)
    print(f"  parameters {count(imagination.params) / 1e6:,.2f} M", flush=True)
    layout = imagine.lay_out(model, texts, {v: imagination.codec.encode(x) for v, x in views.items()}, frames + 1)
    with TokenBar(int(layout.predict.sum())) as bar:
        codes = imagination.predict(layout, states, sampling=sampling, seed=a.seed, progress=bar)
    pictures = {v: imagination.codec.decode(c) for v, c in codes.items()}
    for view, given in views.items():
        pictures[view][:, 0] = given  # the camera's own
    pictures = {v: enlarged(p) for v, p in pictures.items()}
    labels = [text if a.samples == 1 else f"{i % a.samples + 1}: {text}" for i, text in enumerate(texts)]
    if a.out.suffix == ".png":
        Image.fromarray(strip(pictures, labels, float(1000 / rate))).save(a.out)
    else:
        write_video(a.out, film(pictures, labels), rate)
    print(f"{bar.speed()}\n{a.out}", flush=True)


def _sampling(a: argparse.Namespace) -> Sampling:
    """Greedy, unless something asks for draws. Raises ConfigError."""
    if not 0 <= a.seed < 2**32:
        raise ConfigError(f"--seed {a.seed} must be between 0 and {2**32 - 1}")
    draws = a.samples > 1 or a.top_k or a.top_p < 1
    temperature = (1.0 if draws else 0.0) if a.temperature is None else a.temperature
    if a.samples > 1 and temperature == 0:
        raise ConfigError("--samples above 1 with --temperature 0 would all be the same; raise the temperature")
    return Sampling(temperature, a.top_k, a.top_p)


def _inputs(model: imagine.Model, a: argparse.Namespace, frames: int):
    """(texts, first frames uint8 [N, h, w, 3] by view, raw states [N, frames, S] or None), samples beside each other.

    Raises ConfigError: what the model needs and was not given, or was given and cannot be used.
    """
    number = max(len(a.image), len(a.text))
    paths = {"front": _paired("--image", a.image, number)}
    texts = _paired("--text", a.text, number)
    if "wrist" in model.views:
        if not a.wrist:
            raise ConfigError(f"{model.directory} was trained with a wrist camera; give its picture with --wrist FILE")
        paths["wrist"] = _paired("--wrist", a.wrist, number)
    elif a.wrist:
        raise ConfigError(f"{model.directory} was trained without a wrist camera; leave --wrist out")
    states = None
    if model.config.sequence.use_state:
        statistics = model.statistics
        assert statistics is not None  # of a model that takes states
        width = len(statistics.mean_state)
        if not a.state:
            raise ConfigError(
                f"{model.directory} was trained with states; give --state as {width} numbers with commas "
                f"({statistics.unit}), or as a .json or .npy file of one row, or one row a frame"
            )
        states = np.stack([_state(text, width, frames) for text in _paired("--state", a.state, number)])
        states = np.repeat(states, a.samples, axis=0)
    elif a.state:
        raise ConfigError(f"{model.directory} was trained without states; leave --state out")
    scaled = {v: [preprocess(_picture(p), model.config.data.image) for p in files] for v, files in paths.items()}
    sizes = {x.shape: str(p) for v in scaled for x, p in zip(scaled[v], paths[v], strict=True)}
    if len(sizes) > 1:
        said = " and ".join(f"{p} ({s[0]} x {s[1]})" for s, p in list(sizes.items())[:2])
        raise ConfigError(f"all pictures must be of one size once scaled, not {said}; run them one after another")
    views = {v: np.repeat(np.stack(x), a.samples, axis=0) for v, x in scaled.items()}
    return [text for text in texts for _ in range(a.samples)], views, states


def _paired(flag: str, values: list, number: int) -> list:
    """One value serves all."""
    if len(values) not in (1, number):
        raise ConfigError(f"{flag} is given {len(values)} times for {number} pairs; give it once or {number} times")
    return values * (number // len(values))


def _picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], turned as the camera says and viewers show it."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a picture (PNG, JPEG, ...)") from None
    except UnidentifiedImageError:
        raise ConfigError(f"{path} is no picture that can be read; name a PNG or JPEG") from None


def _state(text: str, width: int, frames: int) -> np.ndarray:
    """[frames, width]: numbers with commas, or a file; a single row holds for all frames."""
    try:
        if text.endswith(".npy"):
            rows = np.asarray(np.load(text), float)
        elif text.endswith(".json"):
            rows = np.asarray(json.loads(Path(text).read_text(encoding="utf-8")), float)
        else:
            rows = np.array(text.split(","), float)
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise ConfigError(
            f"--state {text} is neither numbers with commas nor a .json or .npy of them: {error}"
        ) from None
    rows = np.atleast_2d(rows)
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) not in (1, frames) or not np.isfinite(rows).all():
        raise ConfigError(
            f"--state {text} is {list(rows.shape)}; it must be finite, [{width}], or [{frames}, {width}]: one a frame"
        )
    return np.broadcast_to(rows, (frames, width))


def enlarged(pictures: np.ndarray) -> np.ndarray:
    """[..., h, w, 3], every pixel as often as small frames need."""
    times = math.ceil(_LEAST / min(pictures.shape[-3:-1]))
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def strip(pictures: imagine.Codes, labels: Sequence[str], milliseconds: float) -> np.ndarray:
    """uint8 [H, W, 3]: frames uint8 [N, T, h, w, 3] by view, time to the right, one row a sample, views below."""
    rows = []
    for i, label in enumerate(labels):
        cells = [
            [_label(x, "given" if t == 0 else f"+{milliseconds * t:.0f} ms") for t, x in enumerate(p[i])]
            for p in pictures.values()
        ]
        rows += [_label(np.concatenate([np.concatenate(line, axis=1) for line in cells]), label)]
    return np.concatenate(rows)


def film(pictures: imagine.Codes, labels: Sequence[str]) -> list[np.ndarray]:
    """One picture a frame: samples side by side, in several lines where they are many; views below each other."""
    columns = len(labels) if len(labels) <= 4 else math.ceil(math.sqrt(len(labels)))
    wrapped = [textwrap.wrap(label, pictures["front"].shape[3] // _LETTER) for label in labels]
    lines = max(map(len, wrapped))
    texts = ["\n".join(w + [""] * (lines - len(w))) for w in wrapped]

    def at(t: int) -> np.ndarray:
        cells = [_label(np.concatenate([p[i, t] for p in pictures.values()]), text) for i, text in enumerate(texts)]
        cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
        return np.concatenate([np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)])

    return [at(t) for t in range(pictures["front"].shape[1])]


def _label(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with lines of text below it."""
    canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + _LABEL * (1 + text.count("\n"))))
    canvas.paste(Image.fromarray(picture))
    font = ImageFont.load_default(12)
    for i, line in enumerate(text.split("\n")):
        ImageDraw.Draw(canvas).text((4, picture.shape[0] + _LABEL * i + 2), line, font=font)
    return np.asarray(canvas)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rynnvla imagine", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".mp4, .png; with --data .html, .jsonl")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--image", type=Path, metavar="FILE", help="the front camera now", **several)
    parser.add_argument("--text", help="the instruction", **several)
    parser.add_argument("--wrist", type=Path, metavar="FILE", help="the wrist camera now", **several)
    parser.add_argument(
        "--state",
        help="joints (or wrists) now, raw: numbers with commas, .json or .npy; one row holds for later frames, too; "
        "--state=-1,... where it begins with a minus",
        **several,
    )
    parser.add_argument("--frames", type=int, help="future frames; default: as many as it was trained on")
    parser.add_argument("--samples", type=int, default=1, help="of each pair; default: 1")
    parser.add_argument("--temperature", type=float, help="0: the likeliest code; default: 0, and 1 with what follows")
    parser.add_argument("--top_k", type=int, default=0, help="draw among the K likeliest codes")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest codes of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument("--fps", type=float, default=30.0, help="steps a second of the data; default: 30")
    parser.add_argument("--data", metavar="KIND:PATH", help="measure over this data set instead")
    parser.add_argument("--examples", type=int, default=32, help="moments of --data; default: 32")
    parser.add_argument("--batch", type=int, default=8, help="moments decoded together; default: 8")
    return parser
