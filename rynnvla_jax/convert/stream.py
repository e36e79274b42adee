"""Orbax parameter folders, written and read slice by slice. Imports no torch.

Orbax itself copies every array it saves, and our stacked layers can be larger than a machine's memory.
So Orbax lays out a checkpoint of one-element arrays (plain zarr files, its documented non-OCDBT layout),
and TensorStore gives each array its true shape and contents. Stock Orbax restores the result.
"""

import contextlib
import math
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx

from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.checkpoint.base import open_weights
from rynnvla_jax.checkpoint.reader import (
    CheckpointError,
    Index,
    StoredArray,
    context,
    kvstore,
    step_folder,
)
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.deploy import export_format
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.storage import files

CHUNK_BYTES = 32 * 2**20
UNFINISHED = "unfinished"  # an object beside those of a model or an export that is being written to a bucket
_OF_MODEL = re.compile(
    r"checkpoints/0/.*|assets/(statistics|tokenizer)\.json"
    r"|assets/(vqgan|action_vae)/(checkpoints/0/.*|assets/(model|statistics)\.json)"
)  # not model.json, with which it is whole
_OF_EXPORT = re.compile(
    r"model[-\w]*\.safetensors(\.index\.json)?|(vqgan|action_vae)/(config\.json|model\.safetensors)"
    r"|(tokenizer|statistics|run|sha256|policy_preprocessor|policy_postprocessor)\.json"
)  # not config.json
IN_FLIGHT = 2  # pieces being compressed and written; each costs about three times its size


class Writer:
    """Writes pieces with a bounded number in flight; leaving the context waits for all of them."""

    def __init__(self):
        self._pending: deque[ts.WriteFutures] = deque()

    def write(self, array: StoredArray, index: Index, values: np.ndarray) -> None:
        self._pending.append(array.store[index].write(values))
        if len(self._pending) > IN_FLIGHT:
            _settle(self._pending.popleft())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error_type, *_) -> None:
        while self._pending:
            pending = self._pending.popleft()
            if error_type is None:
                _settle(pending)


def _settle(pending: ts.WriteFutures) -> None:
    try:
        pending.result()
    except ValueError as error:  # of TensorStore, for whatever a disk does
        raise ConversionError(f"cannot be written: {shorten(error)}") from error


def create_params(
    directory: str | Path, shapes: Mapping[str, tuple[int, ...]], stacked: set[str], step: int = 0
) -> dict[str, StoredArray]:
    """Lays out DIR/checkpoints/<step>/params for float32 arrays of these shapes; contents are to be written.

    Args:
      shapes: dotted path -> shape.
      stacked: paths whose leading axis is "layers": their chunks hold one layer or a part of one.
    """
    model_dir.check_path(files.place(directory).absolute())
    root = files.place(directory).absolute() / "checkpoints"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.CheckpointManager(root, item_handlers={"params": handler}) as manager:
        skeleton = {path: np.zeros((1,) * len(shape), np.float32) for path, shape in shapes.items()}
        manager.save(step, args=ocp.args.Composite(params=ocp.args.PyTreeSave(nest(skeleton))))
        manager.wait_until_finished()
    arrays = {}
    shared = context(root)
    for path, shape in shapes.items():
        spec = {
            "driver": "zarr",
            "kvstore": kvstore(root / str(step) / "params" / path),
            "metadata": {
                "shape": list(shape),
                "chunks": chunk_shape(shape, path in stacked),
                "dtype": "<f4",
                "compressor": {"id": "zstd", "level": 1},
                "fill_value": None,
                "filters": None,
                "order": "C",
                "dimension_separator": ".",
            },
            "store_data_equal_to_fill_value": True,
        }
        store = ts.open(spec, create=True, delete_existing=True, context=shared)
        arrays[path] = StoredArray(path, store)
    return arrays


