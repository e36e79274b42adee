"""A video of one episode: both cameras side by side, with the instruction and the outcome written in."""

import os
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rynnvla_jax.sim.env import CAMERAS, TableTop

_EVERY = 3  # steps between two pictures
_BAR = 40  # pixels for the text


class Film:
    """Looks at `env` once in a while; `write` makes an mp4 of what it saw."""

    def __init__(self, env: TableTop):
        self._env, self._steps, self._pictures = env, 0, []

    def look(self) -> None:
        """After each step."""
        if self._steps % _EVERY == 0:
            self._pictures.append(np.concatenate([self._env.render(camera) for camera in CAMERAS], axis=1))
        self._steps += 1

    def write(self, path: Path, instruction: str, outcome: str) -> None:
        """Whole or not at all; the outcome stands under the last second's pictures."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = self._env.fps // _EVERY
        aside = path.with_name(f".{path.name}.{os.getpid()}.mp4")
        height, width = self._pictures[0].shape[:2]
        font = ImageFont.load_default(14)
        with av.open(str(aside), "w") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width, stream.pix_fmt = height + _BAR, width, "yuv420p"
            for i, picture in enumerate(self._pictures + [self._pictures[-1]] * rate):
                canvas = Image.new("RGB", (width, height + _BAR))
                canvas.paste(Image.fromarray(picture))
                draw = ImageDraw.Draw(canvas)
                draw.text((6, height + 2), instruction, font=font)
                if i >= len(self._pictures) - 1:
                    draw.text((6, height + 20), outcome, font=font, fill=(255, 210, 80))
                container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
            container.mux(stream.encode(None))
        os.replace(aside, path)
