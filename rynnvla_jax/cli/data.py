"""`rynnvla data COMMAND ...`: from raw videos and foreign data sets to a stream of training sequences."""

import importlib
import sys
from typing import cast

from data_pipelines.episode import DataError
from data_pipelines.sources import KINDS
from rynnvla_jax.config import ConfigError, TrainConfig, from_dict

COMMANDS = {
    "curate": "raw videos -> clips with hands, without faces, captioned, in ArrayRecord shards",
    "tokenize": "any data set -> VQ codes in ArrayRecord shards",
    "pack": "plan which records of a corpus make which training sequence",
    "stats": "episodes, lengths, instructions, units and statistics of states and actions",
    "validate": "every fault of a data set, with file and index",
    "show": "one HTML page with frames, captions, states and actions",
}
MODULES = {
    "curate": "data_pipelines.curate.cli",
    "tokenize": "rynnvla_jax.inference.tokenize",
    "stats": "data_pipelines.inspect.summary",
    "validate": "data_pipelines.inspect.validate.cli",
    "show": "data_pipelines.inspect.show",
}
PACK = """usage: rynnvla data pack --config FILE[:SIZE] [--config.KEY=VALUE ...]

Plans the sequences of every corpus (records:DIR) in config.data, for its sequence length, frames and tokenizer, and
keeps the plan in the corpus. `rynnvla train` does the same at its start where no plan fits; here no device is needed.
"""


def usage() -> str:
    """What `rynnvla data --help` prints."""
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    kinds = [f"  {kind + ':PATH':<13} {text}" for kind, text in KINDS.items()]
    return "\n".join(
        ["usage: rynnvla data COMMAND ...", "", *lines, "", "data sets, in commands and in config.data:", *kinds]
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = argv[0], argv[1:]
    if command == "pack":
        return pack(rest)
    if command not in MODULES:
        print(f"rynnvla data: unknown command {command!r}\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(MODULES[command]).main(rest)


def pack(argv: list[str]) -> int:
    """`rynnvla data pack`."""
    from data_pipelines import loader
    from data_pipelines.corpus import packing
    from rynnvla_jax import config_origin
    from rynnvla_jax.config_file import config_from_flags
    from rynnvla_jax.vocabulary import TextTokenizer

    if argv and argv[0] in ("-h", "--help"):
        print(PACK)
        return 0
    try:
        values = config_from_flags("rynnvla data pack", argv)[0]
        with config_origin.told(argv):
            config = from_dict(TrainConfig, values)
        if config.stage in ("action_vae", "vqgan"):
            print(f"stage {config.stage} draws no sequences: needs no plan")
            return 0
        file = config.tokenizer or (f"{config.init_from.path}/assets/tokenizer.json" if config.init_from.path else "")
        if not file:
            raise ConfigError("set config.tokenizer, or config.init_from.path to a model that brings one")
        sources = loader.open_sources(config)
        size = loader.common_size(sources, config)
        for source in sources:
            if source.corpus is None:
                print(f"{source.source}: needs no plan")
                continue
            plan = packing.prepare(source.corpus, config, TextTokenizer(file), cast(tuple[int, int], size))
            print(f"{source.source}: {plan.describe()}")
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
