"""At what rate and with what shape of frames the data of a policy were recorded: what a robot must match.

A chunk's row is a target for one step of the recording, so another control rate is another speed of the arm. Frames of
another aspect ratio show another view, and may be laid out as other tokens.
"""

import math
from dataclasses import dataclass

from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import brief

TOLERANCE = 0.05  # of rates and of aspect ratios: 29.97 and 30 Hz are one rate, 854 x 480 and 1280 x 720 one shape


@dataclass(frozen=True)
class Recording:
    """Steps per second, and (height, width) in pixels of frames before any resizing; () where it is not known."""

    rates: tuple[float, ...] = ()
    frames: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"recording.rates is {brief(self.rates)}; give steps per second")
        if not all(min(frame) > 0 for frame in self.frames):
            raise ConfigError(f"recording.frames is {brief(self.frames)}; give heights and widths in pixels")

    @property
    def mixed(self) -> bool:
        """Whether the same motion is of different size per step in parts of the data."""
        return bool(self.rates) and not _alike(min(self.rates), max(self.rates))

    def rate_fault(self, rate: float) -> str:
        """What is wrong with `rate` control steps per second, and what to do; "" where it is that of a recording."""
        if not self.rates or any(_alike(rate, other) for other in self.rates):
            return ""
        nearest = min(self.rates, key=lambda other: abs(math.log(rate / other)))
        speed, listed = rate / nearest, hertz(self.rates)
        return (
            f"the policy was recorded at {listed} but is controlled at {rate:g} Hz, so that it would move at "
            f"{speed:.2g} times the speed; control it at {nearest:g} Hz"
        )

    def frame_fault(self, camera: str, height: int, width: int) -> str:
        """What is wrong with frames of this shape, and what to do; "" where they are shaped as in a recording."""
        if not self.frames or any(_alike(height / width, h / w) for h, w in self.frames):
            return ""
        h, w = min(self.frames, key=lambda frame: abs(math.log(height / width * frame[1] / frame[0])))
        crop = (round(width * h / w), width) if height / width > h / w else (height, round(height * w / h))
        shapes = ", ".join(f"{h} x {w}" for h, w in self.frames)
        return (
            f"{camera} image has {height} x {width} pixels (height x width) but the policy was trained on frames of "
            f"{shapes}; use the camera's mode of that aspect ratio, or crop its frames to {crop[0]} x {crop[1]}"
        )


def hertz(rates: tuple[float, ...]) -> str:
    """ "30 Hz", or all of several."""
    return f"{' and '.join(f'{rate:g}' for rate in rates)} Hz"


def _alike(one: float, other: float) -> bool:
    return abs(math.log(one / other)) <= math.log1p(TOLERANCE)
