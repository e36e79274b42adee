"""Outcome of every input: one row per clip (one row per video without clips), one parquet file per shard.

The file's metadata identify the inputs of the shard, so that a shard is made again when they change.
"""

import contextlib
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines.corpus import records
from data_pipelines.curate.clips import OUTCOMES, CandidateClip
from data_pipelines.curate.people import Face, Found, Hand
from data_pipelines.thumbnails import brightness, small_copy
from rynnvla_jax.storage import files

_EDGE = 240  # pixels of the longest edge of a picture
_ROWS = 512  # held in memory before they are written
_INPUTS = b"inputs"
_SUMS = 8  # of a fingerprint
_THREADS = 16  # ledgers that are opened at the same time


def _people(geometry: str, size: int) -> pa.DataType:
    fields = [("sample", pa.int32()), ("score", pa.float32()), (geometry, pa.list_(pa.float32(), size))]
    return pa.list_(pa.struct(fields))


SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video", pa.string()),
        ("clip", pa.int32()),  # -1: the whole video
        ("start", pa.float64()),  # seconds within the video
        ("seconds", pa.float64()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("caption", pa.string()),
        ("sample_seconds", pa.list_(pa.float64())),  # within the video
        ("width", pa.int32()),  # of the samples and of the clip; landmarks and boxes are in its pixels
        ("height", pa.int32()),
        ("hands", _people("points", 42)),  # x and y of 21 landmarks, wrist first
        ("faces", _people("box", 4)),  # left, top, right, bottom
        ("pictures", pa.list_(pa.binary())),  # JPEGs of the samples, for a few clips of each outcome
        ("digest", pa.binary()),  # of the encoded clip; this and the next are set for kept clips
        ("copies", pa.binary()),  # small copies of the samples, uint8 [samples, 256]: see `data_pipelines.thumbnails`
        ("fingerprint", pa.binary()),  # and a few numbers in which alike clips are alike, float32 [8]
    ]
)


def path(directory: Path, shard: int, num_shards: int) -> Path:
    return directory / "curation" / f"{shard:05d}-of-{num_shards:05d}.parquet"


def inputs_of(directory: Path, num_shards: int) -> list[str | None]:
    """For each shard the digest of the inputs that it was made from; None when it is not finished."""
    ledgers = files.listing(directory / "curation")

    def one(shard: int, done: bool) -> str | None:
        file = path(directory, shard, num_shards)
        if not done or file.name not in ledgers:
            return None
        try:
            with file.open("rb") as content:
                return pq.read_schema(content).metadata[_INPUTS].decode()
        except (pa.ArrowException, KeyError, TypeError):
            print(f"{file} is damaged; its shard is made again", file=sys.stderr)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, range(num_shards), records.shards_done(directory, num_shards)))


