"""DIR/review/001.html ...: the clips that a possible face decides, for a person to judge by eye.

Sorted by how near the decision was. The first page tells how many clips other thresholds would keep; that needs no
pictures, since the ledger has all detections.
"""

from dataclasses import replace
from pathlib import Path

from data_pipelines.curate import ledger
from data_pipelines.curate.clips import judge
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.people import BONES, WEAK_FACE
from data_pipelines.curate.report import clip
from rynnvla_jax.pages import templates
from rynnvla_jax.storage import files

_CLIPS = 40  # on a page
_PAGES = 25
_SCORES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_JUDGED = ("kept", "face", "no_hands", "no_caption")  # outcomes of clips that were searched for people
_COLUMNS = ["clip_id", "outcome", "hands", "faces", "sample_seconds"]


def write(directory: Path, num_shards: int, config: CurateConfig, source: str) -> list[Path]:
    """Writes the pages of a finished corpus; returns them. `source` is what data.exclude calls the corpus."""
    near: list[tuple[float, int, str]] = []  # (distance from the threshold, shard, clip)
    counts = dict.fromkeys(_SCORES, 0)
    searched = 0
    for shard in range(num_shards):
        table = ledger.read(directory, shard, num_shards, columns=[*_COLUMNS, "pictures"])
        for row in table.to_pylist():
            if row["outcome"] not in _JUDGED:
                continue
            searched += 1
            found = tuple(ledger.people_of(row))
            for score in _SCORES:
                counts[score] += judge(found, replace(config, face_score=score))[0] == "kept"
            if row["pictures"] and row["faces"]:
                near.append((_distance(row, config), shard, row["clip_id"]))
    near.sort()
    shown, pages = near[: _CLIPS * _PAGES], []
    for number, first in enumerate(range(0, max(len(shown), 1), _CLIPS), 1):
        clips = [_shown(directory, num_shards, config, *which[1:]) for which in shown[first : first + _CLIPS]]
        page = templates.render(
            Path(__file__).with_name("review.html"),
            title=f"Faces in {directory.name}, page {number}",
            clips=clips,
            scores=[(score, kept, searched) for score, kept in counts.items()] if number == 1 else [],
            config=config,
            weak=WEAK_FACE,
            source=source,
            left=len(near) - len(shown),
            bones=BONES,
        )
        pages.append(directory / "review" / f"{number:03d}.html")
        pages[-1].parent.mkdir(exist_ok=True)
        files.write_text(pages[-1], page)
    return pages


def _distance(row: dict, config: CurateConfig) -> float:
    """How far the surest face of a clip is from the threshold."""
    return abs(max(f["score"] for f in row["faces"]) - config.face_score)


def _shown(directory: Path, num_shards: int, config: CurateConfig, shard: int, name: str) -> dict:
    filters = [("clip_id", "=", name)]
    (row,) = ledger.read(directory, shard, num_shards, columns=list(ledger.SCHEMA.names), filters=filters).to_pylist()
    return {**clip(row, config.face_score), "outcome": row["outcome"]}
