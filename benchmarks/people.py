"""How often curation takes something else for a face, and how often it finds faces, by threshold. Prints JSON lines.

    python -m benchmarks.people

hands     a camera over photographs of bare hands (npm package fingerpose), in every position: a face in one is false
rendered  the simulated hand and arm that come with the package: a face in one is false
things    a camera over photographs without people (scikit-image): a face in one is false
faces     a camera over upright photographs with a face (scikit-image, fingerpose)
crops     scikit-image's 100 faces and 100 other pictures of 25 x 25 pixels, enlarged

Photographs are turned, moved, scaled and lit at random; a clip has four sampled frames. `one frame`: any detection in
one frame is a face. `defaults`: a detection that a hand fills does not count, and two of four frames must have one.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from data_pipelines import demo
from data_pipelines.curate.clips import judge
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.people import Found, People
from data_pipelines.sources import open_source
from rynnvla_jax.config import DataConfig
from tests import photographs

SCORES = (0.5, 0.6, 0.7, 0.8)
SIZE = (480, 360)  # pixels of a frame
CLIPS = 60  # of each photograph
GREY = (128, 128, 128)


def clips(photograph: np.ndarray, rng: np.random.Generator, turn: float) -> Iterator[list[np.ndarray]]:
    """Four frames each of a camera over the photograph, which is turned by up to `turn` degrees."""
    for _ in range(CLIPS):
        image = Image.fromarray(photograph).rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)
        scale = rng.uniform(0.45, 1.3) * min(SIZE[0] / image.width, SIZE[1] / image.height)
        small = image.resize((round(image.width * scale), round(image.height * scale)))
        light, at, frames = rng.uniform(0.5, 1.4), rng.uniform(0.2, 0.8, 2), []
        for _ in range(4):
            at = np.clip(at + rng.normal(0, 0.05, 2), 0, 1)
            frame = Image.new("RGB", SIZE, GREY)
            frame.paste(small, (round((SIZE[0] - small.width) * at[0]), round((SIZE[1] - small.height) * at[1])))
            frames.append(np.clip(np.asarray(frame, np.float32) * light, 0, 255).astype(np.uint8))
        yield frames


def rendered() -> Iterator[list[np.ndarray]]:
    """Four frames of every second and camera of the recordings that come with the package."""
    for source in (f"egodex:{demo.path('egodex')}", f"lerobot:{demo.path('so100')}"):
        for episode in open_source(source, DataConfig(), None, progress=False):
            for view in episode.views:
                for start in range(0, len(episode) - 30, 30):
                    yield list(episode.frames(view, range(start, start + 30, 8)))


def crops() -> np.ndarray:
    """uint8 [200, 240, 320, 3]: 100 faces, then 100 others."""
    frames = np.full((200, 240, 320, 3), 128, np.uint8)
    for frame, crop in zip(frames, skimage.data.lfw_subset(), strict=True):
        big = Image.fromarray((255 * crop).astype(np.uint8)).resize((120, 120), Image.Resampling.BICUBIC)
        frame[60:180, 100:220] = np.asarray(big)[..., None]
    return frames


def report(part: str, found: list[tuple[Found, ...]]) -> None:
    """One line per threshold: shares of the clips with a face, and of those that are kept."""
    for score in SCORES:
        shares = {}
        for name, config in (
            ("one frame", CurateConfig(face_score=score, max_face_share=0.0)),
            ("defaults", CurateConfig(face_score=score)),
        ):
            # Detections that a hand fills count under the first rule.
            seen = [tuple(Found((), f.faces) for f in clip) for clip in found] if name == "one frame" else found
            faces = [judge(clip, config)[0] == "face" for clip in seen]
            kept = [judge(clip, config)[0] == "kept" and not face for clip, face in zip(found, faces, strict=True)]
            shares[name] = {"face": round(float(np.mean(faces)), 3), "kept": round(float(np.mean(kept)), 3)}
        print(json.dumps({"part": part, "clips": len(found), "face_score": score, **shares}), flush=True)


def main() -> None:
    people, rng = People(CurateConfig()), np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="rynnvla-") as folder:
        photos = photographs.load(Path(folder) / "photographs")
    shipped = Path(skimage.data.__file__).parent
    more = {n: np.asarray(Image.open(shipped / f"{n}.png").convert("RGB")) for n in ("camera", "coins", "horse")}
    more["motorcycle"] = np.asarray(Image.open(shipped / "motorcycle_left.png").convert("RGB"))
    for part, turn, pictures in (
        ("hands", 180.0, [photos[name] for name in ("hand0", "hand1", "hand2")]),
        ("things", 180.0, [photos["cup"], photos["cat"], more["coins"], more["horse"], more["motorcycle"]]),
        ("faces", 20.0, [photos["face"], photos["both"], more["camera"]]),
    ):
        report(part, [tuple(map(people.find, frames)) for p in pictures for frames in clips(p, rng, turn)])
    report("rendered", [tuple(map(people.find, frames)) for frames in rendered()])
    scores = np.array([max((f.score for f in people.find(x).faces), default=0.0) for x in crops()])
    for score in SCORES:
        shares = {
            name: float((part >= score).mean()) for name, part in (("faces", scores[:100]), ("others", scores[100:]))
        }
        print(json.dumps({"part": "crops", "face_score": score, **shares}), flush=True)


if __name__ == "__main__":
    main()
