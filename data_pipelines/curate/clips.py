"""Processing of one video: cut it into clips, search them for people, encode them. Does not need Beam."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.footage import Footage, Span, cut, encode, sample, sample_times
from data_pipelines.curate.people import Found, People
from data_pipelines.episode import DataError

OUTCOMES = {
    "kept": "shows hands and no face; written to the corpus",
    "duplicate": "shows the same as another kept clip; in the corpus's files, but never read",
    "face": "shows a face, so it is third-person video",
    "no_hands": "shows no hands, or too few frames show hands",
    "no_caption": "shows hands and no face, but has no caption",
    "too_short": "the video is shorter than min_seconds",
    "unreadable": "the video cannot be opened or decoded",
}


@dataclass(eq=False)
class CandidateClip:
    """One clip, or (`span.index` -1) a video without clips. `reason` explains `outcome`, which is a key of `OUTCOMES`.

    `frames` uint8 [n, H, W, 3] are the samples at `times` (seconds within the video) and `found` the people in each, in
    pixels of the samples; both are empty where nothing was decoded. `mp4`, `count` and `fps` are set for kept clips.
    """

    video: str  # its path below the folder that was searched
    span: Span
    outcome: str
    reason: str = ""
    times: tuple[float, ...] = ()
    frames: np.ndarray | None = None
    found: tuple[Found, ...] = ()
    mp4: bytes = b""
    count: int = 0
    fps: float = 0.0
    caption: str = ""

    @property
    def clip_id(self) -> str:
        return f"{self.video}#{self.span.index:05d}"


def process_video(path: str, video: str, people: People, config: CurateConfig) -> Iterator[CandidateClip]:
    """The clips of the video at `path`, one at a time. The corpus uses the name `video` for it."""
    try:
        footage = Footage(path, config.shortest_edge)
    except DataError as error:
        yield CandidateClip(video, Span(-1, 0.0, 0.0), "unreadable", str(error))
        return
    with footage:
        if footage.seconds < config.min_seconds:
            yield CandidateClip(video, Span(-1, 0.0, footage.seconds), "too_short", f"{footage.seconds:.2f} s")
            return
        for span in cut(footage.seconds, config.clip_seconds):
            yield process_clip(footage, video, span, people, config)


def process_clip(footage: Footage, video: str, span: Span, people: People, config: CurateConfig) -> CandidateClip:
    """Kept, encoded and without a caption; or dropped."""
    clip = CandidateClip(video, span, "kept")
    try:
        clip.frames, clip.times = sample(footage, span, config.samples), tuple(sample_times(span, config.samples))
        clip.found = tuple(people.find(frame) for frame in clip.frames)
        clip.outcome, clip.reason = judge(clip.found, config)
        if clip.outcome == "kept":
            clip.mp4, clip.count, clip.fps = encode(footage, span, config.fps, config.quality)
    except DataError as error:
        clip.outcome, clip.reason = "unreadable", str(error)
    return clip


def judge(found: tuple[Found, ...], config: CurateConfig) -> tuple[str, str]:
    """(outcome, reason) of a clip by the people in its samples."""
    faces = sum(bool(f.faces_that_count(config.face_score)) for f in found)
    hands = sum(bool(f.hands) for f in found)
    if faces > config.max_face_share * len(found):
        return "face", f"a face in {faces} of {len(found)} frames"
    if hands < config.min_hand_share * len(found) or not hands:
        return "no_hands", f"hands in {hands} of {len(found)} frames"
    return "kept", f"hands in {hands} of {len(found)} frames"
