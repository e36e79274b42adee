"""The weights of a step, whole, also of a run that trains only a part of them (`config.finetune`).

Such a run stores what trains. The rest, its base, stays in the model directory that it started from:

    WORKDIR/assets/base.json                  {"path": the model directory}
    WORKDIR/checkpoints/<step>/base/          JSON: the base's step, and the dtype and fingerprint of its arrays

Whoever reads weights gets them merged, in float32: the base in the dtype in which the run used it, and to the matrices
with a low-rank adapter the adapter's product is added. Without JAX, piece by piece.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rynnvla_jax.checkpoint import reader
from rynnvla_jax.checkpoint.reader import CheckpointError, Place, StoredArray, step_folder
from rynnvla_jax.errors import listing
from rynnvla_jax.storage import files

BLOCKS = "transformer.blocks."
ADAPTERS = f"{BLOCKS}lora."  # <name>.a [layers, inputs, rank] and <name>.b [layers, rank, outputs]
# The matrices of `config.LORA_TARGETS`, [layers, inputs, outputs], and how many axes their inputs are.
MATRICES = {
    "q": ("wq", 1),
    "k": ("wk", 1),
    "v": ("wv", 1),
    "o": ("wo", 2),
    "gate": ("w_gate", 1),
    "up": ("w_up", 1),
    "down": ("w_down", 1),
}
_AVERAGE = reader.AVERAGE
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Base:
    """What a step says of the weights that its run does not train."""

    step: int
    weights: str  # raw or ema
    scale: float  # of adapters
    files: str  # `files_digest`: equal for copies, not for weights that were saved again
    arrays: dict[str, tuple[str, int]]  # dtype and fingerprint by dotted path

    def differences(self, arrays: Mapping[str, tuple[str, int]]) -> list[str]:
        """Names of the arrays that are not those of this base."""
        return sorted(name for name in {*self.arrays, *arrays} if self.arrays.get(name) != arrays.get(name))


def of_step(folder: Path) -> Base | None:
    """The base of a step; None where the run trains all weights. Raises CheckpointError when it cannot be read."""
    content = reader.read_json(folder, "base")
    if content is None:
        return None
    arrays = {name: (dtype, number) for name, (dtype, number) in content["arrays"].items()}
    return Base(**{**content, "arrays": arrays})


def to_json(base: Base) -> dict[str, Any]:
    return dataclasses.asdict(base) | {"arrays": {name: list(value) for name, value in base.arrays.items()}}


def of_run(workdir: str | Path) -> Base | None:
    """The base of a work dir, as its newest step that can be read names it; None without one."""
    for step in reversed(reader.steps(workdir)):
        with contextlib.suppress(CheckpointError):
            return of_step(step_folder(workdir, step))
    return None


def files_digest(folder: Path, weights: str) -> str:
    """SHA-256 of the files of a step that name all others of its weights; "" where there are none of them."""
    item = folder / ("params" if weights == "raw" else "train_state")
    known = [item / name for name in ("_METADATA", "manifest.ocdbt")]
    if not all(path.exists() for path in known):
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in known)).hexdigest()


def record_path(workdir: Path, path: str | Path) -> None:
    """Writes where the base of a work dir is."""
    files.write_text(workdir / "assets" / "base.json", json.dumps({"path": str(files.place(path).absolute())}))


def path_of(workdir: Path) -> Path:
    """Where the base of a work dir is. Raises CheckpointError when it does not say."""
    file = workdir / "assets" / "base.json"
    try:
        return files.place(files.read_json(file)["path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file} cannot be read: it says where the weights are that {workdir} did not train; "
            f"`rynnvla checkpoint base {workdir} --path DIR` writes it again"
        ) from None


def open_weights(folder: Path, weights: str = "raw", merge: bool = True) -> dict[str, StoredArray]:
    """All parameters of a step by dotted path; no values are read.

    Args:
      weights: "raw", or "ema": their average, which the optimizer's state contains (`train.optimizer.AverageState`).
      merge: False leaves adapters beside their matrices, as during training.

    Raises:
      CheckpointError: the parameters, their average or their base are missing, or the base is another one.
    """
    trained = _stored(folder, weights)
    base = of_step(folder)
    if base is None:
        return trained
    workdir = folder.parent.parent
    found = opened(base, path_of(workdir), workdir)
    if merge:
        trained, adapters = _parted(trained)
        found = {name: _adapted(array, adapters, base.scale) for name, array in found.items()}
    return {**found, **trained}


def _stored(folder: Path, weights: str) -> dict[str, StoredArray]:
    """What a step stores of its parameters."""
    if weights == "raw":
        return reader.open_arrays(folder / "params")
    stored = reader.open_arrays(folder / "train_state") if (folder / "train_state").exists() else {}
    found = {path.partition(_AVERAGE)[2]: array for path, array in stored.items() if _AVERAGE in path}
    if not found:
        raise CheckpointError(
            f"{folder} has no average of the weights: it was not trained with config.optimizer.ema; use the raw weights"
        )
    return found


def opened(base: Base, path: Path, workdir: Path) -> dict[str, StoredArray]:
    """The arrays of a base in its model directory `path`, with the values that the run used, in float32.

    Raises:
      CheckpointError: they are not there, or not those of the run.
    """
    moved = f"if it was moved, `rynnvla checkpoint base {workdir} --path DIR` tells where it is now"
    if base.step not in reader.readable_steps(path):
        raise CheckpointError(
            f"{workdir} trained a part of the weights only, and step {base.step} of its base, {path}, which has the "
            f"others, is not there; {moved}; if it was deleted, restore it from a copy"
        )
    folder = step_folder(path, base.step)
    stored = open_weights(folder, base.weights)
    missing = sorted(base.arrays.keys() - stored.keys())
    arrays = {name: _rounded(stored[name], dtype) for name, (dtype, _) in base.arrays.items() if name in stored}
    same = base.files and files_digest(folder, base.weights) == base.files
    if wrong := missing or ([] if same else list(_changed(base, str(folder)))):
        raise CheckpointError(
            f"step {base.step} of {path} is not the base that {workdir} was trained on: {listing(wrong, 3)} of "
            f"{len(base.arrays)} arrays differ; restore it from a copy, or {moved}"
        )
    return arrays


def fingerprint(base: Base, folder: Path) -> dict[str, tuple[str, int]]:
    """Dtypes and fingerprints of the arrays of `base`, of what is stored in `folder`. Reads all of them."""
    stored = open_weights(folder, base.weights)
    found = {}
    for name, (dtype, _) in base.arrays.items():
        if name in stored:
            total = 0
            for index in stored[name].pieces():
                values = stored[name].read(index).astype(_DTYPES[dtype])
                total += reader.partial_fingerprint(values, (s.start for s in index))
            found[name] = dtype, total % 2**32
    return found


_known: dict[tuple[str, str], tuple[str, ...]] = {}  # what `_changed` has found in this process


def _changed(base: Base, folder: str) -> tuple[str, ...]:
    """The arrays of a step that do not have the fingerprints of `base`; read once in a process."""
    key = folder, json.dumps(to_json(base))
    if key not in _known:
        _known[key] = tuple(base.differences(fingerprint(base, Path(folder))))
    return _known[key]


def _rounded(array: StoredArray, dtype: str) -> StoredArray:
    """`array` with the values that it has in `dtype`."""
    if dtype == "float32":
        return array
    return array.then(lambda values, index: values.astype(_DTYPES[dtype]).astype(np.float32))


def _parted(trained: dict[str, StoredArray]) -> tuple[dict[str, StoredArray], dict[str, StoredArray]]:
    """(parameters, adapters), the latter by their paths after `ADAPTERS`."""
    adapters = {path.removeprefix(ADAPTERS): array for path, array in trained.items() if path.startswith(ADAPTERS)}
    return {path: array for path, array in trained.items() if not path.startswith(ADAPTERS)}, adapters


def _adapted(array: StoredArray, adapters: Mapping[str, StoredArray], scale: float) -> StoredArray:
    """A matrix with the product of its adapter, where it has one."""
    name = next((name for name, (matrix, _) in MATRICES.items() if array.path == BLOCKS + matrix), "")
    if f"{name}.a" not in adapters:
        return array
    parts = functools.cache(lambda: [adapters[f"{name}.{part}"].read() for part in "ab"])  # small, and read once

    def add(values: np.ndarray, index: Place) -> np.ndarray:
        a, b = parts()
        return values + product(a, b, array.shape, MATRICES[name][1], index, np.float32(scale))

    return array.then(add)


def product(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], inputs: int, index: Place, scale: np.float32
) -> np.ndarray:
    """scale * A @ B at an index of the matrices that it is added to.

    Args:
      a, b: [L, inputs, rank] and [L, rank, outputs].
      shape: of the matrices, [L, *inputs, *outputs]; `inputs`: how many axes these are.
    """
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    left = a.reshape(*shape[: 1 + inputs], -1)[index[: 1 + inputs]]
    right = b.reshape(len(b), -1, *shape[1 + inputs :])[(index[0], slice(None), *index[1 + inputs :])]
    if not isinstance(index[0], slice):
        return scale * np.tensordot(left, right, 1)
    return scale * np.stack([np.tensordot(one, other, 1) for one, other in zip(left, right, strict=True)])
