"""Corpora on disk: a folder of ArrayRecord shards that TFDS reads too (`tfds.builder_from_directory`).

    DIR/corpus-train.array_record-00000-of-00012   records, `group_size:1` for random access
    DIR/manifest/00000-of-00012.parquet            a row per record: clip_id, captions, steps, seconds, height, width
    DIR/{dataset_info,features}.json               TFDS
    DIR/corpus.json, lengths.npy                   what all records share; steps of each record, int32 [n]
    DIR/duplicates.json                            records that readers leave out, and of which other each is a copy

A record holds one `Episode`. Frames are one mp4 per view, or VQ codes of every `stride`-th step; arrays are raw bytes.
A shard is written under a temporary name and then renamed, or uploaded to a bucket, so it is either complete or absent.
`finish` writes the files that describe all shards.

Source: TFDS folder data sets with ArrayRecord files; no TensorFlow.
"""

import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import parquet_files
from data_pipelines.episode import DataError, rates_of
from data_pipelines.video import probe
from rynnvla_jax import metadata
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.metadata import Between, Count, Entries, Index
from rynnvla_jax.sequence import PATCH
from rynnvla_jax.storage import files

if TYPE_CHECKING:  # imported where it is used: it takes a second, and every training process imports this file
    import tensorflow_datasets as tfds

