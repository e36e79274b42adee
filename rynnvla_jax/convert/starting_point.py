"""The model directory of what `config.init_from.path`, `vqgan` and `action_vae` name: a model directory, or PyTorch
weights, which are imported once; of this machine, in a bucket, or on the Hugging Face Hub.

    ${RYNNVLA_CACHE:-~/.cache/rynnvla_jax}/imported/DIGEST/   of the files' names, sizes and times, or the Hub's commit
"""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import rynnvla_jax
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.config import BEST, NEWEST, ConfigError
from rynnvla_jax.convert import importer
from rynnvla_jax.convert.foreign import open_checkpoint
from rynnvla_jax.convert.frozen import VQ_PREFIX
from rynnvla_jax.deploy import export_format
from rynnvla_jax.storage import bucket_cache, files, hub
from rynnvla_jax.storage.fetch import cache

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DESCRIBED = ("", "original_tokenizers")  # folders with descriptions and tokenizers


@functools.cache
def model_dir(path: str, step: int = NEWEST, weights: str = "raw") -> Path:
    """The model directory of a name. What was copied or imported is found again by the next process.

    Args:
      step, weights: those that will be read, which are fetched from the Hub.

    Raises:
      ConfigError: there is nothing of that name, or no model in it.
      ConversionError: PyTorch weights that cannot be imported.
      HubError, BucketError, CacheError.
    """
    if hub.is_name(path):
        names = list(hub.contents(path))
        if "assets/model.json" in names:
            if step == BEST:  # the newest one names it
                step = reader.best_step(hub.here(path, choose=_what_is_best, show=False)) or NEWEST
            return hub.here(path, choose=functools.partial(_of_model_dir, step, weights))
        if not any(name.endswith(_WEIGHTS) for name in (hub.parse(path).path, *names)):
            raise ConfigError(f"{path} holds neither a model directory (assets/model.json) nor PyTorch weights")
        folder = hub.here(path, choose=of_weights)
        return _imported(path, folder, folder.as_posix())
    place = files.place(path)
    if (place / "assets").is_dir():
        return place
    if not place.exists():
        raise ConfigError(f"{path} does not exist; correct the path")
    if place.is_dir() and not any(p.suffix in _WEIGHTS for p in place.iterdir()):
        raise ConfigError(
            f"{path} is neither a model directory (it contains no assets/) nor a folder of PyTorch weights; give a "
            "work dir, an imported model, an exported folder, or hf://USER/NAME"
        )
    folder = bucket_cache.copy(place)
    found = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    states = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in found]
    return _imported(path, folder, f"{folder.absolute()} {states}")


def file(path: str) -> Path:
    """The file of a name; of one on the Hub a copy. Raises ConfigError, HubError."""
    if hub.is_name(path):
        if "" not in hub.contents(path):
            raise ConfigError(f"{path} is a folder; give the file in it, for example {path.rstrip('/')}/tokenizer.json")
        return hub.here(path)
    return files.place(path)


def of_weights(names: Sequence[str]) -> list[str]:
    """Of the files of a repository: descriptions, tokenizer, and one set of weights, safetensors where there are some.

    The weights of an exported policy's VQGAN and ActionVAE belong to it.
    """
    top = [name for name in names if "/" not in name]
    patterns = (r"model.*\.safetensors", r"pytorch_model.*\.bin", r"consolidated.*\.pth")
    sets = ([name for name in top if re.fullmatch(pattern, name)] for pattern in patterns)
    weights = next((found for found in sets if found), [name for name in top if name.endswith(_WEIGHTS)])
    parts = [name for name in names if name.startswith((f"{export_format.VQGAN}/", f"{export_format.ACTION_VAE}/"))]
    small = [name for name in names if name.endswith((".json", ".yaml")) and name.rpartition("/")[0] in _DESCRIBED]
    return list(dict.fromkeys([*small, *weights, *parts]))


def _of_model_dir(step: int, weights: str, names: Sequence[str]) -> list[str]:
    """`assets/` and one step; without the state of the optimizer, unless the average of the weights is asked for."""
    wanted = f"checkpoints/{_newest(names) if step == NEWEST else step}/"
    state = f"{wanted}train_state/"
    return [
        name
        for name in names
        if name.startswith(("assets/", wanted)) and (weights == "ema" or not name.startswith(state))
    ]


def _newest(names: Sequence[str]) -> int:
    found = [int(parts[1]) for name in names if (parts := name.split("/"))[0] == "checkpoints" and parts[1].isdigit()]
    return max(found, default=0)


def _what_is_best(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"checkpoints/{_newest(names)}/data/")]


def _imported(path: str, folder: Path, key: str) -> Path:
    """The model directory that PyTorch weights become; made once for each `key` and version of this package."""
    entry = hashlib.sha256(f"{rynnvla_jax.__version__} {key}".encode()).hexdigest()[:24]
    out = cache() / "imported" / entry
    out.parent.mkdir(parents=True, exist_ok=True)
    said = f"waiting for another process of this machine that imports {path}"
    with files.locked(out.parent / f"{entry}.lock", said=said):
        if not out.exists():
            print(f"{path}: PyTorch weights are imported into {out}", file=sys.stderr, flush=True)
            _import(folder, out)
            files.write_text(out / "source.json", json.dumps({"source": path}) + "\n")
    return out


def _import(folder: Path, out: Path) -> None:
    """With everything that lies in the folder: tokenizer, statistics, VQGAN and ActionVAE."""
    source = importer.public_names(open_checkpoint(folder))
    kind = importer.kind_of(source)
    beside = [
        folder / export_format.STATISTICS,
        folder.parent / export_format.STATISTICS,
    ]  # of action_vae/ in an export
    statistics = next((f for f in beside[: 1 + (kind == "action_vae")] if f.is_file()), None)
    if kind != "vla":
        importer.import_checkpoint(folder, out, statistics=statistics if kind == "action_vae" else None)
        return
    parts = {name: folder / name for name in (export_format.VQGAN, export_format.ACTION_VAE)}
    given = {name: part if part.is_dir() else None for name, part in parts.items()}
    importer.import_checkpoint(
        folder,
        out,
        vqgan_source=given[export_format.VQGAN],
        action_vae_source=given[export_format.ACTION_VAE],
        statistics=statistics,
        vq=given[export_format.VQGAN] is None and any(key.startswith(VQ_PREFIX) for key in source.shapes),
    )
