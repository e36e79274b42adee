"""DIR/report.html: which clips were kept and dropped, with the detected people marked. One self-contained page."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_pipelines.curate import ledger
from data_pipelines.curate.clips import OUTCOMES
from data_pipelines.curate.duplicates import Duplicate
from data_pipelines.curate.people import BONES
from rynnvla_jax.pages import templates
from rynnvla_jax.pages.plot_style import STYLE, address, svg
from rynnvla_jax.storage import files

_SHEETS = {
    "kept": ("Kept", "Detected hands are green, on every frame that was searched. The first line is the caption."),
    "face": ("Dropped: a face", "Faces that count are red; dashed are detections too weak, or that a hand fills."),
    "no_hands": ("Dropped: no hands", "Clips without hands, or with hands in too few of the searched frames."),
    "no_caption": ("Dropped: no caption", "Clips that would have been kept if they had a caption."),
}
_CLIPS = 6  # of each outcome on the page
_UNUSABLE = 20  # videos named


def write(directory: Path, num_shards: int, found: Mapping[str, Duplicate]) -> Path:
    """Writes the page of a corpus whose shards are all finished, with these duplicates; returns its path."""
    totals = ledger.totals(directory, num_shards, found)
    settings = files.read_json(directory / "curation.json")
    score = settings["face_score"]
    clips, hours = sum(totals.clips.values()), sum(totals.hours.values())
    kept = totals.clips["kept"]
    sheets = [
        {"title": title, "text": text, "clips": [clip(r, score) for r in _pictured(directory, num_shards, outcome)]}
        for outcome, (title, text) in _SHEETS.items()
        if totals.clips[outcome]
    ]
    columns = ("video", "outcome", "reason")
    unusable = [
        row
        for outcome in ("unreadable", "too_short")
        for row in ledger.examples(directory, num_shards, outcome, _UNUSABLE, columns)
    ]
    page = templates.render(
        Path(__file__).with_name("report.html"),
        title=f"Curation of {directory.name}",
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        totals=totals,
        tiles=[
            (f"{kept:,}", "clips kept"),
            (f"{kept / clips:.1%}", "of all clips"),
            (_duration(totals.hours["kept"]), f"of {_duration(hours)}"),
            (f"{np.mean(totals.lengths):.1f} s" if kept else "-", "mean length of a kept clip"),
        ],
        outcomes=[
            {
                "name": outcome,
                "text": text,
                "clips": f"{totals.clips[outcome]:,}",
                "share": f"{totals.clips[outcome] / clips:.1%}",
                "duration": _duration(totals.hours[outcome]),
                "width": 100 * totals.clips[outcome] / max(totals.clips.values()),
            }
            for outcome, text in OUTCOMES.items()
        ],
        lengths=_histogram(totals.lengths) if kept else "",
        sheets=sheets,
        unusable=unusable,
        duplicates=[(name, duplicate) for name, duplicate in sorted(found.items())[:_UNUSABLE]],
        settings=settings,
        bones=BONES,
    )
    out = directory / "report.html"
    files.write_text(out, page)
    return out


def _pictured(directory: Path, num_shards: int, outcome: str) -> list[dict]:
    return [r for r in ledger.examples(directory, num_shards, outcome, _CLIPS, ledger.SCHEMA.names) if r["pictures"]]


def clip(row: dict, face_score: float) -> dict[str, Any]:
    """What clip.html shows of one row of the ledger; points and boxes are in pixels of the clip, pictures fitted to it.

    `face_score`: from which a face counts.
    """
    frames = []
    everyone = ledger.people_of(row)
    for i, (picture, seconds) in enumerate(zip(row["pictures"], row["sample_seconds"], strict=True)):
        hands = [h for h in row["hands"] if h["sample"] == i]
        faces = [f for f in row["faces"] if f["sample"] == i]
        counting = [id(f) for f in everyone[i].faces_that_count(face_score)]
        scores = [f"hand {h['score']:.2f}" for h in hands] + [f"face {f['score']:.2f}" for f in faces]
        frames.append(
            {
                "picture": address("image/jpeg", picture),
                "hands": [np.round(np.reshape(h["points"], (21, 2)), 1).tolist() for h in hands],
                "faces": [(np.round(f.box, 1).tolist(), id(f) in counting) for f in everyone[i].faces],
                "label": ", ".join([f"{seconds:.1f} s", *scores]),
            }
        )
    return {
        "clip_id": row["clip_id"],
        "caption": row["caption"],
        "reason": row["reason"],
        "seconds": f"{row['seconds']:.1f} s",
        "start": f"{row['start']:.1f} s",
        "width": row["width"],
        "height": row["height"],
        "frames": frames,
    }


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _histogram(lengths: list[float]) -> str:
    """Lengths of kept clips, as a `data:` address."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.2))
        axes = figure.subplots()
        axes.hist(lengths, bins=min(40, max(5, len(lengths) // 5)), color="#1c6dd0", edgecolor="white", linewidth=0.5)
        axes.set_xlabel("seconds")
        axes.set_ylabel("kept clips")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return svg(figure)