LENGTHS, DUPLICATES = "lengths.npy", "duplicates.json"
SCHEMA = (2, 0)  # major: readers refuse a newer one; minor: fields were added
# Object stores serve large reads best, a lost shard must not cost hours, and a pod's hosts need some each.
SHARD_BYTES = 256 * 2**20
_THREADS = 16  # parts of the manifest that are read at the same time
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class CorpusLayout:
    """What all records of a corpus share.

    `grid` (h/16, w/16) is the grid of the VQ codes, () where frames are video. Every `stride`-th step has codes, made
    by the VQGAN whose weights have the hash `vqgan`, from frames prepared with `image` (ImageConfig in JSON). `world`:
    actions are positions in a world frame (`Episode.origin`, `Episode.world_to_camera`).
    """

    views: tuple[str, ...] = ("front",)
    grid: Annotated[tuple[Annotated[int, Between(1, 2**12)], ...], Entries(0, 2)] = ()
    stride: Annotated[int, Between(1, 2**20)] = 1
    columns: Columns = Columns()
    world: bool = False
    vqgan: str = ""
    image: str = ""

    def features(self) -> "tfds.features.FeaturesDict":
        """TFDS features of one record; fields that the corpus does not have are left out."""
        import tensorflow_datasets as tfds

        def tensor(dtype, *shape):
            return tfds.features.Tensor(shape=(None, *shape), dtype=dtype, encoding="bytes")

        fields: dict[str, Any] = {
            "clip_id": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "caption_of": tensor(np.int32),
            "fps": tfds.features.Scalar(np.float32),
        }
        for view in self.views:
            if self.grid:
                fields[f"{view}_codes"] = tensor(np.uint16, *self.grid)
            else:
                fields[f"{view}_video"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        state_width, action_width = len(self.columns.state), len(self.columns.action)
        if state_width:
            fields["state"] = tensor(np.float32, state_width)
        if action_width:
            fields["action"] = tensor(np.float32, action_width)
        if self.world:
            fields["origin"] = tensor(np.float32, action_width)
            fields["world_to_camera"] = tensor(np.float32, 3, 3)
        return tfds.features.FeaturesDict(fields)


CLIPS = CorpusLayout()  # captioned video clips without states or actions


def video_record(clip_id: str, caption: str, fps: float, front_video: bytes, num_frames: int) -> Record:
    """A record of layout `CLIPS`; `front_video` is an mp4 with a key frame every 30 frames or fewer."""
    return {
        "clip_id": clip_id,
        "captions": [caption],
        "caption_of": np.zeros(num_frames, np.int32),
        "fps": fps,
        "front_video": front_video,
    }


def shard_name(shard: int, num_shards: int) -> str:
    """The file name that TFDS uses."""
    return f"corpus-train.array_record-{shard:05d}-of-{num_shards:05d}"


def manifest_path(directory: str | Path, shard: int, num_shards: int) -> Path:
    """The shard's part of the manifest."""
    return files.place(directory) / "manifest" / f"{shard:05d}-of-{num_shards:05d}.parquet"


def shards_done(directory: str | Path, num_shards: int) -> list[bool]:
    """Whether each shard and its part of the manifest exist; each is either complete or absent."""
    directory = files.place(directory)
    shards, parts = files.listing(directory), files.listing(directory / "manifest")
    return [
        shard_name(s, num_shards) in shards and manifest_path(directory, s, num_shards).name in parts
        for s in range(num_shards)
    ]


def write_shard(
    directory: str | Path, shard: int, num_shards: int, records: Iterable[Record], layout: CorpusLayout = CLIPS
) -> int:
    """Writes one shard and its part of the manifest; returns how many records it has.

    Raises DataError naming the record whose fields do not fit `layout`.
    """
    directory = files.place(directory)
    final, manifest = directory / shard_name(shard, num_shards), manifest_path(directory, shard, num_shards)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(manifest) as table, files.replacing(final) as partial:  # the manifest last: it ends the shard
        rows = _write_records(partial, records, layout)
        pq.write_table(pa.Table.from_pylist(rows, schema=_MANIFEST), table)
    return len(rows)


def _write_records(path: Path, records: Iterable[Record], layout: CorpusLayout) -> list[dict]:
    """Rows of the manifest."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    features, rows = layout.features(), []
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            height, width = _check(record, layout, features)
            # Protocol buffers write maps in an order that changes from process to process unless asked not to.
            example = tf_example_pb2.Example.FromString(features.serialize_example(record))
            writer.write(example.SerializeToString(deterministic=True))
            steps = len(record["caption_of"])
            rows.append(
                {
                    "clip_id": record["clip_id"],
                    "captions": list(record["captions"]),
                    "steps": steps,
                    "seconds": steps / float(record["fps"]),
                    "height": height,
                    "width": width,
                }
            )
    finally:
        writer.close()
    return rows


_MANIFEST = pa.schema(
    [
        ("clip_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("steps", pa.int32()),
        ("seconds", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)


def _check(record: Record, layout: CorpusLayout, features: "tfds.features.FeaturesDict") -> tuple[int, int]:
    """Height and width of the front frames, in pixels."""
    name = record.get("clip_id", "a record")
    if missing := features.keys() - record.keys():
        raise DataError(
            f"{name} lacks {', '.join(sorted(missing))}, which every record of the corpus must have; correct the source"
        )
    if extra := record.keys() - features.keys():
        raise DataError(f"{name} has {', '.join(sorted(extra))}, which the corpus does not have; correct the layout")
    steps = len(record["caption_of"])
    if not steps or not record["captions"] or not all(c.strip() for c in record["captions"]):
        raise DataError(f"{name} has {steps} steps and captions {record['captions']}; leave it out or correct it")
    for key in ("state", "action", "origin", "world_to_camera"):
        if key in record and len(record[key]) != steps:
            raise DataError(f"{name}: {key} has {len(record[key])} rows for {steps} steps; correct the source")
    sizes = []
    for view in layout.views:
        if layout.grid:
            found, size = len(record[f"{view}_codes"]), (layout.grid[0] * PATCH, layout.grid[1] * PATCH)
        else:
            clip = probe(f"{name} {view}", record[f"{view}_video"])
            found, size = clip.count, (clip.height, clip.width)
        sizes.append(size)
        if found != -(-steps // layout.stride):
            raise DataError(
                f"{name}: {view} has {found} frames, one per {layout.stride} of {steps} steps; correct the source"
            )
    return sizes[0] if sizes else (0, 0)


def finish(directory: str | Path, num_shards: int, about: Mapping[str, Any], layout: CorpusLayout = CLIPS) -> dict:
    """Writes the files that describe a corpus whose shards are complete; returns the content of corpus.json.

    `about` is free text that says where the corpus comes from. Raises DataError naming shards that are missing.
    """
    directory = files.place(directory)
    if missing := [s for s, done in enumerate(shards_done(directory, num_shards)) if not done]:
        raise DataError(
            f"{directory}: {len(missing)} of {num_shards} shards are missing, the first is shard "
            f"{missing[0]}; run the command that writes them again"
        )
    columns, digest, parts = ["steps", "seconds", "height", "width"], hashlib.sha256(), []
    paths = [manifest_path(directory, s, num_shards) for s in range(num_shards)]
    for path, content in zip(paths, _each(Path.read_bytes, paths), strict=True):
        digest.update(content)
        try:
            parts.append(pq.read_table(io.BytesIO(content), columns=columns))
        except pa.ArrowException as error:
            raise DataError(
                f"{path} cannot be read ({shorten(error)}); delete it and run the command that writes the corpus again"
            ) from None
    counts, table = [len(t) for t in parts], pa.concat_tables(parts)
    if not len(table):
        raise DataError(f"{directory}: no shard has any record; check why the inputs were left out")
    steps = table["steps"].to_numpy().astype(np.int32)
    shards = files.listing(directory)
    size = sum(shards[shard_name(s, num_shards)].size for s in range(num_shards))
    _write_tfds(directory, layout, counts, size)
    lengths = io.BytesIO()
    np.save(lengths, steps)
    files.write_bytes(directory / LENGTHS, lengths.getvalue())
    corpus = {
        "schema": list(SCHEMA),
        "layout": dataclasses.asdict(layout),
        "shard_lengths": counts,
        "records": len(steps),
        "steps": int(steps.sum(dtype=np.int64)),
        **extent(table),
        "bytes": size,
        "manifest": digest.hexdigest(),
        "sha256": {LENGTHS: hashlib.sha256(lengths.getvalue()).hexdigest()},
        "duplicates": len(_duplicates(directory)),
        "about": dict(about),
    }
    files.write_json(directory / "corpus.json", corpus)
    return corpus


def write_duplicates(directory: Path, of: Mapping[str, str]) -> None:
    """Names the records that are copies of another one; `of` maps each to the one that stays."""
    if of:
        files.write_json(directory / DUPLICATES, {"duplicates": dict(sorted(of.items()))})
    else:
        (directory / DUPLICATES).unlink(missing_ok=True)


def duplicates(directory: Path, corpus: Mapping[str, Any]) -> set[str]:
    """The records that readers leave out, where `corpus` (corpus.json) says that there are some and the file was not
    deleted. Raises DataError naming the file when it is damaged."""
    return _duplicates(directory) if corpus.get("duplicates") else set()


def _duplicates(directory: Path) -> set[str]:
    path = directory / DUPLICATES
    try:
        content = metadata.checked({"duplicates": dict[str, str]}, files.read_json(path), str(path))
    except FileNotFoundError:
        return set()
    except files.DamagedFileError as error:
        raise DataError(f"{error}; run the command that writes it again, or delete it to keep all records") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); copy it again") from None
    return set(content["duplicates"])


def _write_tfds(directory: Path, layout: CorpusLayout, shard_lengths: list[int], size: int) -> None:
    """Writes dataset_info.json and features.json."""
    import tensorflow_datasets as tfds

    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    with tempfile.TemporaryDirectory(prefix="rynnvla-") as aside:
        Path(aside, shard_name(0, len(shard_lengths))).touch()  # the names of shards are looked at
        where = tfds.core.ShardedFileTemplate(
            data_dir=aside, dataset_name="corpus", split="train", filetype_suffix="array_record", template=template
        )
        split = tfds.core.SplitInfo(name="train", shard_lengths=shard_lengths, num_bytes=size, filename_template=where)
        tfds.folder_dataset.write_metadata(
            data_dir=aside,
            features=layout.features(),
            split_infos=[split],
            filename_template=template,
            check_data=False,
            description="Clips for rynnvla_jax.",
        )
        for path in sorted(Path(aside).glob("*.json")):
            files.write_bytes(directory / path.name, path.read_bytes())


def _each(read: Callable[[Path], T], paths: Sequence[Path]) -> Iterator[T]:
    """`read` of every path, in order; a few at the same time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(paths), _THREADS):
            yield from pool.map(read, paths[first : first + _THREADS])


