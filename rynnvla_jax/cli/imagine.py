"""`rynnvla imagine`: the frames that a trained stage 1, 2 or 3 predicts."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
import tyro
from PIL import Image

from rynnvla_jax.cli.arguments import OR_BUCKET, Step, parse, step_number
from rynnvla_jax.cli.main import quiet_libraries
from rynnvla_jax.columns import describe
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import preprocess, read_image
from rynnvla_jax.storage import arrays, files

if TYPE_CHECKING:
    from rynnvla_jax.inference.generate import Sampling
    from rynnvla_jax.inference.imagine import Model

T = TypeVar("T")
Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Imagine:
    """Predicts future frames from an image and an instruction, or measures predictions against recordings.

      rynnvla imagine stage1 --image cup.png --text "lift the cup" --frames 3 --out lift.mp4
      rynnvla imagine stage3 --image front.png --wrist wrist.png --state=10,-60,45,30,0,5 \\
          --text "pick up the block" --samples 4 --top-p 0.9 --out samples.png
      rynnvla imagine stage1 --source egodex:DIR --examples 64 --out quality.html

    Several --image and --text (and --wrist, --state) form pairs that are decoded together; a single value is used for
    all. An .mp4 plays at the data's frame interval; a .png is a strip with one row per sample; both begin with the
    given frame.

    With --source, frames are predicted from --examples starting points in a data set and compared with the recording:
    code accuracy, PSNR and SSIM for each future frame, next to two baselines: the first frame repeated (copy), and the
    recording's own codes (vqgan: no prediction can be better). All three are decoded by the VQGAN. Use data that the
    model was not trained on. OUT.html also shows examples, and its numbers are written to OUT.jsonl; OUT.jsonl alone
    has only the numbers.
    """

    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR"), OR_BUCKET]
    """Work dir of stage video, trajectory or robot, or an imported model, here or in a bucket."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File to write: .mp4 or .png; with --source .html or .jsonl."""
    image: Files = ()
    """Image of the front camera."""
    text: tuple[str, ...] = ()
    """The instruction."""
    wrist: Files = ()
    """Image of the wrist camera."""
    extra: Files = ()
    """Images of the cameras of data.extra_views, in their order; those of one pair before those of the next."""
    state: tuple[str, ...] = ()
    """Current raw state of joints or wrists: comma-separated numbers, .json or .npy; one row serves all frames."""
    frames: int | None = None
    """Number of future frames; by default as in training."""
    samples: int = 1
    """Samples per pair."""
    temperature: float | None = None
    """0: always the most likely code; by default 0, or 1 with --samples, --top-k or --top-p."""
    top_k: int = 0
    """Sample from this many most likely codes; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely codes whose probabilities add up to this."""
    seed: int = 0
    """Seed for sampling."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights of the work dir: as trained, or their average (optimizer.ema)."""
    step: Step = None
    """Checkpoint step; by default the newest; "best": that of checkpoint.keep_best."""
    fps: float = 30.0
    """Steps per second of the data."""
    source: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Measure over this data set instead: KIND:PATH, or only PATH when its files show the kind."""
    examples: int = 32
    """Number of examples of --source."""
    batch: int = 8
    """Examples of --source that are decoded together."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    renamed = {"--data": "--source", "--model": "give the work dir as the first argument: rynnvla imagine WORKDIR ..."}
    a = parse(Imagine, "rynnvla imagine", argv, renamed)

    from rynnvla_jax.inference import imagine

    quiet_libraries()
    sampling = _sampling(a)
    model = imagine.find(a.workdir, a.weights, step_number(a.step))
    if not a.source:
        _imagine(model, a, sampling)
        return 0
    if a.image or a.text or a.wrist or a.extra or a.state or a.samples > 1:
        raise ConfigError("--source measures over a data set; leave out --image, --text, --samples and the like")
    from data_pipelines.sources.recognize import source_of
    from rynnvla_jax.report import imagine_quality

    imagine_quality.measure(model, source_of(a.source), a.examples, a.frames, sampling, a.seed, a.batch, a.out)
    return 0


