"""Reads checkpoints on disk without JAX: lists steps, reads arrays piece by piece, and verifies them.

    DIR/checkpoints/<step>/{params,train_state}/  arrays, as Orbax writes them
    DIR/checkpoints/<step>/data/                  JSON: {"step": ..., "skipped": [...], "best": {...}}
    DIR/checkpoints/<step>/run/                   JSON: code, configuration and data of the run (provenance.py)
    DIR/checkpoints/<step>/config/                JSON: the resolved config, which says what the weights mean
    DIR/checkpoints/<step>/base/                  JSON: of a run that trains a part of the weights, the others (base.py)
    DIR/checkpoints/<step>/fingerprints/          JSON: array or JSON item -> fingerprint, computed at the save
    DIR/checkpoints/<step>/verified.json          the mark: every array was read back and has its fingerprint
    DIR/checkpoints/damaged/<step>/               set aside because an array differs; nothing deletes it

A fingerprint is the sum modulo 2^32, over the elements of an array, of a hash of the element's bits and its position.
So it does not depend on the sharding, and several processes can each read a part: their sums add up. A change of one
element is always detected; any other damage is missed once in 2^32 cases.
"""

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorstore as ts

from rynnvla_jax.checkpoint import best as best_lib
from rynnvla_jax.config import BEST, NEWEST
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.storage import files

ITEMS = ("params", "train_state")
AVERAGE = ".average."  # in a path of train_state; the parameter's path follows
MARK = "verified.json"
COMMIT = "commit_success.txt"  # in a bucket Orbax writes it last: there a folder with a step's name is not yet a step
JSON_ITEMS = ("data", "run", "config", "base")  # of a step, beside its arrays
DAMAGED = "damaged"
READ_AHEAD = 2  # pieces (32 MB each, as we write them) in memory beside the one that is hashed
CACHE_BYTES = 32 * 2**20  # of what describes arrays in a bucket
BLOCK = 2**16  # elements hashed at once: they stay in the processor's cache

Index = tuple[slice, ...]
Place = tuple[slice | int, ...]
_committed: set[str] = set()  # folders in buckets that this process has seen complete


class CheckpointError(RuntimeError):
    """A checkpoint or model directory that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class StoredArray:
    """One array on disk."""

    path: str  # dotted
    opening: ts.Future  # arrays are opened side by side; what is wrong with one shows when it is used
    change: Callable[[np.ndarray, Place], np.ndarray] | None = None  # what readers get for the values at an index

    @property
    def store(self) -> ts.TensorStore:
        return self.opening.result()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, layer: int | None = None) -> Iterator[Index]:
        """Indices that cover the array, or one of its layers, along chunk boundaries."""
        chunk = cast(tuple[int, ...], self.store.chunk_layout.read_chunk.shape or ())  # None of a scalar
        first = [range(0, n, c) for n, c in zip(self.shape, chunk, strict=True)]
        sizes = list(chunk)
        if layer is not None:
            first[0], sizes[0] = range(layer, layer + 1), 1

        def walk(axis: int, index: Index) -> Iterator[Index]:
            if axis == len(first):
                yield index
                return
            for start in first[axis]:
                yield from walk(axis + 1, (*index, slice(start, min(start + sizes[axis], self.shape[axis]))))

        return walk(0, ())

    def read(self, index: Place = ()) -> np.ndarray:
        """The values at `index`, materialised."""
        return self.changed(self.store[index].read().result(), index)

    def changed(self, values: np.ndarray, index: Place = ()) -> np.ndarray:
        """What readers get for the stored values at `index`."""
        return values if self.change is None else self.change(values, index)

    def then(self, change: Callable[[np.ndarray, Place], np.ndarray]) -> "StoredArray":
        """The same array, whose readers get `change(values, index)`."""
        return replace(self, change=lambda values, index: change(self.changed(values, index), index))


def open_arrays(folder: str | Path) -> dict[str, StoredArray]:
    """The arrays of an Orbax folder by dotted path; no values are read.

    Raises:
      CheckpointError: not an Orbax folder.
    """
    folder = files.place(folder).absolute()
    try:
        metadata = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
        leaves = metadata["tree_metadata"].values()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not an Orbax folder of arrays: _METADATA is missing") from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/_METADATA cannot be read: {error}") from None
    arrays = {}
    shared, options, together = context(folder), {}, {}
    if files.is_bucket(folder):  # else each piece asks again for what describes it: twenty requests an array
        options = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
        together = {
            "experimental_read_coalescing_threshold_bytes": 2**20,
            "experimental_read_coalescing_merged_bytes": 2**25,
            "experimental_read_coalescing_interval": "5ms",
        }
    for leaf in leaves:
        if leaf["value_metadata"]["skip_deserialize"]:
            continue  # an empty node of the tree
        path = ".".join(part["key"] for part in leaf["key_metadata"])
        source = kvstore(folder / path)
        if metadata.get("use_ocdbt", True):
            source = {"driver": "ocdbt", "base": kvstore(folder), "path": f"{path}/", **together}
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        spec = {"driver": driver, "kvstore": source, **options}
        arrays[path] = StoredArray(path, ts.open(spec, open=True, context=shared))
    return arrays


def open_step(folder: Path) -> dict[str, StoredArray]:
    """All arrays of a step by dotted path: params.*, train_state.*.

    Raises:
      CheckpointError: the parameters are missing or an item's metadata cannot be read.
    """
    items = [item for item in ITEMS if item == "params" or (folder / item).exists()]
    return {f"{item}.{path}": a for item in items for path, a in open_arrays(folder / item).items()}


def kvstore(path: Path) -> dict[str, Any]:
    """A folder, local or in a bucket, as TensorStore names it."""
    if not files.is_bucket(path):
        return {"driver": "file", "path": f"{path}/"}
    _, store, bucket, *parts = path.parts
    spec: dict[str, Any] = {"driver": {"gs": "gcs"}.get(store, store), "bucket": bucket, "path": "/".join([*parts, ""])}
    if store == "s3":  # TensorStore does not read these variables
        names = {"endpoint": "AWS_ENDPOINT_URL", "aws_region": "AWS_DEFAULT_REGION"}
        spec |= {key: os.environ[name] for key, name in names.items() if name in os.environ}
        if "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks for a profile first, and prints errors when there is none
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def context(folder: Path) -> ts.Context:
    """Little memory and two processor threads."""
    cache = CACHE_BYTES if files.is_bucket(folder) else 0
    return ts.Context({"data_copy_concurrency": {"limit": 2}, "cache_pool": {"total_bytes_limit": cache}})


# Steps


def step_folder(directory: str | Path, step: int) -> Path:
    return files.place(directory).absolute() / "checkpoints" / str(step)


def steps(directory: str | Path) -> list[int]:
    """Committed steps of a model directory, oldest first, without those that were set aside."""
    return sorted(int(p.name) for p in _content(directory) if _is_step(p.name) and committed(p))


def committed(folder: Path) -> bool:
    """Whether a step's folder is a whole step. In a bucket this is asked until it is, and then no more."""
    if not files.is_bucket(folder):
        return folder.is_dir()
    if str(folder) not in _committed and ((folder / COMMIT).exists() or is_marked(folder)):
        _committed.add(str(folder))
    return str(folder) in _committed


