"""A video of one episode: both cameras side by side, with the instruction and the outcome as text."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rynnvla_jax.sim.env import CAMERAS, TableTop
from rynnvla_jax.storage.mp4 import write_video

_EVERY = 3  # steps between two pictures
_BAR = 40  # pixels for the text


class Film:
    """Records frames of `env` at intervals; `write` makes an mp4 of them."""

    def __init__(self, env: TableTop):
        self._env, self._steps = env, 0
        self._pictures: list[np.ndarray] = []

    def look(self) -> None:
        """After each step."""
        if self._steps % _EVERY == 0:
            self._pictures.append(np.concatenate([self._env.render(camera) for camera in CAMERAS], axis=1))
        self._steps += 1

    def write(self, path: Path, instruction: str, outcome: str) -> None:
        """Writes the video atomically; the outcome is shown below the frames of the last second."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = self._env.fps // _EVERY
        shown = enumerate(self._pictures + [self._pictures[-1]] * rate)
        last = len(self._pictures) - 1
        write_video(path, (_captioned(p, instruction, outcome if i >= last else "") for i, p in shown), rate)


def _captioned(picture: np.ndarray, instruction: str, outcome: str) -> np.ndarray:
    height, width = picture.shape[:2]
    font = ImageFont.load_default(14)
    canvas = Image.new("RGB", (width, height + _BAR))
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, height + 2), instruction, font=font)
    if outcome:
        draw.text((6, height + 20), outcome, font=font, fill=(255, 210, 80))
    return np.asarray(canvas)