class Ledger:
    """Writes the rows of one shard; made by `written`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, pictures: int):
        self._writer, self._schema, self._pictures = writer, schema, pictures
        self._rows: list[dict] = []
        self.counts: Counter[str] = Counter()

    def add(self, clip: CandidateClip) -> None:
        self.counts[clip.outcome] += 1
        row = _row(clip)
        if clip.frames is not None and self.counts[clip.outcome] <= self._pictures:
            row["pictures"] = [_jpeg(frame) for frame in clip.frames]
        self._rows.append(row)
        if len(self._rows) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


@contextlib.contextmanager
def written(directory: Path, shard: int, num_shards: int, inputs: str, pictures: int) -> Iterator[Ledger]:
    """The ledger of a shard made from `inputs`; the file appears when the context ends without an error.

    `pictures`: number of clips per outcome whose sampled frames are stored.
    """
    file = path(directory, shard, num_shards)
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = SCHEMA.with_metadata({_INPUTS: inputs.encode()})
    with files.replacing(file) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        rows = Ledger(writer, schema, pictures)
        yield rows
        rows.flush()


@dataclass(frozen=True)
class Totals:
    """By outcome: number of clips (or of videos without clips) and their hours. `lengths` of kept clips, in seconds."""

    clips: dict[str, int]
    hours: dict[str, float]
    lengths: list[float]
    videos: int


def totals(directory: Path, num_shards: int, duplicates: Container[str] = ()) -> Totals:
    """Totals over all shards, read column by column so that millions of clips fit in memory.

    Kept clips whose name is among `duplicates` count as such.
    """
    clips, hours = dict.fromkeys(OUTCOMES, 0), dict.fromkeys(OUTCOMES, 0.0)
    lengths, videos = [], 0
    for shard in range(num_shards):
        table = read(directory, shard, num_shards, columns=["clip_id", "video", "outcome", "seconds"])
        videos += len(table["video"].unique())
        columns = (table[name].to_pylist() for name in ("clip_id", "outcome", "seconds"))
        for name, outcome, seconds in zip(*columns, strict=True):
            if outcome == "kept" and name in duplicates:
                outcome = "duplicate"
            clips[outcome] += 1
            hours[outcome] += seconds / 3600
            if outcome == "kept":
                lengths.append(seconds)
    return Totals(clips, hours, lengths, videos)


def examples(directory: Path, num_shards: int, outcome: str, count: int, columns: Sequence[str]) -> list[dict]:
    """Up to `count` rows of an outcome, from as many shards as possible, in a fixed order."""
    found: list[Iterator[dict]] = []
    filters = [("outcome", "=", outcome)]
    for shard in range(min(num_shards, 4 * count)):
        table = read(directory, shard, num_shards, columns=list(columns), filters=filters)
        found.append(iter(table.slice(0, count).to_pylist()))
    rows: list[dict] = []
    while found and len(rows) < count:  # in turns
        turn = [(rest, row) for rest in found if (row := next(rest, None)) is not None]
        found, rows = [rest for rest, _ in turn], rows + [row for _, row in turn]
    return rows[:count]


def read(directory: Path, shard: int, num_shards: int, **options: Any) -> pa.Table:
    """Some columns or rows of a shard's ledger; `options` are those of `pyarrow.parquet.read_table`."""
    with path(directory, shard, num_shards).open("rb") as content:
        return pq.read_table(content, **options)


def fingerprint(copies: np.ndarray) -> np.ndarray:
    """float32 [8] of the small copies [samples, cells]: sums of all cells with random signs, the same in all corpora.

    Pictures that differ in a few cells only differ in these sums, while small errors in all cells cancel.
    """
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (copies.size, _SUMS))
    return (copies.ravel() @ signs).astype(np.float32)


def people_of(row: dict) -> list[Found]:
    """The people of each sample of a row that has the columns hands, faces and sample_seconds."""
    hands, faces = row["hands"], row["faces"]
    return [
        Found(
            tuple(Hand(np.reshape(h["points"], (21, 2)), h["score"]) for h in hands if h["sample"] == i),
            tuple(Face(np.asarray(f["box"]), f["score"]) for f in faces if f["sample"] == i),
        )
        for i in range(len(row["sample_seconds"]))
    ]


def _row(clip: CandidateClip) -> dict:
    height, width = clip.frames.shape[1:3] if clip.frames is not None else (0, 0)
    copies = print_of = digest = b""
    if clip.outcome == "kept" and clip.frames is not None:
        small = np.stack([small_copy(brightness(frame)) for frame in clip.frames])
        copies, print_of = small.round().astype(np.uint8).tobytes(), fingerprint(small).tobytes()
        digest = hashlib.sha256(clip.mp4).digest()[:16]
    return {
        "clip_id": clip.clip_id if clip.span.index >= 0 else "",
        "video": clip.video,
        "clip": clip.span.index,
        "start": clip.span.start,
        "seconds": clip.span.seconds,
        "outcome": clip.outcome,
        "reason": clip.reason,
        "caption": clip.caption,
        "sample_seconds": list(clip.times),
        "width": width,
        "height": height,
        "hands": [
            {"sample": i, "score": hand.score, "points": hand.points.ravel()}
            for i, found in enumerate(clip.found)
            for hand in found.hands
        ],
        "faces": [
            {"sample": i, "score": face.score, "box": face.box}
            for i, found in enumerate(clip.found)
            for face in found.faces
        ],
        "pictures": [],
        "digest": digest,
        "copies": copies,
        "fingerprint": print_of,
    }


def _jpeg(frame) -> bytes:
    image = Image.fromarray(frame)
    image.thumbnail((_EDGE, _EDGE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
