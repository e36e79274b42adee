"""Public checkpoints -> model directories.

Memory stays under twice the largest tensor plus 1 GB for any model size: one tensor is read, transposed as a
view, and written piece by piece into arrays on disk.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from rynnvla_jax.actions import Statistics
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import VLAConfig
from rynnvla_jax.convert import ConversionError, stream, vla
from rynnvla_jax.convert.foreign import Checkpoint, open_checkpoint
from rynnvla_jax.convert.frozen import VQ_PREFIX, import_action_vae, import_vqgan, import_vqmodel
from rynnvla_jax.convert.report import ImportReport
from rynnvla_jax.convert.table import Entry, axis_size, leaves
from rynnvla_jax.errors import listing
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import Vocabulary

T = TypeVar("T")

_LISTED = 10  # faults in one message
_LANGUAGE_MODEL = "model.language_model."


def kind_of(source: Checkpoint) -> str:
    """The kind of model ("vla", "action_vae", "vqgan"), by the names of the tensors."""
    for key, kind in (
        (vla.EMBED, "vla"),
        ("quantize.embedding.weight", "vqgan"),
        ("latent_out_proj.weight", "action_vae"),
    ):
        if key in source.shapes:
            return kind
    shown = ", ".join(list(source.shapes)[:5])
    raise ConversionError(f"{source.source}: neither a VLA, an ActionVAE nor a VQGAN; its keys begin {shown}")


def public_names(source: Checkpoint) -> Checkpoint:
    """The checkpoint with `model.language_model.*`, as transformers now nests it, as `model.*`; text_config likewise.

    Raises:
      ConversionError: a tensor is stored under both names.
    """
    stored = {k.replace(_LANGUAGE_MODEL, "model.", 1) if k.startswith(_LANGUAGE_MODEL) else k: k for k in source.shapes}
    if len(stored) < len(source.shapes):
        twice = sorted(set(source.shapes) - set(stored.values()))
        raise ConversionError(
            f"{source.source}: {len(twice)} tensors are stored both as {_LANGUAGE_MODEL}* and as model.*; "
            f"remove one of the two: {listing(twice, _LISTED)}"
        )
    nested = source.config.get("text_config")
    config = source.config | nested if isinstance(nested, dict) else source.config
    if all(k == name for name, k in stored.items()):
        return replace(source, config=config)
    rows = source.read_rows
    return replace(
        source,
        config=config,
        shapes={name: source.shapes[k] for name, k in stored.items()},
        read=lambda name: source.read(stored[name]),
        read_rows=rows and (lambda name, start, stop: rows(stored[name], start, stop)),
        notes=[*source.notes, f"{_LANGUAGE_MODEL}* is read as model.*"],
    )


def import_vla(
    source: Checkpoint,
    out: str | Path,
    *,
    tokenizer: Path | None = None,
    ignore: tuple[str, ...] = (),
    vq: bool = False,
    seed: int = 0,
) -> ImportReport:
    """Fills the folder `out` with a model directory, from a Chameleon or RynnVLA checkpoint.

    A base Chameleon checkpoint gets four more vocabulary rows and the two projections, randomly initialised.

    Args:
      tokenizer: tokenizer.json; None takes the checkpoint's own, if any.
      ignore: prefixes of keys that are not imported.
      vq: import `model.vqmodel.*` into assets/vqgan.
      seed: of the new weights.

    Raises:
      ConversionError: keys are missing, unexpected or of the wrong shape; an unsupported configuration.
    """
    report = ImportReport("vla", str(source.source), source.format)
    if source.config:
        source = replace(source, config=vla.given_fields(source.config, f"config.json of {source.source}"))
    config, entries = _plan(source, tokenizer or source.tokenizer)
    ignore = (*ignore, VQ_PREFIX) if vq else ignore
    shapes = model_shapes(config)
    stored = _check(source, entries, shapes, ignore, report)
    if vq:
        report.ignored.pop(VQ_PREFIX, None)
        report.parts.append(import_vqmodel(source, files.place(out) / "assets" / "vqgan"))
    report.weights = sum(math.prod(s) for s in shapes.values())
    stacked = {path for path in shapes if path.startswith("transformer.blocks.")}
    arrays = stream.create_params(out, shapes, stacked)
    with stream.Writer() as writer:
        filled = _write_stored(stored, entries, arrays, config, seed, writer, report)
        for path in sorted(set(shapes) - filled):
            values = vla.new_values(path, shapes[path], config, seed)
            report.new.append(f"{path} {list(shapes[path])}")
            for index in arrays[path].pieces():
                writer.write(arrays[path], index, values[index])
    _copy_tokenizer(tokenizer or source.tokenizer, files.place(out), report)
    report.notes += [*vla.notes(source.config), *dict.fromkeys(source.notes)]
    model_dir.write_model_config(out, "vla", config)
    return report


def _plan(source: Checkpoint, tokenizer: Path | None) -> tuple[VLAConfig, list[Entry]]:
    """Our configuration and the entries that the checkpoint must fill."""
    shapes, given = dict(source.shapes), source.config
    if not given:
        raise ConversionError(f"{source.source}: config.json is missing; copy it to the folder of the weights")
    if vla.EMBED not in shapes:
        raise ConversionError(f"{source.source}: {vla.EMBED} is missing: not a Chameleon checkpoint")
    stored_vocab = axis_size(shapes, vla.EMBED, 0)
    if given.get("vocab_size", stored_vocab) != stored_vocab:
        raise ConversionError(
            f"{source.source}: config.json vocab_size is {given['vocab_size']} but {vla.EMBED} has {stored_vocab} rows"
        )
    heads = {h for h in vla.HEADS if any(k.startswith(f"{h}.") for k in shapes)}
    vocab = _vocabulary(stored_vocab, bool(heads), tokenizer)
    config = vla.config_from_foreign(given, shapes, vocab_size=vocab, norm_rows=_norm_rows(source))
    if tokenizer is not None and not given.get("vocabulary_map") and "image_tokens" not in given:
        span = read_leaf(Vocabulary.from_tokenizer, tokenizer).image_tokens
        config = replace(config, transformer=replace(config.transformer, image_tokens=span))
    q_rows, k_rows = (axis_size(shapes, f"model.layers.0.self_attn.{x}_norm.weight", 0) for x in "qk")
    entries = [
        replace(e, rows=stored_vocab) if e.rows is not None else e
        for e in vla.table(config, norm_rows=(q_rows, k_rows))
    ]
    entries = [e for e in entries if e.foreign.split(".")[0] not in vla.HEADS or e.foreign.split(".")[0] in heads]
    return config, entries


def _vocabulary(stored: int, has_heads: bool, tokenizer: Path | None) -> int:
    """The number of rows that our vocabulary needs."""
    if tokenizer is None:
        return stored if has_heads else stored + vla.NEW_ROWS
    wanted = read_leaf(Vocabulary.from_tokenizer, tokenizer).size
    if stored not in (wanted, wanted - vla.NEW_ROWS):
        raise ConversionError(
            f"{tokenizer} has {wanted - vla.NEW_ROWS} entries but the checkpoint has {stored} vocabulary rows; "
            f"expected as many, or {vla.NEW_ROWS} more; give the checkpoint's own tokenizer"
        )
    return wanted


def _norm_rows(source: Checkpoint) -> tuple[int, int]:
    given = source.config
    heads = {"q": given.get("num_attention_heads") or 1}
    heads["k"] = given.get("num_key_value_heads") or heads["q"]
    rows = []
    for which, count in heads.items():
        keys = [k for k in source.shapes if k.endswith((f".{which}_norm.weight", f".{which}_norm.bias"))]
        if not keys or len({source.shapes[k] for k in keys}) != 1 or len(source.shapes[keys[0]]) != 2:
            found = sorted({source.shapes[k] for k in keys})
            raise ConversionError(
                f"{source.source}: {which}_norm must have one shape [rows, head size] in all layers, found {found}"
            )
        shards = given.get("model_parallel_size") or 1
        rows.append(vla.collapsed_rows([np.array(source.read(k)) for k in keys], count, shards, f"{which}_norm"))
    return rows[0], rows[1]


def model_shapes(config: VLAConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by dotted path."""
    return {path: tuple(x.shape) for path, x in leaves(stream.abstract(lambda: VLA(config, rngs=nnx.Rngs(0))))}


