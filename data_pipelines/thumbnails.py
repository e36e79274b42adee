"""Small copies of pictures, by which curation and validation compare what cameras show."""

import numpy as np
from PIL import Image

CELLS = 16  # of a small copy, along each edge


def brightness(rgb: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> uint8 [...]."""
    wide = rgb.astype(np.uint16)
    return ((2 * wide[..., 0] + 5 * wide[..., 1] + wide[..., 2]) // 8).astype(np.uint8)


def small_copy(pixels: np.ndarray) -> np.ndarray:
    """Brightness uint8 [H, W] -> its mean in each cell, float32 [CELLS * CELLS]."""
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("F")
    return np.asarray(picture.resize((CELLS, CELLS), Image.Resampling.BOX)).reshape(-1)