def extent(table: pa.Table) -> dict[str, Any]:
    """Values of corpus.json computed from rows of the manifest: total seconds, steps per second, and record counts per
    frame size."""
    fps = table["steps"].to_numpy() / table["seconds"].to_numpy()
    sizes = table.group_by(["height", "width"]).aggregate([([], "count_all")]).to_pylist()
    return {
        "seconds": float(table["seconds"].to_numpy().sum()),
        "rates": list(rates_of(np.unique(fps).tolist())),
        "frame_sizes": [[s["height"], s["width"], s["count_all"]] for s in sizes],
    }


def read_manifest(directory: str | Path, shard_lengths: Sequence[int], columns: list[str]) -> Iterator[pa.Table]:
    """The manifest, shard by shard. Raises DataError naming a part that is missing, damaged or has a wrong length."""
    parts = [manifest_path(directory, shard, len(shard_lengths)) for shard in range(len(shard_lengths))]
    tables = _each(lambda part: parquet_files.read_table(part, columns), parts)
    for part, count, found in zip(parts, shard_lengths, tables, strict=True):
        try:
            table = found.cast(pa.schema([_MANIFEST.field(name) for name in columns]))
        except pa.ArrowException as error:
            raise DataError(f"{part} cannot be read ({shorten(error)}); copy it again") from None
        if nulls := [name for name in columns if table[name].null_count]:
            raise DataError(f"{part}: {nulls[0]} is not given for every record; copy it again")
        if len(table) != count:
            raise DataError(
                f"{part} has {len(table)} rows for {count} records; "
                "delete it and run the command that writes the corpus again"
            )
        yield table