def copied(directory: str | Path) -> list[Path]:
    """Folders of verified steps that a disk's work dir had, copied into a bucket: Orbax would delete them there."""
    if not files.is_bucket(directory):
        return []
    found = [step_folder(directory, step) for step in steps(directory)]
    return [folder for folder in found if not (folder / COMMIT).exists() and is_marked(folder)]


def commit(folder: Path) -> None:
    """Makes a step that is all there a step for Orbax, too, where it is in a bucket."""
    if files.is_bucket(folder):
        files.write_text(folder / COMMIT, f"{folder} is complete\n")


def _content(directory: str | Path, *inside: str) -> list[Path]:
    """What lies in the folder of the checkpoints, or in one `inside` it; [] when it does not exist."""
    path = files.place(directory).joinpath("checkpoints", *inside)
    try:
        return list(path.iterdir()) if files.is_bucket(path) or path.is_dir() else []
    except FileNotFoundError:
        return []


def unfinished(directory: str | Path) -> list[Path]:
    """Folders of saves that did not come to an end."""
    found = _content(directory)
    if files.is_bucket(directory):
        return [p for p in found if _is_step(p.name) and not committed(p)]
    return [p for p in found if ".orbax-checkpoint-tmp" in p.name]


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit()  # "²" is a digit too


def strays(directory: str | Path) -> list[Path]:
    """Files whose names are those of steps; no step can be saved under such a number."""
    if files.is_bucket(directory):  # an object may have the name of a folder
        return []
    return [p for p in _content(directory) if _is_step(p.name) and not p.is_dir()]


def damaged(directory: str | Path) -> list[Path]:
    """Folders of the steps that were set aside."""
    return sorted((p for p in _content(directory, DAMAGED) if p.name != COMMIT), key=lambda p: p.name)


