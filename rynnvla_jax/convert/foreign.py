"""Public checkpoint files, read and written one tensor at a time.

    safetensors, single or sharded with an index (own reader: the library maps whole files into memory)
    pytorch_model*.bin with or without index, single .pt / .pth / .ckpt (`weights_only`: no code runs)
    Meta's own layout: consolidated*.pth and params.json, presented under HF-style keys

A `Checkpoint` knows all keys and shapes at once; `read` materialises one tensor in its stored dtype.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.deploy import export_format
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.metadata import Count, Entries, Layers, Size
from rynnvla_jax.storage import files

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNMAPPED_LIMIT = 2**30
_TOUCHED_LIMIT = 2**26
_TOKENIZERS = (
    "tokenizer.json",
    "text_tokenizer.json",
    "original_tokenizers/text_tokenizer.json",
    "../../tokenizer/text_tokenizer.json",
)


@dataclass(frozen=True)
class _Tensor:
    """What a safetensors header says of one tensor. `data_offsets`: first and last + 1 byte behind the header."""

    dtype: metadata.Name
    shape: Annotated[list[Count], Entries(0, 8)]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class _MetaParams:
    """Meta's params.json: the model's sizes, which may be in a group "model"."""

    dim: Size
    n_layers: Layers
    n_heads: Size
    n_kv_heads: Size | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    swin_norm: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one foreign checkpoint."""

    source: Path
    format: str  # for the report
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # one tensor, in its stored dtype; may be a view of a mapped file
    config: dict[str, Any] = field(default_factory=dict)  # config.json, if any
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)  # what reading had to decide, for the report
    read_rows: Callable[[str, int, int], np.ndarray] | None = None  # rows [start, stop) alone; safetensors only


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Opens a file or folder of any known format. Only headers are read.

    Raises:
      ConversionError: no readable checkpoint, a damaged file, or a pickle that contains more than tensors.
    """
    source = Path(source)
    if not source.exists():
        raise ConversionError(f"{source} does not exist")
    if source.is_file():
        opened = _open_safetensors if source.suffix == ".safetensors" else _open_torch
        return opened(source, [source], config=_read_config(source.parent))
    tokenizer = next((source / name for name in _TOKENIZERS if (source / name).exists()), None)
    config = _read_config(source)
    if meta := sorted(source.glob("consolidated*.pth")):
        return _open_meta(source, meta, tokenizer)
    for index, opened in (
        ("model.safetensors.index.json", _open_safetensors),
        ("pytorch_model.bin.index.json", _open_torch),
    ):
        if (source / index).exists():
            return opened(source, _indexed(source / index), config=config, tokenizer=tokenizer)
    for pattern, opened in (("model*.safetensors", _open_safetensors), ("pytorch_model*.bin", _open_torch)):
        if paths := sorted(source.glob(pattern)):
            return opened(source, paths, config=config, tokenizer=tokenizer)
    single = [f for pattern in ("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin") for f in source.glob(pattern)]
    if len(single) == 1:
        opened = _open_safetensors if single[0].suffix == ".safetensors" else _open_torch
        return opened(source, single, config=config, tokenizer=tokenizer)
    found = f"several: {', '.join(sorted(f.name for f in single))}; give one of them" if single else "none"
    raise ConversionError(
        f"{source}: no model*.safetensors, pytorch_model*.bin or consolidated*.pth; other weight files: {found}"
    )


def safetensors_header(path: Path) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], int]:
    """Key -> (dtype, shape, offset in the file), and the file's header size.

    Raises:
      ConversionError: not a safetensors file, a dtype we do not know, or a truncated file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise ConversionError(files.damage(path, "is not a safetensors file; copy it again"))
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path} is not a safetensors file ({shorten(error)}); copy it again") from None
    if not isinstance(header, dict):
        raise ConversionError(f"{path} is not a safetensors file (its header is not an object); copy it again")
    tensors = {}
    for key, info in header.items():
        if key == "__metadata__":
            continue
        damaged = f"{path} is truncated or damaged at {metadata.shown(key)[1:-1]}"
        try:
            tensor = metadata.parse(_Tensor, info, "it")
        except metadata.MetadataError as error:
            raise ConversionError(f"{damaged} ({error}); copy it again") from None
        dtype, (begin, end) = _DTYPES.get(tensor.dtype), tensor.data_offsets
        if dtype is None:
            raise ConversionError(f"{path}: {key[:100]} is {tensor.dtype}; known dtypes are {', '.join(_DTYPES)}")
        if end - begin != math.prod(tensor.shape) * dtype.itemsize or start + end > size:
            raise ConversionError(f"{damaged}; copy it again")
        tensors[key] = (dtype, tuple(tensor.shape), start + begin)
    return tensors, start


