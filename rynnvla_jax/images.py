"""Preprocessing of camera frames for the VQGAN, the same in training, in deployment and for codes made ahead.

Also the safe reading of pictures: a file states its size in its header, and a small file may state any.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rynnvla_jax.config import ConfigError, ImageConfig
from rynnvla_jax.errors import shorten

BLOCK = 32  # frame edges are multiples of this: one grid token stands for 32 pixels
MAX_PIXELS = 8192 * 4096  # of a picture or a video frame; 100 MB as RGB
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others run programs, or are nobody's camera's


def check_pixels(height: int, width: int, what: str) -> None:
    """Raises ConfigError, which begins with `what`, for a picture without pixels or with too many to be decoded."""
    if not 0 < height * width <= MAX_PIXELS:
        raise ConfigError(
            f"{what} has {height} x {width} pixels; pictures of 1 to {MAX_PIXELS:,} pixels are read, so scale it"
        )


def check_header(content: bytes, name: str) -> None:
    """Raises ConfigError naming `name` unless `content` begins as a picture that is not too large; decodes nothing."""
    with _picture(io.BytesIO(content), name):
        pass


def read_image(path: Path) -> np.ndarray:
    """The picture in a file as viewers show it (EXIF orientation): uint8 [H, W, 3] RGB.

    Raises FileNotFoundError, or ConfigError naming a file that is no picture, or too large.
    """
    with _picture(path, str(path)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def picture(content: bytes, name: str) -> np.ndarray:
    """As `read_image`, of a picture in memory that messages call `name`. Raises ConfigError, also for depth."""
    with _picture(io.BytesIO(content), name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
            raise ConfigError(f"{name} has {image.mode} values, not 8 bits a colour; give a PNG or JPEG in RGB")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@contextlib.contextmanager
def _picture(source: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """The picture, of a size that is allowed and not decoded yet; what decoding raises becomes a ConfigError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit of pixels, and metadata that are not used
            with Image.open(source, formats=_FORMATS) as image:
                check_pixels(image.height, image.width, name)
                yield image
    except (FileNotFoundError, ConfigError):
        raise
    except Image.DecompressionBombError:  # far above our own limit
        raise ConfigError(f"{name} has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # image libraries can raise any exception for damaged bytes
        raise ConfigError(f"{name} is not a readable image ({shorten(error)}); give a PNG or JPEG") from None


def frame_size(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """(height, width) in pixels of a camera frame after `preprocess`.

    "crop" cuts the long edge down to a multiple of 32, "pad" fills it up to one, "square" cuts it down to the shortest.
    "reference_train" and "reference_infer" are the public code's two rules; their long edge need not be a
    multiple of 32. Raises ConfigError for frames without pixels.
    """
    height, width = _resized(height, width, config)
    if config.fit == "crop":
        return height // BLOCK * BLOCK, width // BLOCK * BLOCK
    if config.fit == "square":
        return min(height, width), min(height, width)
    if config.fit == "pad":
        return -(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK
    return height, width


def preprocess(frame: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [h, w, 3]: antialiased bicubic resize, then centre crop or symmetric black pad.

    Raises ConfigError when `frame` is not uint8 [H, W, 3].
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ConfigError(f"frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}; pass RGB bytes")
    height, width = _resized(frame.shape[0], frame.shape[1], config)
    if frame.shape[:2] != (height, width):
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    out_height, out_width = frame_size(height, width, config)
    if (out_height, out_width) == (height, width):
        return np.ascontiguousarray(frame)
    if config.fit in ("crop", "square"):
        top, left = (height - out_height) // 2, (width - out_width) // 2
        return np.ascontiguousarray(frame[top : top + out_height, left : left + out_width])
    top, left = (out_height - height) // 2, (out_width - width) // 2
    padded = np.zeros((out_height, out_width, 3), np.uint8)
    padded[top : top + height, left : left + width] = frame
    return padded


def normalize(frames: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> float32 in [-1, 1]."""
    return (frames.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def _resized(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    if min(height, width) < 1:
        raise ConfigError(f"frame of {height} x {width} pixels has no content; check the camera")
    short, long = min(height, width), max(height, width)
    target = config.shortest_edge
    edge = int(target * long / short) if config.fit == "reference_infer" else round(long / (short / target))
    return (edge, target) if height >= width else (target, edge)