def find_step(directory: str | Path, step: int = NEWEST) -> int:
    """The newest step; with BEST the best one by `checkpoint.keep_best`; or `step` when it exists.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    found = readable_steps(directory)
    if not found and files.is_bucket(directory) and (parts := unfinished(directory)):
        raise CheckpointError(
            f"{directory} contains no whole checkpoint: {listing(parts, 3)} without {COMMIT}, which comes last. Repeat "
            f"the save or copy that was cut short; for a whole copy: echo whole | gcloud storage cp - "
            f"{parts[-1] / COMMIT}"
        )
    if not found:
        raise CheckpointError(f"{directory} contains no checkpoint (looked for {directory}/checkpoints/<step>/params)")
    if step == NEWEST:
        return found[-1]
    if step == BEST:
        best = best_step(directory)
        if best is None:
            raise CheckpointError(
                f"{directory} has no best step: it was trained without config.checkpoint.keep_best, or not evaluated "
                f"yet; name one of its steps, {', '.join(map(str, found))}"
            )
        step = best
    if step not in found:
        raise CheckpointError(f"{directory} has no step {step}; it has {', '.join(map(str, found))}")
    return step


def best_step(directory: str | Path) -> int | None:
    """The best step by `checkpoint.keep_best`, as the newest checkpoint names it; None where it names none.

    Raises:
      CheckpointError: its JSON cannot be read.
    """
    newest = step_folder(directory, (readable_steps(directory) or [0])[-1])
    best = best_lib.stored(read_json(newest, "data"))
    return best.step if best else None


def readable_steps(directory: str | Path) -> list[int]:
    """`steps`, and step 0 of a model of a disk that was copied into a bucket: of it only `params` has the commit file.
    To a run, which asks `steps`, that would be a save that was cut short."""
    if found := steps(directory):
        return found
    folder = step_folder(directory, 0)
    if not files.is_bucket(folder) or not committed(folder / "params"):
        return []
    return [0] if [p.name for p in folder.iterdir()] == ["params"] else []


def read_json(folder: Path, item: str) -> dict[str, Any] | None:
    """A JSON item of a step; None when the step has no such item.

    Raises:
      CheckpointError: it cannot be read.
    """
    path = folder / item / "metadata"
    if not files.is_bucket(folder) and not (folder / item).exists():
        return None
    try:
        content = files.read_json(path)
    except FileNotFoundError as error:
        if files.is_bucket(folder):  # there is no folder without files
            return None
        raise CheckpointError(f"{item}/metadata cannot be read: {error}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{item}/metadata cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{item}/metadata is not a JSON object")
    return content


def set_aside(folder: Path) -> Path:
    """Moves a damaged step to checkpoints/damaged, so that its number is free again. Returns where it is."""
    parent = folder.parent / DAMAGED
    parent.mkdir(parents=True, exist_ok=True)
    taken = {p.name for p in damaged(folder.parent.parent)}
    names = (folder.name if i == 1 else f"{folder.name}-{i}" for i in range(1, len(taken) + 2))
    target = parent / next(name for name in names if name not in taken)
    if files.is_bucket(folder):
        files.write_text(parent / COMMIT, "keeps Orbax from deleting this folder as an unfinished save\n")
        (folder / COMMIT).unlink(missing_ok=True)  # first: what a kill leaves of the step is then no step
        _committed.discard(str(folder))
    folder.rename(target)
    return target


# Fingerprints. `scramble` and `position_bits` take and return arrays of numpy or of JAX alike.


def scramble(x: Any) -> Any:
    """A bijection of uint32 that mixes well. Source: Chris Wellons, Hash Prospector, "lowbias32"."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def position_bits(indices: Any, axis: int) -> Any:
    """What positions along an axis add to an element's bits; uint32 in and out."""
    return scramble(indices + np.uint32((axis + 1) * 0x9E3779B9 % 2**32))


def json_fingerprint(value: Any) -> int:
    """Fingerprint of a JSON item; the order of keys does not matter."""
    return int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:4], "big")


def partial_fingerprint(values: np.ndarray, starts: Iterable[int]) -> int:
    """What a piece of an array whose first element is at `starts` adds to the array's fingerprint."""
    words, starts = _words(values), [*starts]
    starts += [0] * (words.ndim - len(starts))
    ranges = [np.arange(s, s + n, dtype=np.uint32) for s, n in zip(starts, words.shape, strict=True)]
    bits = [position_bits(indices, axis) for axis, indices in enumerate(ranges)]
    last = bits.pop() if bits else np.zeros(1, np.uint32)
    rows = np.zeros(1, np.uint32)
    for one in bits:
        rows = (rows[:, None] + one).reshape(-1)
    words = words.reshape(len(rows), len(last))
    height = max(1, BLOCK // max(1, len(last)))
    total = 0
    for r in range(0, len(rows), height):
        total += int(scramble(words[r : r + height] + rows[r : r + height, None] + last).sum(dtype=np.uint32))
    return total % 2**32


def _words(values: np.ndarray) -> np.ndarray:
    """The bits of an array as uint32; eight-byte elements become two along a new last axis."""
    if values.dtype.itemsize == 8:
        return np.ascontiguousarray(values).reshape(*values.shape, 1).view(np.uint32)
    # A view, not a conversion: -0.0 is not 0.0 here, and a NaN equals itself.
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint32, copy=False)