def open_params(directory: str | Path, step: int, weights: str = "raw", merge: bool = True) -> dict[str, StoredArray]:
    """The parameters of a checkpoint that Orbax or `create_params` wrote, by dotted path; nothing is read yet.

    Args:
      weights: "raw", or "ema": their average.
      merge: False leaves low-rank adapters beside their matrices.

    Raises:
      ConversionError: not an Orbax parameter folder.
    """
    try:
        return open_weights(step_folder(directory, step), weights, merge)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None


def chunk_shape(shape: tuple[int, ...], stacked: bool) -> list[int]:
    """Chunks of at most CHUNK_BYTES float32: one layer, then powers of two along the leading axes."""
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    for axis in range(len(chunk)):
        size = 4 * math.prod(chunk)
        if size > CHUNK_BYTES:
            rows = max(1, CHUNK_BYTES * chunk[axis] // size)
            chunk[axis] = 2 ** (rows.bit_length() - 1)
    return chunk


@contextlib.contextmanager
def finished(out: str | Path) -> Iterator[Path]:
    """A temporary folder next to `out` that is renamed to `out` when the block succeeds and deleted when it fails.

    In a bucket, where nothing can be renamed, a model directory is made in place: model.json, which importers write
    last, makes it one.

    Raises:
      ConversionError: `out` exists already, or is in s3://.
    """
    out = files.place(out)
    if files.is_bucket(out):
        if not str(out).startswith("gs://"):
            raise ConversionError(
                f"{out}: models cannot be written to s3:// (Orbax); write to a folder of this machine, then copy it "
                "there with `aws s3 cp --recursive`"
            )
        with _in_place(out, _OF_MODEL):
            yield out
        return
    if out.exists():
        raise ConversionError(f"{out} exists already; give another folder or remove it")
    partial = out.parent / f"{out.name}.partial"
    files.remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        files.remove(partial)
        raise
    files.put(partial, out)


@contextlib.contextmanager
def finished_export(out: Path) -> Iterator[Path]:
    """As `finished`, for a folder of files that libraries write on this machine; config.json is uploaded last."""
    if not files.is_bucket(out):
        with finished(out) as partial:
            yield partial
        return
    with _in_place(out, _OF_EXPORT), tempfile.TemporaryDirectory(prefix="rynnvla-") as aside:
        yield Path(aside)
        files.copy_folder(Path(aside), out, last=export_format.CONFIG)


@contextlib.contextmanager
def _in_place(out: Path, own: re.Pattern) -> Iterator[None]:
    """Around writes to a prefix of a bucket, whose last object makes them whole. UNFINISHED is there meanwhile: what a
    killed process left with it, objects whose names match `own`, is deleted by the next; nothing else ever is.

    Raises:
      ConversionError: there are other objects below `out`.
    """
    from rynnvla_jax.storage import buckets  # imported here: its packages are extras

    buckets.check(out, write=True)
    mark = out / UNFINISHED

    def split() -> tuple[list[Path], list[str]]:
        found = {path.relative_to(out).as_posix(): path for path, _ in files.walk(out) if path != mark}
        ours = [path for name, path in found.items() if own.fullmatch(name) or name.startswith(buckets.PROBE)]
        return ours, sorted(name for name, path in found.items() if path not in ours)

    left, foreign = split()
    if not mark.exists():
        foreign += [path.name for path in left if not path.name.startswith(buckets.PROBE)]
    if foreign:
        shown = listing(foreign, 3)
        raise ConversionError(f"{out} exists already, with {shown}; give another folder or remove it")
    mark.write_bytes(b"")
    try:
        for path in left:
            path.unlink()
        yield
    except BaseException:
        for path in (*split()[0], mark):
            path.unlink(missing_ok=True)
        raise
    mark.unlink()


def abstract(build: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Shapes of a module's parameters as a nested dict; nothing is allocated."""
    return nnx.to_pure_dict(nnx.split(nnx.eval_shape(build))[1])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths -> nested dict."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree
