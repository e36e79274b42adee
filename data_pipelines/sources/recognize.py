"""Recognizes the kind of a data set by its files."""

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.sources import KINDS, copies
from rynnvla_jax.config import ConfigError
from rynnvla_jax.storage import files, hub

_CAPTIONS = ("captions.csv", "captions.jsonl", "captions.parquet")
_HDF5 = (".hdf5", ".h5")


def source_of(text: str) -> str:
    """ "KIND:PATH" for a command's argument, which is KIND:PATH itself or a PATH whose kind is recognized by its files.

    Raises ConfigError, with the list of kinds, when the kind is not recognized.
    """
    if text.partition(":")[0] in KINDS:
        return text
    kinds = "\n".join(f"  {kind + ':PATH':<13} {what}" for kind, what in KINDS.items())
    if hub.is_name(text):
        root = copies.marked(text)
    else:
        root = files.place(text)
        files.check(root)
        if not files.exists(root):
            raise ConfigError(f"{text} does not exist; correct the path, or write KIND:PATH:\n{kinds}")
    kind = next(_kinds(root), None)
    if kind is None:
        raise ConfigError(f"{text} contains no file that shows what kind of data it is; write KIND:PATH:\n{kinds}")
    return f"{kind}:{text}"


def _kinds(root: Path) -> Iterator[str]:
    if root.is_file():
        if root.suffix in (*_HDF5, ".json"):
            yield "libero" if root.suffix in _HDF5 and _is_libero(root) else "hdf5"
        return
    for file, kind in (("meta/info.json", "lerobot"), ("corpus.json", "records"), ("dataset_info.json", "rlds")):
        if (root / file).is_file():
            yield kind
    if (root / "lang_annotations").is_dir():
        yield "calvin"
    if any((root / name).is_file() for name in _CAPTIONS):
        yield "clips"
    first = next((p for p in root.rglob("*") if p.suffix in _HDF5), None)
    if first is not None:
        yield "egodex" if first.with_suffix(".mp4").is_file() else "libero" if _is_libero(first) else "hdf5"


def _is_libero(path: Path) -> bool:
    from data_pipelines.sources.libero import is_libero  # here: the commands' help does without h5py

    return is_libero(path)