def read_leaf(read: Callable[[Path], T], path: Path) -> T:
    """A leaf module's reader, whose ValueErrors already name the file and the remedy."""
    try:
        return read(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def foreign_shape(entry: Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the foreign tensor of an entry whose parameter has shape `ours`."""
    whole = entry.transform.to_foreign(np.broadcast_to(np.float32(0), ours if entry.layer is None else ours[1:])).shape
    return whole if entry.rows is None else (entry.rows, *whole[1:])


def _check(
    source: Checkpoint,
    entries: list[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: tuple[str, ...],
    report: ImportReport,
) -> dict[str, Callable[[], np.ndarray]]:
    """Foreign key -> reader, after comparing all keys and shapes. Raises ConversionError listing the faults."""
    alias = {vla.HEAD: vla.EMBED} if source.config.get("tie_word_embeddings") else {}
    faults: list[str] = []
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for entry in entries:
        key = alias.get(entry.foreign, entry.foreign)
        expected = foreign_shape(entry, shapes[entry.ours])
        if key not in source.shapes:
            faults.append(f"{key}: missing")
        elif source.shapes[key] != expected:
            faults.append(f"{key}: shape {list(source.shapes[key])}, expected {list(expected)}")
        readers[entry.foreign] = partial(source.read, key)
    known = {e.foreign for e in entries}
    for key in source.shapes:
        if key in known or vla.IGNORED.search(key):
            continue
        prefix = next((p for p in ignore if key.startswith(p)), None)
        if prefix is not None:
            report.ignored[prefix] = report.ignored.get(prefix, 0) + 1
        else:
            faults.append(f"{key}: unexpected")
    if faults:
        first = f" (the first {_LISTED})" if len(faults) > _LISTED else ""
        raise ConversionError(
            f"{source.source}: {len(faults)} tensors do not fit config.json. {_remedy(faults)}{first}: "
            + "; ".join(faults[:_LISTED])
        )
    return readers


def _remedy(faults: list[str]) -> str:
    """What to do about tensors that are missing, of another shape, or unexpected."""
    if any(f.startswith(VQ_PREFIX) for f in faults):
        return (
            f"Of the VQGAN's encoder: {sum(f.startswith(VQ_PREFIX) for f in faults)}; give --vqgan vqgan.ckpt (whole, "
            f"recommended) or --vq (encodes only), or leave them out with --ignore {VQ_PREFIX}. The tensors"
        )
    if all(f.endswith(": unexpected") for f in faults):
        return "Leave out what is not part of the model with --ignore PREFIX. The tensors"
    return (
        "Give the config.json that belongs to the weights (--model-config FILE), or copy all files of weights again. "
        "The tensors"
    )


def _write_stored(
    readers: Mapping[str, Callable[[], np.ndarray]],
    entries: list[Entry],
    arrays: Mapping[str, stream.StoredArray],
    config: VLAConfig,
    seed: int,
    writer: stream.Writer,
    report: ImportReport,
) -> set[str]:
    """Streams every foreign tensor into place. Returns the paths that were written."""
    for entry in entries:
        tensor = readers[entry.foreign]()
        report.count(tensor)
        array = arrays[entry.ours]
        view = entry.transform.to_ours(tensor)
        parts = [(view, 0)]
        axis = 0
        if entry.rows is not None:
            wanted = config.transformer.vocab_size
            axis = 1 if entry.foreign == vla.HEAD else 0
            if fresh := wanted - entry.rows:
                shape = (fresh, tensor.shape[1])
                rows = vla.new_values(entry.ours, shape, config, seed)
                parts.append((entry.transform.to_ours(rows), entry.rows))
                report.new.append(f"{entry.ours} vocabulary rows {entry.rows} to {wanted - 1}")
        for index in array.pieces(entry.layer):
            inner = index if entry.layer is None else index[1:]
            values = np.zeros([s.stop - s.start for s in inner], np.float32)
            for part, start in parts:
                _write_part(values, inner, part, axis, start)
            writer.write(array, index, values if entry.layer is None else values[None])
        del tensor, view, parts
    return {e.ours for e in entries}


def _write_part(values: np.ndarray, index: stream.Index, part: np.ndarray, axis: int, start: int) -> None:
    """Copies into `values`, which stands for the region `index`, what it shares with `part` at `start` on `axis`."""
    span = index[axis]
    first, last = max(span.start, start), min(span.stop, start + part.shape[axis])
    if first >= last:
        return
    here = [slice(None)] * values.ndim
    there = list(index)
    here[axis] = slice(first - span.start, last - span.start)
    there[axis] = slice(first - start, last - start)
    values[tuple(here)] = part[tuple(there)]


def _copy_tokenizer(tokenizer: Path | None, out: Path, report: ImportReport) -> None:
    if tokenizer is None:
        report.notes.append("no tokenizer.json found; training and policies need one (--tokenizer)")
        return
    (out / "assets").mkdir(parents=True, exist_ok=True)
    files.write_text(out / "assets" / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))


def _copy_statistics(statistics: Path | None, model: Path) -> None:
    if statistics is None:
        return
    read_leaf(Statistics.from_json, statistics)  # raises if a policy could not use it
    (model / "assets").mkdir(parents=True, exist_ok=True)
    files.write_text(model / "assets" / "statistics.json", statistics.read_text(encoding="utf-8"))


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    kind: str = "auto",
    tokenizer: Path | None = None,
    vqgan_source: Path | None = None,
    action_vae_source: Path | None = None,
    statistics: Path | None = None,
    model_config: Mapping[str, Any] | None = None,
    ignore: tuple[str, ...] = (),
    vq: bool = False,
    seed: int = 0,
) -> ImportReport:
    """Runs `rynnvla convert import`; the arguments are its flags. See `import_vla` and its siblings."""
    opened = public_names(open_checkpoint(source))
    kind = kind_of(opened) if kind == "auto" else kind
    if kind != "vla":
        flags: dict[str, Any] = {"tokenizer": tokenizer, "vqgan": vqgan_source, "action-vae": action_vae_source}
        flags |= {"vq": vq, "ignore": ignore, "seed": seed, "statistics": kind == "vqgan" and statistics}
        if unused := [f"--{flag}" for flag, given in flags.items() if given]:
            raise ConversionError(
                f"{source} is of kind {kind} and does not use {', '.join(unused)}; leave out these options"
            )
    if vq and vqgan_source:
        raise ConversionError("--vq and --vqgan both select a VQGAN; give only one")
    with stream.finished(out) as partial:
        if kind == "action_vae":
            _copy_statistics(statistics, partial)  # model.json makes it a model, so all else comes before
            return import_action_vae(opened, partial, model_config)
        if kind == "vqgan":
            return import_vqgan(opened, partial, model_config)
        if model_config is not None:
            opened = replace(opened, config=dict(model_config))
        # What comes with the transformer is small: first, so that a fault in it does not cost the large import.
        assets, parts = partial / "assets", []
        _copy_statistics(statistics, partial)
        if vqgan_source:
            parts.append(import_vqgan(open_checkpoint(vqgan_source), assets / "vqgan"))
        if action_vae_source:
            _copy_statistics(statistics, assets / "action_vae")
            parts.append(import_action_vae(open_checkpoint(action_vae_source), assets / "action_vae"))
        # The whole VQGAN replaces the half that Hugging Face's files carry.
        ignore = (*ignore, VQ_PREFIX) if vqgan_source else ignore
        report = import_vla(opened, partial, tokenizer=tokenizer, ignore=ignore, vq=vq, seed=seed)
        report.parts += parts
    return report
