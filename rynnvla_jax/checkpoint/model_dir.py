"""Model directories: a run's checkpoints (parameters, training state and data position as separate items) and assets.

    DIR/assets/model.json       {"kind": "vla" | "action_vae" | "vqgan", "config": {...}}
    DIR/assets/config.json      the resolved TrainConfig (trained directories), and run.json: see provenance.py
    DIR/assets/statistics.json  DIR/assets/tokenizer.json
    DIR/assets/vqgan/           DIR/assets/action_vae/      model directories of the frozen models
    DIR/checkpoints/<step>/     see reader.py; imports and frozen models have `params` only

A training work dir, an imported model and a frozen model inside `assets` all have this shape.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rynnvla_jax.checkpoint import base, reader
from rynnvla_jax.checkpoint.reader import CheckpointError, find_step, step_folder
from rynnvla_jax.config import (
    ActionVAEConfig,
    ConfigError,
    TrainConfig,
    VLAConfig,
    VQGANConfig,
    from_dict,
    read_json,
    to_dict,
    with_meaning,
)
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.errors import listing
from rynnvla_jax.models.frozen import Frozen, without_decoder
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import Vocabulary

CHUNK_BYTES = 32 * 2**20
MODEL_CONFIGS = {"vla": VLAConfig, "action_vae": ActionVAEConfig, "vqgan": VQGANConfig}


def chunked(tree: Any) -> Any:
    """Stored in pieces of at most CHUNK_BYTES; of the stacked decoder layers none is larger than one layer's share, so
    that readers take one layer at a time."""

    def arguments(path, x) -> ocp.SaveArgs:
        if not x.ndim:  # a scalar has no axis to cut
            return ocp.SaveArgs()
        # Only there: Orbax cuts a named axis down to single rows, and an embedding has 65540 of them on every device.
        stacked = "blocks" in path_string(path).split(".")
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(arguments, tree)


def check_path(directory: str | Path) -> None:
    """Raises ConfigError for a path in which Orbax cannot save.

    It takes its own folders' names for patterns; and TensorStore takes all names for UTF-8, whatever the locale.
    """
    if found := sorted(set(str(directory)) & set("[]*?")):
        raise ConfigError(
            f"{directory}: checkpoints cannot be saved under a path with {' '.join(found)}; use another name, also for "
            "the folders above it"
        )
    if os.fsencode(directory) != str(directory).encode("utf-8", "surrogatepass"):
        raise ConfigError(
            f"{ascii(str(directory))}: checkpoints cannot be saved under this name where the locale is not UTF-8; set "
            "LC_ALL=C.UTF-8, or use a name of ASCII letters, also for the folders above it"
        )


def read_model_config(directory: str | Path, kind: str) -> Any:
    """The model configuration of a model directory.

    Raises:
      CheckpointError: not a model directory, or one of another kind.
    """
    path = files.place(directory) / "assets" / "model.json"
    if not path.exists():
        raise CheckpointError(f"{directory} is not a model directory: {path} is missing")
    content = files.read_json(path)
    if content["kind"] != kind:
        raise CheckpointError(f"{directory} contains a model of kind {content['kind']!r}, not {kind!r}")
    stored = stored_config(directory)
    if stored is not None and STAGES[stored.stage].model == kind:
        return STAGES[stored.stage].model_config(stored)
    return from_dict(MODEL_CONFIGS[kind], content["config"], str(path))


def read_train_config(directory: str | Path) -> TrainConfig:
    """The resolved config of a work dir: what its weights mean as the newest checkpoint has it, the rest as
    `assets/config.json` has it. Raises ConfigError when the file is missing or damaged.
    """
    file = files.place(directory) / "assets" / "config.json"
    if not file.exists():
        raise ConfigError(f"{directory} is not a work dir of `rynnvla train`: {file} is missing")
    remedy = "restore it from a copy, or use another --workdir and start from this one with config.init_from.path"
    config = from_dict(TrainConfig, read_json(file, remedy), str(file))
    stored = stored_config(directory)
    return config if stored is None else with_meaning(config, stored)


def stored_config(directory: str | Path) -> TrainConfig | None:
    """The config that the newest checkpoint was saved with; None without a checkpoint, or of an older version."""
    for step in reader.steps(directory)[-1:]:
        folder = step_folder(directory, step)
        if (content := reader.read_json(folder, "config")) is not None:
            return from_dict(TrainConfig, content, str(folder / "config" / "metadata"))
    return None


def write_model_config(directory: str | Path, kind: str, config: Any) -> None:
    """Writes `assets/model.json`."""
    assets = files.place(directory) / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    files.write_text(assets / "model.json", json.dumps({"kind": kind, "config": to_dict(config)}, indent=2))


def stored_shapes(directory: str | Path, step: int, weights: str = "raw") -> dict[str, tuple[int, ...]]:
    """Shape of every stored parameter by dotted path, without reading it. Raises CheckpointError."""
    arrays = base.open_weights(step_folder(directory, step), weights)
    with _as_checkpoint_error(directory, step):
        return {path: array.shape for path, array in arrays.items()}


@contextlib.contextmanager
def _as_checkpoint_error(directory: str | Path, step: int) -> Iterator[None]:
    """TensorStore's errors as CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {step} of {directory} cannot be read: {str(error).partition(' [tensorstore_spec')[0]}; "
            f"`rynnvla checkpoint verify {directory}` shows which steps are intact"
        ) from error


