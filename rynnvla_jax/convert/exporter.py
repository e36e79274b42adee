"""Model directories -> export folders, streamed: at most one exported tensor is in memory at a time.

rynnvla        what a robot runs (`rynnvla_jax.deploy.export_format`)
transformers   what `transformers`' Chameleon loads: no state_projection, no action_head; q/k norm one row a head
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np

from rynnvla_jax.actions import Statistics
from rynnvla_jax.checkpoint import model_dir, provenance, reader
from rynnvla_jax.config import ActionVAEConfig, TrainConfig, VLAConfig, VQGANConfig
from rynnvla_jax.convert import ConversionError, action_vae, stream, vla, vqgan
from rynnvla_jax.convert.foreign import create_safetensors, map_tensor, safetensors_header
from rynnvla_jax.convert.importer import foreign_shape, model_shapes, read_leaf
from rynnvla_jax.convert.table import Entry, to_foreign
from rynnvla_jax.deploy import export_format
from rynnvla_jax.recording import Recording
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import image_name

FORMATS = ("rynnvla", "transformers")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 4 * 10**9
_HF_IMAGE = "<reserved08707>"  # the entry that transformers renames to <image>


@dataclass
class Export:
    """The files that an export wrote."""

    kind: str
    step: int
    files: dict[str, int] = field(default_factory=dict)  # name -> tensors
    weights: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kind}, step {self.step}: {self.weights:,} weights"]
        lines += [f"  {name}: {n} tensors" for name, n in self.files.items()]
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def write_export(
    model: str | Path,
    out: Path,
    *,
    step: int = -1,
    layout: str = "rynnvla",
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    weights: str = "raw",
) -> Export:
    """Writes `out` (an existing empty folder) from a model directory; does not verify it.

    Args:
      step: -1 is the newest.
      layout: one of FORMATS. An ActionVAE or VQGAN has one layout only.
      dtype: of the transformer's tensors; the VQGAN and the ActionVAE stay float32.
      shard_bytes: a file larger than this is split, with an index.
      weights: "raw", or "ema": their average (`optimizer.ema`).

    Raises:
      ConversionError, CheckpointError: not a model directory, or parameters that do not fit its configuration.
    """
    kind = read_kind(model)
    step = reader.find_step(model, step)
    report = Export(kind, step)
    if weights != "raw":
        report.notes.append("the weights are the average over the updates (optimizer.ema)")
    if kind == "vla":
        _export_vla(model, out, step, layout, DTYPES[dtype], shard_bytes, report, weights)
    elif layout != "rynnvla":
        raise ConversionError(f"{model} is of kind {kind!r}; only a VLA has the layout {layout!r}")
    else:
        _export_frozen(kind, model, out, step, report, weights)
    export_format.write_sums(out)
    return report


def read_kind(model: str | Path) -> str:
    """The kind of model in a model directory: "vla", "action_vae" or "vqgan"."""
    path = files.place(model) / "assets" / "model.json"
    if not path.exists():
        raise ConversionError(f"{model} is not a model directory: {path} is missing")
    kind = files.read_json(path).get("kind")
    if kind not in model_dir.MODEL_CONFIGS:
        raise ConversionError(f"{path}: kind is {kind!r}; known are {', '.join(model_dir.MODEL_CONFIGS)}")
    return kind


def open_vla(model: str | Path, step: int, weights: str = "raw") -> tuple[VLAConfig, dict[str, stream.StoredArray]]:
    """Configuration and stored arrays of a VLA. Raises CheckpointError when they do not fit."""
    config = model_dir.read_model_config(model, "vla")
    arrays = stream.open_params(model, step, weights)
    wanted = stream.nest({k: np.broadcast_to(np.float32(0), s) for k, s in model_shapes(config).items()})
    model_dir.check_tree({k: a.shape for k, a in arrays.items()}, wanted, model)
    return config, arrays


def _export_vla(
    model: str | Path,
    out: Path,
    step: int,
    layout: str,
    dtype: np.dtype,
    shard_bytes: int,
    report: Export,
    weights: str,
) -> None:
    config, arrays = open_vla(model, step, weights)
    assets = files.place(model) / "assets"
    transformer = config.transformer
    robot = layout == "rynnvla"
    if robot and not config.acts:
        raise ConversionError(
            f"{model} is a model of stage 1, which predicts no actions; export a model of stage 2 or 3, or with "
            "--format transformers"
        )
    rows = None if robot else (transformer.num_heads, transformer.num_kv_heads)
    entries = vla.table(config, heads=robot, norm_rows=rows)
    extra = {} if robot else _vqmodel(assets)
    tensors = {e.foreign: (dtype, foreign_shape(e, arrays[e.ours].shape)) for e in entries}
    tensors |= {key: (np.dtype(np.float32), value.shape) for key, value in extra.items()}
    locations = _lay_out(out, tensors, shard_bytes, report)
    for entry in entries:
        _write(arrays[entry.ours], entry, map_tensor(*locations[entry.foreign]))
    for key, value in extra.items():
        map_tensor(*locations[key])[...] = value
    report.weights = sum(math.prod(shape) for _, shape in tensors.values())
    if wide := sorted({a.path for a in arrays.values() if _rereads(a)}):
        report.notes.append(
            f"{len(wide)} arrays are stored with several layers in one chunk, so memory is bounded by their chunks"
        )
    tokenizer = None
    if (assets / "tokenizer.json").exists():
        tokenizer = out / export_format.TOKENIZER
        tokenizer.write_bytes((assets / "tokenizer.json").read_bytes())
    else:
        report.notes.append("no assets/tokenizer.json: a policy needs one")
    if robot:
        _export_robot(model, out, config, report)
    else:
        values = _hf_config(config, assets, tokenizer, report)
        export_format.write_json(out / export_format.CONFIG, values | {"dtype": dtype.name})


def _lay_out(
    out: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], shard_bytes: int, report: Export
) -> dict[str, tuple[Path, tuple[np.dtype, tuple[int, ...], int]]]:
    """Creates the safetensors files, still empty. Returns where each tensor goes, for `map_tensor`."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for key, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = (dtype, shape)
        size += nbytes
    names = [export_format.WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        export_format.write_json(out / export_format.INDEX, index)
    locations: dict[str, Any] = {}
    for name, shard in zip(names, shards, strict=True):
        create_safetensors(out / name, shard)
        locations |= {key: (out / name, location) for key, location in safetensors_header(out / name)[0].items()}
        report.files[name] = len(shard)
    return locations


def _write(array: stream.StoredArray, entry: Entry, out: np.memmap) -> None:
    """Copies one parameter, or one layer of it, into a mapped foreign tensor, casting."""
    view = entry.transform.to_ours(out)
    layer = slice(None) if entry.layer is None else slice(entry.layer, entry.layer + 1)
    if view.size != out.size or not np.may_share_memory(view, out):  # rows to be repeated: small
        values = array.read((layer,))
        values = values if entry.layer is None else values[0]
        out[...] = _cast(entry.transform.to_foreign(values)[: entry.rows], out.dtype, entry.foreign)
        return
    for index in array.pieces(entry.layer):
        values = array.read(index)
        inner, values = (index, values) if entry.layer is None else (index[1:], values[0])
        # Padding rows of ours lie outside the foreign tensor.
        kept = tuple(slice(0, max(0, min(s.stop, n) - s.start)) for s, n in zip(inner, view.shape, strict=True))
        there = tuple(slice(s.start, s.start + k.stop) for s, k in zip(inner, kept, strict=True))
        view[there] = _cast(values[kept], out.dtype, entry.foreign)


def _cast(values: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
        raise ConversionError(
            f"{key} has values above 65504, the limit of float16; export with --dtype bfloat16 or float32"
        )
    return cast


def _rereads(array: stream.StoredArray) -> bool:
    chunk = cast(tuple[int, ...], array.store.chunk_layout.read_chunk.shape)
    return array.path.startswith("transformer.blocks.") and chunk[0] > 1


def _export_robot(model: str | Path, out: Path, config: VLAConfig, report: Export) -> None:
    """config.json, statistics.json, run.json, vqgan/ and action_vae/ of the layout "rynnvla"."""
    assets = files.place(model) / "assets"
    train = TrainConfig(stage="robot")
    if (assets / "config.json").exists():
        train = model_dir.read_train_config(model)
    else:
        report.notes.append("no assets/config.json (an imported model): sequence and image settings are the defaults")
    if (assets / "statistics.json").exists():
        (out / export_format.STATISTICS).write_bytes((assets / "statistics.json").read_bytes())
        read_leaf(Statistics.from_json, out / export_format.STATISTICS)
    else:
        report.notes.append("no assets/statistics.json: a policy needs it")
    if (assets / "run.json").exists():  # what it was trained with: `rynnvla_jax.checkpoint.provenance`
        (out / "run.json").write_bytes((assets / "run.json").read_bytes())
    chunk, action_dim = train.data.chunk, config.raw_width
    for kind in ("vqgan", "action_vae"):
        if kind == "action_vae" and config.actions == "raw":
            continue
        if not (assets / kind / "assets" / "model.json").exists():
            report.notes.append(f"no assets/{kind}: a policy needs it")
            continue
        part = Export(kind, reader.find_step(assets / kind))
        (out / kind).mkdir()
        frozen = _export_frozen(kind, assets / kind, out / kind, part.step, part)
        report.files |= {f"{kind}/{name}": n for name, n in part.files.items()}
        if isinstance(frozen, ActionVAEConfig):
            chunk, action_dim = frozen.chunk, frozen.action_dim
    cameras = {"front": train.data.front}
    if train.sequence.use_wrist_frame:
        cameras["wrist"] = train.data.wrist
    export_format.write_config(
        out,
        export_format.ExportConfig(
            vla=config,
            sequence=train.sequence,
            image=replace(train.data.image, jitter=0.0),
            chunk=chunk,
            action_dim=action_dim,
            normalization=train.data.normalization,
            cameras=export_format.Cameras(**cameras),
            recording=_recording(model, train),
        ),
    )


def _recording(model: str | Path, train: TrainConfig) -> Recording:
    """How the data of training were recorded. A corpus of codes does not say how frames were before they were cut."""
    found = provenance.recording(files.place(model))
    sources = [train.data.source, *(source for source, _ in train.data.mixture)]
    cut = train.data.image.fit == "square" and any(source.startswith("records:") for source in sources)
    return replace(found, frames=()) if cut else found


def _export_frozen(
    kind: str, model: str | Path, out: Path, step: int, report: Export, weights: str = "raw"
) -> ActionVAEConfig | VQGANConfig:
    """An ActionVAE or VQGAN in its public layout, float32."""
    config = model_dir.read_model_config(model, kind)
    tensors = _frozen_tensors(kind, config, model_dir.load_params(model, step=step, weights=weights)[0])
    report.weights = sum(x.size for x in tensors.values())
    locations = _lay_out(out, {k: (np.dtype(np.float32), x.shape) for k, x in tensors.items()}, SHARD_BYTES, report)
    for key, value in tensors.items():
        map_tensor(*locations[key])[...] = value
    export_format.write_model_config(out, config)
    return config


def _frozen_tensors(kind: str, config: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    entries = action_vae.table(config) if kind == "action_vae" else vqgan.table(config, "decoder" in params)
    constants = action_vae.constants(config) if kind == "action_vae" else {}
    # On the host first: indexing layers on the device compiles a program for each shape.
    return to_foreign(entries, jax.device_get(params)) | {k: np.asarray(v, np.float32) for k, v in constants.items()}


def _vqmodel(assets: Path) -> dict[str, np.ndarray]:
    """assets/vqgan under transformers' names; it has no decoder there."""
    if not (assets / "vqgan" / "assets" / "model.json").exists():
        return {}
    config = model_dir.read_model_config(assets / "vqgan", "vqgan")
    tensors = _frozen_tensors("vqgan", config, model_dir.load_params(assets / "vqgan")[0])
    return {f"model.vqmodel.{k}": v for k, v in tensors.items() if not k.startswith("decoder.")}


def _hf_config(config: VLAConfig, assets: Path, tokenizer: Path | None, report: Export) -> dict[str, Any]:
    """config.json for transformers."""
    values = vla.config_to_foreign(config)
    for name in ("state_dim", "action_head_type", "action_latent_dim"):
        del values[name]
    values["vocabulary_map"] = dict(_vocabulary_map(config, tokenizer))
    names = values["vocabulary_map"]
    if "<s>" in names:
        values |= {"bos_token_id": names["<s>"], "eos_token_id": names.get("</s>"), "pad_token_id": names.get("<pad>")}
    if (assets / "vqgan" / "assets" / "model.json").exists():
        vq = model_dir.read_model_config(assets / "vqgan", "vqgan")
        values["vq_config"] = {
            "embed_dim": vq.code_width,
            "num_embeddings": vq.num_codes,
            "double_latent": False,
            "latent_channels": vq.z_channels,
            "resolution": vq.resolution,
            "in_channels": vq.in_channels,
            "base_channels": vq.channels,
            "channel_multiplier": list(vq.multipliers),
            "num_res_blocks": vq.num_res_blocks,
            "attn_resolutions": list(vq.attention_resolutions) or None,
            "dropout": vq.dropout,
            "attn_type": "vanilla",
        }
    else:
        report.notes.append("no assets/vqgan: transformers will initialise model.vqmodel randomly, with a warning")
    return values


def _vocabulary_map(config: VLAConfig, tokenizer: Path | None) -> Iterator[tuple[str, int]]:
    """Name -> id of every text entry and image code, and `<image>` as transformers names it."""
    if tokenizer is not None:
        from tokenizers import Tokenizer

        names = Tokenizer.from_buffer(tokenizer.read_bytes()).get_vocab(with_added_tokens=True)
        yield from names.items()
        if _HF_IMAGE in names:
            yield "<image>", names[_HF_IMAGE]
        return
    first, last = config.transformer.image_tokens
    for code in range(min(last, config.transformer.vocab_size) - first):
        yield image_name(code), first + code