def create_safetensors(path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Writes the header and reserves space for the tensors, which `map_tensor` then fills in any order.

    Raises:
      ConversionError: the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + offset
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            os.posix_fallocate(file.fileno(), 0, size)  # a hole that the disk cannot fill would be SIGBUS later
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise ConversionError(
            f"{path} cannot be written ({error.strerror}): it takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            "free; make room, or write to another disk"
        ) from error


def map_tensor(path: Path, location: tuple[np.dtype, tuple[int, ...], int]) -> np.memmap:
    """A writable view of one tensor of a file made by `create_safetensors`; location as `safetensors_header` says."""
    dtype, shape, offset = location
    return np.memmap(path, dtype, "r+", offset, shape)


def _open_safetensors(source: Path, paths: list[Path], **kwargs: Any) -> Checkpoint:
    locations: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
    for file in paths:
        for key, location in safetensors_header(file)[0].items():
            if key in locations:
                raise ConversionError(f"{key} is in both {locations[key][0].name} and {file.name}; remove one")
            locations[key] = (file, *location)

    def read(key: str) -> np.ndarray:
        file, dtype, shape, offset = locations[key]
        return np.fromfile(file, dtype, math.prod(shape), offset=offset).reshape(shape)

    def read_rows(key: str, start: int, stop: int) -> np.ndarray:
        file, dtype, (rows, *rest), offset = locations[key]
        size, stop = math.prod(rest), min(stop, rows)
        at = offset + start * size * dtype.itemsize
        return np.fromfile(file, dtype, (stop - start) * size, offset=at).reshape(stop - start, *rest)

    kind = f"safetensors, {len(paths)} file{'s' if len(paths) > 1 else ''}"
    return Checkpoint(source, kind, {k: p[2] for k, p in locations.items()}, read, read_rows=read_rows, **kwargs)


def _open_torch(source: Path, paths: list[Path], **kwargs: Any) -> Checkpoint:
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    opened: dict[Path, dict[str, Any]] = {}
    touched = dict.fromkeys(paths, 0)  # bytes read through the mapping that is open now
    for file in paths:
        content, mapped = _load_torch(file)
        if not mapped:
            opened[file], touched[file] = content, -_UNMAPPED_LIMIT
        for key, tensor in content.items():
            if key in where:
                raise ConversionError(f"{key} is in both {where[key].name} and {file.name}; remove one")
            where[key], shapes[key] = file, tuple(tensor.shape)

    def read(key: str) -> np.ndarray:
        # Pages of a mapping count as our memory for as long as it lives, so it is renewed now and then.
        file = where[key]
        if file not in opened:
            opened[file], touched[file] = _load_torch(file)[0], 0
        tensor = opened[file][key]
        touched[file] += tensor.nbytes
        if touched[file] > _TOUCHED_LIMIT:
            del opened[file]
        return _to_numpy(tensor)

    kind = f"torch pickle, {len(paths)} file{'s' if len(paths) > 1 else ''}"
    return Checkpoint(source, kind, shapes, read, **kwargs)


def _load_torch(path: Path) -> tuple[dict[str, Any], bool]:
    """The tensors of a .bin/.pt/.pth/.ckpt and whether they are mapped. A `state_dict` or `model` is unwrapped."""
    import torch

    mapped = True

    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):  # zip; before torch 1.6 a pickle
                raise ConversionError(files.damage(path, "is not a torch file (a web page?); download it again"))
        try:
            content = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            if path.stat().st_size > _UNMAPPED_LIMIT:
                raise ConversionError(
                    f"{path} is in torch's format before 1.6, which must be read whole, and is larger than 1 GiB; "
                    "re-save it with a newer torch"
                ) from None
            content, mapped = load(), False
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} contains more than tensors and was not read, because unpickling it could run code "
            f"({shorten(error)}); get a safetensors file, or re-save its state_dict alone"
        ) from None
    except ConversionError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ConversionError(f"{path} is not a readable torch file ({shorten(error)}); copy it again") from None
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} contains {type(content).__name__}, not a dict of tensors")
    if other := [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)]:
        raise ConversionError(
            f"{path} contains {', '.join(other[:8])}, which are not tensors; re-save the state_dict alone"
        )
    for key, tensor in content.items():
        if not isinstance(key, str) or not _is_stored(tensor):
            what = f"{tensor.dtype}, {tensor.layout}"
            raise ConversionError(
                f"{path}: {metadata.shown(key)} ({what}) is not a plain tensor that is stored whole; re-save it as one"
            )
    if all(k.startswith("module.") for k in content):  # saved from DistributedDataParallel
        content = {k.removeprefix("module."): v for k, v in content.items()}
    return dict(content), mapped


def _is_stored(tensor: Any) -> bool:
    """Whether every element has its own place in the file: a view can claim any size. And numpy knows its type."""
    import torch

    known = (torch.strided == tensor.layout) and tensor.device.type == "cpu" and not tensor.is_quantized
    plain = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16}
    if not known or tensor.dtype not in plain | {torch.int8, torch.uint8, torch.bool}:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# Meta's names -> HF-style names, and the axis along which model-parallel shards are joined (None: every
# shard holds the same; "rows": one row a shard). Source: Chameleon's release; its HF conversion.
_META_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "attention.q_normalization.weight": ("self_attn.q_norm.weight", "rows"),
    "attention.q_normalization.bias": ("self_attn.q_norm.bias", "rows"),
    "attention.k_normalization.weight": ("self_attn.k_norm.weight", "rows"),
    "attention.k_normalization.bias": ("self_attn.k_norm.bias", "rows"),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_META_TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_META_IGNORED = ("rope.freqs",)