def check_tree(stored: Mapping[str, tuple[int, ...]], wanted: Any, directory: Any, new: tuple[str, ...] = ()) -> None:
    """Compares stored shapes with a tree of arrays or ShapeDtypeStructs.

    Raises:
      CheckpointError: parameters are missing or unexpected (and not in `new`), or have another shape; lists them.
    """
    shapes = {path_string(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(wanted)}

    def is_new(key: str) -> bool:
        return any(fnmatch.fnmatch(key, pattern) for pattern in new)

    unused = [p for p in new if not any(fnmatch.fnmatch(k, p) for k in (*shapes, *stored))]
    problems = [f"init_from.new pattern {p!r} matches no parameter; take it out" for p in unused]
    problems += [f"{k} is missing" for k in shapes if k not in stored and not is_new(k)]
    problems += [f"{k} is unexpected" for k in stored if k not in shapes and not is_new(k)]
    problems += [
        f"{k} has shape {stored[k]} in the checkpoint, but {shapes[k]} in the model"
        for k in shapes
        if k in stored and not is_new(k) and stored[k] != shapes[k]
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {directory} does not fit this model: {listing(problems, 12, '; ')}. "
            "Use the model size it was trained with, or list parameters to initialise randomly in config.init_from.new"
        )


def load_params(
    directory: str | Path,
    abstract: Any = None,
    *,
    step: int = -1,
    new: tuple[str, ...] = (),
    weights: str = "raw",
    part: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Reads parameters of a model directory.

    Args:
      abstract: nested dict of ShapeDtypeStructs (with shardings) to restore onto; None reads all parameters
        onto the first device.
      new: globs of parameters that are not read.
      weights: "raw", or "ema": their average (`base.open_weights`).
      part: `abstract` is a part of the model; what else is stored is not read.

    Returns:
      (nested dict of arrays without the fresh ones, dotted paths of the fresh ones).

    Raises:
      CheckpointError: no such step, it is damaged, or it does not fit `abstract`.
    """
    step = find_step(directory, step)
    path = step_folder(directory, step) / "params"
    if abstract is None:
        return _read_all(directory, step, weights), []
    stored = stored_shapes(directory, step, weights)
    if part:
        names = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract)]
        stored = {name: shape for name, shape in stored.items() if name in names}
        new = tuple(pattern for pattern in new if fnmatch.filter(names, pattern))
    check_tree(stored, abstract, directory, new)
    flat = {path_string(p): p for p, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    fresh = [k for k in flat if any(fnmatch.fnmatch(k, pattern) for pattern in new)]
    wanted = _without(abstract, set(fresh), ())
    # What Orbax cannot read: s3://, and weights that are not stored as they are.
    if weights != "raw" or str(path).startswith("s3://") or base.of_step(path.parent):
        with _as_checkpoint_error(directory, step):
            return _read(path.parent, weights, wanted), fresh
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    with _as_checkpoint_error(directory, step):
        # partial: the parameters in `new` may be stored as well.
        restored = ocp.PyTreeCheckpointer().restore(
            path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        )
    return restored, fresh


def _read_all(directory: str | Path, step: int, weights: str) -> dict[str, Any]:
    """All parameters of a step, on the first device, as a nested dict. Without Orbax, which asks a bucket twenty times
    for what it knows. Raises CheckpointError."""
    device = jax.local_devices()[0]
    tree: dict[str, Any] = {}
    with _as_checkpoint_error(directory, step):
        arrays = base.open_weights(step_folder(directory, step), weights)
        reading = {path: array.store.read() for path, array in arrays.items()}
        for path, future in reading.items():
            *groups, name = path.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = jax.device_put(arrays[path].changed(future.result()), device)
    return tree


def _read(folder: Path, weights: str, wanted: Any) -> Any:
    """The parameters of a step, onto the shardings of `wanted`; every process reads its own parts."""
    arrays = base.open_weights(folder, weights)

    def take(key: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays[path_string(key)]
        read = lambda index: array.read(index).astype(x.dtype)  # noqa: E731
        return jax.make_array_from_callback(x.shape, x.sharding, read)

    return jax.tree_util.tree_map_with_path(take, wanted)


def load_frozen(directories: Mapping[str, Any], vocabulary: Vocabulary | None) -> Frozen:
    """Frozen models from their directories by name, on the first device; of a VQGAN only the encoding half.

    Raises:
      CheckpointError: one of them cannot be read.
    """
    trees: dict[str, Any] = {name: load_params(path)[0] for name, path in directories.items()}
    if "vqgan" in trees:
        trees["vqgan"] = without_decoder(trees["vqgan"])
    if vocabulary is not None:
        trees["code_to_token"] = vocabulary.code_to_token.astype(np.int32)
        trees["kinds"] = vocabulary.kinds()
    return Frozen(**trees)


def _without(tree: Any, drop: set[str], path: tuple[str, ...]) -> Any:
    """The nested dict without the dotted paths in `drop`; empty groups are removed."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {
        k: _without(v, drop, (*path, k))
        for k, v in tree.items()
        if isinstance(v, Mapping) or ".".join((*path, k)) not in drop
    }
    return {k: v for k, v in kept.items() if not (isinstance(v, Mapping) and not v)}


def save_model(directory: str | Path, kind: str, config: Any, params: Any, step: int = 0) -> None:
    """Writes a model directory with parameters only; `model.json` comes last. Raises ConfigError for a path that cannot
    be used."""
    check_path(directory)
    save_params(directory, params, step)
    write_model_config(directory, kind, config)


def save_params(directory: str | Path, params: Any, step: int) -> None:
    """Writes a step with parameters only."""
    path = step_folder(directory, step) / "params"
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, params, save_args=chunked(params), force=True)
    checkpointer.wait_until_finished()
    reader.commit(step_folder(directory, step))


def copy_model(source: str | Path, target: str | Path) -> None:
    """Copies the newest parameters, whole, and the assets of a model directory; `model.json` comes last."""
    source, target = files.place(source), files.place(target)
    step = find_step(source)
    if base.of_step(step_folder(source, step)):
        save_params(target, load_params(source, step=step)[0], step)
    else:
        files.copy_folder(step_folder(source, step) / "params", step_folder(target, step) / "params")
        reader.commit(step_folder(target, step))
    target_assets = target / "assets"
    target_assets.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "statistics.json", "run.json"):
        if (source / "assets" / name).exists():
            files.copy(source / "assets" / name, target_assets / name)
    # Readers ask for this file, so a copy that was cut short is not taken for a model.
    files.write_text(target_assets / "model.json", (source / "assets" / "model.json").read_text(encoding="utf-8"))


def config_differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Readable lines for every value that differs between two dataclasses of one type."""
    lines = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            lines += config_differences(a, b, f"{path}.{f.name}")
        elif a != b:
            lines.append(f"{path}.{f.name}: {a!r} -> {b!r}")
    return lines
