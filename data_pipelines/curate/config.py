"""Settings of curation, one field per option of `rynnvla data curate`."""

from dataclasses import dataclass

from rynnvla_jax.config import ConfigError


@dataclass(frozen=True)
class CurateConfig:
    """All settings that determine the clips of a corpus and their content. Source: arXiv 2509.15212, section 3."""

    clip_seconds: float = 8.0
    """Length of a clip, in seconds; a video is cut into equal parts of about this length."""
    min_seconds: float = 2.0
    """Shorter videos (in seconds) are left out."""
    samples: int = 4
    """Frames per clip that are searched for people and shown to the caption model."""
    face_score: float = 0.6
    """Score from which a detection is a face, 0 to 1; one that a hand fills is none."""
    palm_score: float = 0.5
    """Score from which a detection is a palm, 0 to 1."""
    hand_score: float = 0.5
    """Score from which landmarks around a palm are a hand, 0 to 1."""
    max_face_share: float = 0.25
    """A clip with a face in a larger share of its samples is third person, and is dropped; of four, one may err."""
    min_hand_share: float = 0.5
    """A clip with a hand in a smaller share of its samples has no hands, and is dropped."""
    shortest_edge: int = 384
    """Shortest edge of clips, in pixels; larger videos are scaled down, none is scaled up."""
    fps: float = 0.0
    """Frames per second of clips; 0, or more than the video has, keeps the rate of the video."""
    quality: int = 23
    """Constant rate factor of h264: a lower value is better and larger."""
    caption_prompt: str = (
        "These frames are from a video that a person recorded with a camera on the head. Describe what the hands do "
        "in one short imperative sentence, for example: pick up the red cup."
    )
    """What the caption model is asked, after the frames."""
    caption_tokens: int = 48
    """Longest caption of the model, in its tokens."""
    caption_batch: int = 8
    """Clips per batch of the caption model."""
    caption_column: str = "caption"
    """Column of the caption file; the videos are in its column 'file'."""
    pictures: int = 6
    """Clips per outcome whose frames a shard keeps for the report."""

    def __post_init__(self):
        shares = ("face_score", "palm_score", "hand_score", "max_face_share", "min_hand_share")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("samples", "caption_tokens", "caption_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.min_seconds <= self.clip_seconds:
            raise ConfigError(f"min_seconds is {self.min_seconds}; it must be more than 0 and at most clip_seconds")
        if self.shortest_edge < 32 or self.shortest_edge % 2:
            raise ConfigError(
                f"shortest_edge is {self.shortest_edge}; it must be an even number of at least 32, for h264"
            )
        if min(self.fps, self.pictures) < 0 or not 0 <= self.quality <= 51:
            raise ConfigError(
                f"fps is {self.fps}, pictures {self.pictures}, quality {self.quality}; "
                "fps and pictures must be 0 or more, quality 0 to 51"
            )
