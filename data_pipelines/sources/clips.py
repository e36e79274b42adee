"""A folder of video clips with one caption each, for stage 1. No states, no actions, one view ("front").

The folder has captions.csv, captions.jsonl or captions.parquet with columns `file` (path relative to the folder) and
`caption`. Episodes are named by `file`.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import DataError, Episode, Episodes, rates_of, summarize
from data_pipelines.sources.exclude import left_in
from data_pipelines.sources.index import find_files, index_videos
from data_pipelines.video import VideoFrames
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

SUFFIXES = {".mp4", ".mkv", ".webm", ".mov"}
_CAPTIONS = ("captions.csv", "captions.jsonl", "captions.parquet")


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """One episode per clip, by path in natural order. Raises DataError naming the faulty clip or caption."""
    views = ("front",) if views is None else views
    if "wrist" in views:
        raise ConfigError(f"{root}: a folder of clips has no wrist camera; {ONE_CAMERA}")
    path, captions = captions_of(root)
    found = find_files(root, SUFFIXES)
    source = f"clips:{root}"
    # A caption of a clip that is gone can be left out too, so both are names.
    names = found + sorted(set(captions).difference(found))
    names = [names[i] for i in left_in(source, names, config)]
    present = set(found)
    for what, remedy, bad in (
        (f"has no caption in {path.name}", "add one", [n for n in names if not captions.get(n)]),
        (
            f"is listed in {path.name} but does not exist",
            "copy it, or remove the line",
            [n for n in names if n not in present],
        ),
    ):
        if bad:
            raise DataError(f"{root / bad[0]} {what} ({len(bad)} such clips); {remedy}, or list it in data.exclude")
    if not names:
        raise DataError(f"{root} contains no clip ({', '.join(sorted(SUFFIXES))}); correct data.source")
    videos = index_videos(root, names, progress)
    texts = [captions[name] for name in names]
    frames = np.array([v["frames"] for v in videos], np.int64)
    fps = np.array([v["fps"] for v in videos])
    sizes = np.array([(v["height"], v["width"]) for v in videos], np.int32)
    return Episodes(
        source=source,
        lengths=frames,
        read=_Clips(root, names, texts, frames, fps, sizes, bool(views)),
        texts=tuple(sorted(set(texts))),
        frame_sizes={(int(h), int(w)): f"{n} front" for n, (h, w) in reversed(list(zip(names, sizes, strict=True)))}
        if views
        else {},
        seconds=float((frames / fps).sum()),
        views=views,
        columns=Columns(),
        rates=rates_of(fps.tolist()),
        summaries=partial(summarize, names, [(text,) for text in texts], fps.tolist()),
    )


@dataclass(frozen=True, eq=False)
class _Clips:
    """Number -> Episode."""

    root: Path
    names: Sequence[str]
    texts: Sequence[str]
    frames: np.ndarray
    fps: np.ndarray
    sizes: np.ndarray
    with_view: bool

    def __call__(self, number: int) -> Episode:
        name, count, fps = self.names[number], int(self.frames[number]), float(self.fps[number])
        height, width = map(int, self.sizes[number])
        clip = VideoFrames(str(self.root / name), 0, count, fps, height, width)
        return Episode(
            name=name,
            texts=(self.texts[number],),
            text_of=np.zeros(count, np.int32),
            fps=fps,
            state=np.zeros((count, 0), np.float32),
            action=np.zeros((count, 0), np.float32),
            columns=Columns(),
            views={"front": clip} if self.with_view else {},
        )


def captions_of(root: Path) -> tuple[Path, dict[str, str]]:
    """(the file, {clip: caption}); a clip without a caption has ""."""
    there = [name for name in _CAPTIONS if (root / name).exists()]
    if len(there) != 1:
        raise DataError(
            f"{root} contains {' and '.join(there) or 'no captions'}; it must contain one of {', '.join(_CAPTIONS)}"
        )
    path = root / there[0]
    try:
        rows = _rows(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(files.damage(path, f"cannot be read ({shorten(error)}); write it again")) from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("file"), str) or "caption" not in row:
            raise DataError(f"{path}: row {i + 1} lacks file or caption; add both")
    pairs = [(PurePosixPath(row["file"].strip()).as_posix(), str(row["caption"] or "").strip()) for row in rows]
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise DataError(f"{path}: {twice[0]} is listed twice ({len(twice)} such files); keep one row per file")
    return path, dict(pairs)


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.select([c for c in ("file", "caption") if c in table.column_names]).to_pylist()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    return files.read_lines(path)
