"""Images of predicted frames: a strip, and the frames of a video."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rynnvla_jax.inference.imagine import Codes

_LABEL = 18  # pixels for a line of text
_LETTER = 7  # pixels of a letter, about
_LEAST = 192  # pixels of a frame's shorter edge in a picture: smaller ones are enlarged


def enlarged(pictures: np.ndarray) -> np.ndarray:
    """[..., h, w, 3], with the pixels of small frames repeated."""
    times = math.ceil(_LEAST / min(pictures.shape[-3:-1]))
    return pictures.repeat(times, axis=-3).repeat(times, axis=-2)


def strip(pictures: Codes, labels: Sequence[str], milliseconds: float) -> np.ndarray:
    """uint8 [H, W, 3]: frames uint8 [N, T, h, w, 3] by view, time to the right, one row per sample, views below."""
    rows = []
    for i, label in enumerate(labels):
        cells = [
            [_label(x, "given" if t == 0 else f"+{milliseconds * t:.0f} ms") for t, x in enumerate(p[i])]
            for p in pictures.values()
        ]
        rows += [_label(np.concatenate([np.concatenate(line, axis=1) for line in cells]), label)]
    return np.concatenate(rows)


def film(pictures: Codes, labels: Sequence[str]) -> list[np.ndarray]:
    """One image per frame: samples side by side, in several rows if there are many; views below each other."""
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
    """The image with lines of text below it."""
    canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + _LABEL * (1 + text.count("\n"))))
    canvas.paste(Image.fromarray(picture))
    font = ImageFont.load_default(12)
    for i, line in enumerate(text.split("\n")):
        ImageDraw.Draw(canvas).text((4, picture.shape[0] + _LABEL * i + 2), line, font=font)
    return np.asarray(canvas)
