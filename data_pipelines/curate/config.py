"""What `rynnvla data curate` may be told, one field an option."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from rynnvla_jax.config import ConfigError


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CurateConfig:
    """Everything that decides which clips a corpus has and what is in them. Source: arXiv 2509.15212, section 3."""

    clip_seconds: float = _option(8.0, "length of a clip; a video is cut into equal parts of about this")
    min_seconds: float = _option(2.0, "shorter videos are left out")
    samples: int = _option(4, "frames of a clip that are searched for people and shown to the caption model")
    face_score: float = _option(0.6, "score from which a detection is a face, 0 to 1")
    palm_score: float = _option(0.5, "score from which a detection is a palm, 0 to 1")
    hand_score: float = _option(0.5, "score from which landmarks around a palm are a hand, 0 to 1")
    max_face_share: float = _option(0.0, "clips with a face in a larger share of their samples are third person")
    min_hand_share: float = _option(0.5, "clips with a hand in a smaller share of their samples have no hands")
    shortest_edge: int = _option(384, "of clips, in pixels; larger videos are scaled down, none is scaled up")
    fps: float = _option(0.0, "frames per second of clips; 0, or more than the video has: the video's own")
    quality: int = _option(23, "constant rate factor of h264: lower is better and larger")
    caption_prompt: str = _option(
        "These frames are from a video that a person recorded with a camera on the head. Describe what the hands do "
        "in one short imperative sentence, for example: pick up the red cup.",
        "what the caption model is asked, after the frames",
    )
    caption_tokens: int = _option(48, "longest caption of the model, in its tokens")
    caption_batch: int = _option(8, "clips a batch of the caption model")
    caption_column: str = _option("caption", "column of the caption file; the videos are in its column 'file'")
    pictures: int = _option(6, "clips of each outcome whose frames a shard keeps for the report")

    def __post_init__(self):
        shares = ("face_score", "palm_score", "hand_score", "max_face_share", "min_hand_share")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it goes from 0 to 1")
        for name in ("samples", "caption_tokens", "caption_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.min_seconds <= self.clip_seconds:
            raise ConfigError(f"min_seconds is {self.min_seconds}; it goes from above 0 to clip_seconds")
        if self.shortest_edge < 32 or self.shortest_edge % 2:
            raise ConfigError(f"shortest_edge is {self.shortest_edge}; h264 needs an even number, and 32 or more")
        if min(self.fps, self.pictures) < 0 or not 0 <= self.quality <= 51:
            raise ConfigError(
                f"fps {self.fps} and pictures {self.pictures} are 0 or more, quality {self.quality} 0 to 51"
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option a field, with its default."""
    for field in dataclasses.fields(CurateConfig):
        shown = "" if isinstance(field.default, str) and len(field.default) > 20 else f" ({field.default})"
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            metavar=type(field.default).__name__.upper(),
            help=field.metadata["help"].replace("%", "%%") + shown,
        )


def from_options(arguments: argparse.Namespace) -> CurateConfig:
    """Raises ConfigError naming the option that cannot be used."""
    return CurateConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(CurateConfig)})
