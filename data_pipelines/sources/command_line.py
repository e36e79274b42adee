"""What a command line says of a data set: SOURCE, and keys of `config.data` as --data KEY=VALUE."""

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.sources import KINDS
from rynnvla_jax.config import ConfigError, DataConfig, from_dict

HELP = "KIND:PATH, or PATH where its files tell the kind"
_CAPTIONS = ("captions.csv", "captions.jsonl", "captions.parquet")
_HDF5 = (".hdf5", ".h5")


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds SOURCE (`several`: one or more) and --data."""
    if several:
        parser.add_argument("sources", metavar="SOURCE", nargs="+", help=HELP)
    else:
        parser.add_argument("source", metavar="SOURCE", help=HELP)
    add_data(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data."""
    parser.add_argument(
        "--data",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a key of config.data, such as front=observation.images.top or rlds.fps=10; may be repeated",
    )


def data_config(pairs: Sequence[str]) -> DataConfig:
    """Of "KEY=VALUE" texts, KEY dotted below config.data. Raises ConfigError for what is no pair, or no such key."""
    values: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--data {pair} is not KEY=VALUE")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *parents, last = key.split(".")
        group = values
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise ConfigError(f"--data {pair}: another --data makes {parent} one value; it is a group of keys")
        group[last] = value
    return from_dict(DataConfig, values, "config.data")


def source_of(text: str) -> str:
    """ "KIND:PATH" for what a command line says: that itself, or a bare PATH whose kind its files tell.

    Raises ConfigError, with the list of kinds, when they do not.
    """
    if text.partition(":")[0] in KINDS:
        return text
    root = Path(text).expanduser()
    kinds = "\n".join(f"  {kind + ':PATH':<13} {what}" for kind, what in KINDS.items())
    if not root.exists():
        raise ConfigError(f"{text} does not exist; correct the path, or write KIND:PATH:\n{kinds}")
    kind = next(_kinds(root), None)
    if kind is None:
        raise ConfigError(f"{text} holds no file that tells what kind of data it is; write KIND:PATH:\n{kinds}")
    return f"{kind}:{text}"


def _kinds(root: Path) -> Iterator[str]:
    if root.is_file():
        if root.suffix in (*_HDF5, ".json"):
            yield "hdf5"
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
        yield "egodex" if first.with_suffix(".mp4").is_file() else "hdf5"