_INTERLEAVED = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")


def _open_meta(source: Path, paths: list[Path], tokenizer: Path | None) -> Checkpoint:
    params = read_json(source / "params.json")
    if (source / "consolidate_params.json").exists():
        params |= read_json(source / "consolidate_params.json")
    try:
        model = metadata.parse(_MetaParams, params.get("model", params), str(source / "params.json"))
    except metadata.MetadataError as error:
        raise ConversionError(f"{error}; copy it again") from None
    if model.dim % model.n_heads:
        raise ConversionError(
            f"{source / 'params.json'}: dim {model.dim} is not a multiple of n_heads {model.n_heads}; copy it again"
        )
    head_dim = model.dim // model.n_heads
    shards = [_open_torch(source, [file]) for file in paths]
    if unequal := {k for s in shards for k in s.shapes if any(k not in other.shapes for other in shards)}:
        raise ConversionError(f"{source}: not in every shard: {', '.join(sorted(unequal)[:8])}")
    names: dict[str, tuple[str, Any]] = {}  # HF-style key -> (Meta's key, how shards are joined)
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in shards[0].shapes.items():
        if key in _META_IGNORED:
            continue
        found = _meta_name(key)
        if found is None:  # left under its own name, so that the importer lists it as left over
            names[key], shapes[key] = (key, None), shape
            continue
        ours, axis = found
        uneven = [s.shapes[key] for s in shards if head_dim % 2 or not s.shapes[key] or s.shapes[key][0] % head_dim]
        if ours.endswith(_INTERLEAVED) and uneven:
            raise ConversionError(
                f"{source}: {key} has shape {list(uneven[0])}, which are no heads of dim / n_heads = {head_dim} (even) "
                "values; copy params.json again"
            )
        names[ours] = (key, axis)
        if axis == "rows":
            shapes[ours] = (len(shards), *shape)
        elif axis is None:
            shapes[ours] = shape
        else:
            parts = [s.shapes[key] for s in shards]
            if len({(len(p), p[:axis], p[axis + 1 :]) for p in parts}) > 1 or len(shape) <= axis:
                raise ConversionError(f"{source}: {key} has shapes {listing(parts, 4)} that cannot be joined")
            shapes[ours] = tuple(sum(p[i] for p in parts) if i == axis else n for i, n in enumerate(shape))

    notes: list[str] = []

    def read(key: str) -> np.ndarray:
        theirs, axis = names[key]
        if axis is None:
            parts = [s.read(theirs) for s in shards]
            if all(np.array_equal(parts[0], p) for p in parts):
                return parts[0]
            notes.append(f"{theirs} differs between shards: using their mean, as transformers does")
            return np.mean(np.stack(parts).astype(np.float32), axis=0)
        out, filled = np.empty(0), 0
        for i, shard in enumerate(shards):
            part = shard.read(theirs)
            out = out if i else np.empty(shapes[key], part.dtype)
            if key.endswith(_INTERLEAVED):
                part = _half_split(part, head_dim)
            if axis == "rows":
                out[i] = part
            else:
                out[(slice(None),) * axis + (slice(filled, filled + part.shape[axis]),)] = part
                filled += part.shape[axis]
        return out

    kv_heads = shapes.get("model.layers.0.self_attn.k_proj.weight", (model.dim,))[0] // head_dim
    config = {
        "model_type": "chameleon",
        "vocab_size": shapes.get("model.embed_tokens.weight", (0,))[0],
        "hidden_size": model.dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads or kv_heads,
        "intermediate_size": shapes.get("model.layers.0.mlp.gate_proj.weight", (0,))[0],
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "swin_norm": model.swin_norm,
        "model_parallel_size": len(paths),
    }
    kind = f"Meta's layout, {len(paths)} model-parallel shard{'s' if len(paths) > 1 else ''}"
    return Checkpoint(source, kind, shapes, read, config, tokenizer, notes)


def _meta_name(key: str) -> tuple[str, Any] | None:
    if key in _META_TOP:
        return _META_TOP[key]
    parts = key.split(".", 2)
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit() and parts[2] in _META_LAYER:
        name, axis = _META_LAYER[parts[2]]
        return f"model.layers.{parts[1]}.{name}", axis
    return None


def _half_split(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotary pairs (0, 1), (2, 3), ... -> (0, E/2), (1, E/2 + 1), ... inside each head of the leading axis."""
    return x.reshape(-1, head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _indexed(index: Path) -> list[Path]:
    try:
        names = export_format.read_index(index)
    except export_format.ExportError as error:
        raise ConversionError(str(error)) from None
    if missing := [n for n in names if not files.exists(index.parent / n)]:
        shown = shorten(listing(missing, 8))
        raise ConversionError(f"{index} lists {shown}, which {index.parent} does not contain; copy them too")
    return [index.parent / n for n in names]


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object. Raises ConversionError naming it."""
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing") from None
    except files.DamagedFileError as error:
        raise ConversionError(f"{error}; copy it again") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path} contains {type(values).__name__}, not an object")
    return values