@dataclass(frozen=True)
class _Schema:
    """What every corpus.json says, also a newer one."""

    schema: tuple[Index, Index]


@dataclass(frozen=True)
class _Layout10:
    """What schema 1.0 said of columns."""

    unit: str = ""
    absolute: tuple[Index, ...] = ()
    state_width: Annotated[int, Between(0, 2**16)] = 0
    action_width: Annotated[int, Between(0, 2**16)] = 0
    world: bool = False


@dataclass(frozen=True)
class _Corpus:
    """What is read of corpus.json."""

    layout: Any
    shard_lengths: Annotated[list[Count], Entries(1, 2**20)]
    records: Count
    seconds: Annotated[float, Between(0, 2**50)]
    frame_sizes: list[tuple[Index, Index, Count]]
    manifest: str
    rates: list[Annotated[float, Between(0, 2**20)]] = field(default_factory=list)  # older corpora have none
    sha256: dict[str, str] = field(default_factory=dict)  # of lengths.npy; older corpora have none
    duplicates: Count = 0


def _today(layout: Any, where: str) -> Any:
    """The layout of a corpus of schema 1.0, which states `unit`, `absolute` and two widths, as today's."""
    if not isinstance(layout, dict) or "columns" in layout:
        return layout
    old = metadata.parse(_Layout10, layout, f"{where}: layout")
    if old.action_width and any(c >= old.action_width for c in old.absolute):
        raise ConfigError("absolute columns are outside the action")
    kept = set(old.absolute)
    if not old.world and len(kept) < old.action_width and old.state_width != old.action_width:
        raise ConfigError("states have another width than the relative actions")
    columns = Columns.unstated(old.unit, old.state_width, old.action_width, old.absolute)
    return {**layout, "columns": columns.to_json()}


def read_corpus(directory: str | Path) -> tuple[dict, CorpusLayout]:
    """corpus.json and its layout. Raises DataError for a folder that is not a finished corpus, or a newer schema."""
    path = files.place(directory) / "corpus.json"
    try:
        corpus = files.read_json(path)
        major, minor = metadata.parse(_Schema, corpus, str(path)).schema
        if major > SCHEMA[0]:
            raise DataError(
                f"{path} has schema {major}.{minor}, newer than {SCHEMA[0]}.{SCHEMA[1]}; update rynnvla_jax"
            )
        described = metadata.parse(_Corpus, corpus, str(path))
        layout = metadata.parse(CorpusLayout, _today(described.layout, str(path)), f"{path}: layout")
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: this is not a corpus, or it is not finished; run the command that writes it again"
        ) from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; run the command that writes it again") from None
    except ConfigError as error:
        raise DataError(f"{path}: {error}; run the command that writes it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); copy it again") from None
    for fault, what in (
        (sum(described.shard_lengths) != described.records or not described.records, "records is not the sum of"),
        (len(set(layout.views)) < len(layout.views), "views are not those of"),
        (len(layout.grid) == 1, "grid has one edge in"),
        (layout.world and (len(layout.columns.action) % 3 or not layout.columns.action), "actions are no positions in"),
    ):
        if fault:
            raise DataError(f"{path}: {what} the corpus; run the command that writes it again")
    return corpus, layout