# Verification: `read_back` (one part of the pieces a process), then `judge`.


def read_back(
    folder: Path, part: int = 0, parts: int = 1, progress: Callable[[int], Any] = lambda size: None
) -> dict[str, Any]:
    """Reads every `parts`-th piece of a step, from `part` on, in bounded memory.

    Args:
      progress: called with the bytes of each piece.

    Returns:
      {"sums": {array: partial fingerprint}, "problems": [sentence]}, ready for JSON.
    """
    sums: Counter[str] = Counter()
    try:
        arrays = open_step(folder)
        expected = read_json(folder, "fingerprints")
        problems = outline(folder)
    except CheckpointError as error:
        return {"sums": {}, "problems": [str(error)]}

    def take(name: str, index: Index, values: np.ndarray) -> None:
        if expected is None and _is_float(values) and not np.isfinite(values).all():
            problems.append(f"{name} has values that are not finite")
        sums[name] = (sums[name] + partial_fingerprint(values, (s.start for s in index))) % 2**32
        progress(values.nbytes)

    number = 0
    for name in sorted(arrays):
        sums[name] += 0  # an array of which another process reads all the pieces is there, too
        pending: deque[tuple[Index, ts.Future]] = deque()
        try:
            for index in arrays[name].pieces():
                number += 1
                if number % parts != part:
                    continue
                pending.append((index, arrays[name].store[index].read()))
                if len(pending) > READ_AHEAD:
                    index, future = pending.popleft()
                    take(name, index, future.result())
            for index, future in pending:
                take(name, index, future.result())
        except Exception as error:  # TensorStore has no error class of its own; a verifier must survive any damage
            problems.append(f"{name} cannot be read: {shorten(error)}")
    return {"sums": dict(sums), "problems": list(dict.fromkeys(problems))}


def outline(folder: Path) -> list[str]:
    """The problems of a step that show without reading an array, one sentence each.

    Raises:
      CheckpointError: JSON items that cannot be read.
    """
    expected, data = read_json(folder, "fingerprints"), read_json(folder, "data")
    problems = []
    of_run = (folder / "train_state").exists() or any(name.startswith("train_state.") for name in expected or ())
    if of_run and (data is None or not isinstance(data.get("step"), int)):
        problems.append("data/metadata does not contain the step")
    elif of_run and data is not None and str(data["step"]) != folder.name:
        problems.append(f"data/metadata is of step {data['step']}")
    for item in ITEMS:
        if not (folder / item).exists() and any(name.startswith(f"{item}.") for name in expected or ()):
            problems.append(f"{item} is missing")
    for name in JSON_ITEMS:
        if expected is not None and name in expected:
            content = read_json(folder, name)
            if content is None:
                problems.append(f"{name} is missing")
            elif json_fingerprint(content) != expected[name]:
                problems.append(f"{name}/metadata differs from what was saved (fingerprint)")
    if expected is None and is_marked(folder):
        problems.append("fingerprints are missing")
    return problems


def judge(folder: Path, reports: list[dict[str, Any]]) -> list[str]:
    """The problems of a step that was read back in parts, one sentence each; empty when it is intact."""
    problems = list(dict.fromkeys(p for report in reports for p in report["problems"]))
    try:
        expected = read_json(folder, "fingerprints")
    except CheckpointError as error:
        return list(dict.fromkeys([*problems, str(error)]))
    if expected is None:
        return problems
    sums: Counter[str] = Counter()
    for report in reports:
        sums.update(report["sums"])
    named = {p.split(" ")[0] for p in problems}
    for name in sorted({*expected, *sums} - named - {*JSON_ITEMS}):  # `outline` has compared the JSON items
        if name.partition(".")[0] in named:
            continue
        if name not in sums:
            problems.append(f"{name} is missing")
        elif name not in expected:
            problems.append(f"{name} was not part of the save")
        elif sums[name] % 2**32 != expected[name]:
            problems.append(f"{name} differs from what was saved (fingerprint)")
    return problems


def verify(folder: Path, progress: Callable[[int], Any] = lambda size: None) -> list[str]:
    """Reads a whole step and returns its problems, one sentence each."""
    return judge(folder, [read_back(folder, progress=progress)])


def mark(folder: Path) -> None:
    """Marks a step as verified."""
    files.write_text(folder / MARK, json.dumps({"verified": True}))


def unmark(folder: Path) -> None:
    (folder / MARK).unlink(missing_ok=True)


def is_marked(folder: Path) -> bool:
    return (folder / MARK).exists()


def _is_float(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"