def _imagine(model: "Model", a: Imagine, sampling: "Sampling") -> None:
    """Checks all options before the weights are read."""
    from rynnvla_jax.inference import filmstrip, imagine
    from rynnvla_jax.inference.generate import TokenBar
    from rynnvla_jax.models.params import count
    from rynnvla_jax.storage.mp4 import write_video

    frames = model.config.sequence.num_frames - 1 if a.frames is None else a.frames
    if frames < 1:
        raise ConfigError("--frames is the number of future frames; it must be at least 1")
    if a.out.suffix not in (".mp4", ".png"):
        raise ConfigError(f"--out {a.out}: give a video (.mp4) or a strip of images (.png)")
    if not a.image or not a.text:
        raise ConfigError("give --image FILE and --text, or --source KIND:PATH to measure over a data set")
    if not 0.001 <= a.fps <= 1000 or a.samples < 1:
        raise ConfigError("--fps must be between 0.001 and 1000, and --samples at least 1")
    texts, views, states = _inputs(model, a, frames + 1)
    size = views["front"].shape[1:3]
    imagine.check_frames(model, texts, size, frames + 1)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(a.fps).limit_denominator(1000) / model.config.sequence.frame_interval
    imagine.announce(
        model,
        f"{len(texts)} x {frames} frames of {size[0]} x {size[1]} pixels, {float(rate):g} frames per second",
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
    pictures = {v: filmstrip.enlarged(p) for v, p in pictures.items()}
    labels = [text if a.samples == 1 else f"{i % a.samples + 1}: {text}" for i, text in enumerate(texts)]
    if a.out.suffix == ".png":
        Image.fromarray(filmstrip.strip(pictures, labels, float(1000 / rate))).save(a.out)
    else:
        write_video(a.out, filmstrip.film(pictures, labels), rate)
    print(f"{bar.speed()}\n{a.out}", flush=True)


def _sampling(a: Imagine) -> "Sampling":
    """Greedy, unless an option asks for sampling. Raises ConfigError."""
    from rynnvla_jax.inference.generate import Sampling

    if not 0 <= a.seed < 2**32:
        raise ConfigError(f"--seed {a.seed} must be between 0 and {2**32 - 1}")
    draws = a.samples > 1 or a.top_k or a.top_p < 1
    temperature = (1.0 if draws else 0.0) if a.temperature is None else a.temperature
    if a.samples > 1 and temperature == 0:
        raise ConfigError("--samples above 1 with --temperature 0 would all be identical; set a higher --temperature")
    return Sampling(temperature, a.top_k, a.top_p)


def _inputs(model: "Model", a: Imagine, frames: int):
    """(texts, first frames uint8 [N, h, w, 3] by view, raw states [N, frames, S] or None); samples of a pair adjacent.

    Raises ConfigError: an input that the model needs is missing, or one that was given cannot be used.
    """
    number = max(len(a.image), len(a.text))
    paths = {"front": _paired("--image", a.image, number)}
    texts = _paired("--text", a.text, number)
    if "wrist" in model.views:
        if not a.wrist:
            raise ConfigError(f"{model.directory} was trained with a wrist camera; give its image with --wrist FILE")
        paths["wrist"] = _paired("--wrist", a.wrist, number)
    elif a.wrist:
        raise ConfigError(f"{model.directory} was trained without a wrist camera; leave --wrist out")
    extra = model.config.sequence.extra_views
    if len(a.extra) not in (len(extra), len(extra) * number):
        raise ConfigError(
            f"--extra has {len(a.extra)} images, but {model.directory} was trained with {len(extra)} cameras beside "
            f"front and wrist ({', '.join(extra) or 'none'}); give one for each"
        )
    paths |= {v: _paired("--extra", a.extra[i :: len(extra)], number) for i, v in enumerate(extra)}
    states = None
    if (statistics := model.statistics) is not None:
        width = len(statistics.mean_state)
        if not a.state:
            raise ConfigError(
                f"{model.directory} was trained with states; give --state as {width} comma-separated numbers "
                f"({statistics.columns.robot}: {describe(statistics.columns.state)}), or as a .json or .npy file with "
                "one row, or one row per frame"
            )
        states = np.stack([_state(text, width, frames) for text in _paired("--state", a.state, number)])
        states = np.repeat(states, a.samples, axis=0)
    elif a.state:
        raise ConfigError(f"{model.directory} was trained without states; leave --state out")
    scaled = {v: [preprocess(_picture(p), model.config.data.image) for p in files] for v, files in paths.items()}
    sizes = {x.shape: str(p) for v in scaled for x, p in zip(scaled[v], paths[v], strict=True)}
    if len(sizes) > 1:
        found = " and ".join(f"{p} ({s[0]} x {s[1]})" for s, p in list(sizes.items())[:2])
        raise ConfigError(f"all images must have the same size after scaling, not {found}; run them separately")
    views = {v: np.repeat(np.stack(x), a.samples, axis=0) for v, x in scaled.items()}
    return [text for text in texts for _ in range(a.samples)], views, states


def _paired(flag: str, values: tuple[T, ...], number: int) -> tuple[T, ...]:
    """`values` as a list of length `number`; a single value is repeated."""
    if len(values) not in (1, number):
        raise ConfigError(f"{flag} is given {len(values)} times for {number} pairs; give it once or {number} times")
    return values * (number // len(values))


def _picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], rotated by its EXIF orientation as viewers show it."""
    try:
        return read_image(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give an image (PNG, JPEG, ...)") from None


def _state(text: str, width: int, frames: int) -> np.ndarray:
    """[frames, width]: comma-separated numbers, or a file; a single row is used for all frames."""
    try:
        if text.endswith(".npy"):
            rows = np.asarray(arrays.map_array(text), float)
        elif text.endswith(".json"):
            rows = np.asarray(files.read_json(Path(text)), float)
        else:
            rows = np.array(text.split(","), float)
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise ConfigError(
            f"--state {text} is neither comma-separated numbers nor a .json or .npy file of numbers: {shorten(error)}"
        ) from None
    rows = np.atleast_2d(rows)
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) not in (1, frames) or not np.isfinite(rows).all():
        raise ConfigError(
            f"--state {text} is {list(rows.shape)}; it must be finite, [{width}], or [{frames}, {width}], per frame"
        )
    return np.broadcast_to(rows, (frames, width))
