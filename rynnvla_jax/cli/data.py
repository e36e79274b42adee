"""`rynnvla data COMMAND ...`: from raw videos and foreign data sets to a stream of training sequences."""

from dataclasses import dataclass
from typing import cast

from data_pipelines.sources import KINDS
from rynnvla_jax.cli.arguments import ConfigName, parse_with_overrides
from rynnvla_jax.cli.main import Command, dispatch
from rynnvla_jax.config import ConfigError

_INSPECT = "rynnvla_jax.cli.data_inspect"
COMMANDS = {
    "curate": Command(
        "cut raw videos into captioned clips with hands and without faces, in ArrayRecord shards",
        "rynnvla_jax.cli.data_curate",
        "curate",
    ),
    "tokenize": Command("encode any data set as VQ codes, in ArrayRecord shards", "rynnvla_jax.cli.data_tokenize"),
    "tokenizer": Command(
        "make a tokenizer.json for runs without public weights", "rynnvla_jax.cli.data_tokenizer", "data"
    ),
    "pack": Command("plan which records of a corpus make which training sequence", __name__, function="pack"),
    "inspect": Command(
        "print what a folder is, what its columns mean, and the commands that train on it",
        "rynnvla_jax.cli.data_commands",
    ),
    "stats": Command(
        "print episodes, lengths, instructions, units and statistics of states and actions", _INSPECT, "data", "stats"
    ),
    "validate": Command("find every fault of a data set, with file and index", _INSPECT, "data", "validate"),
    "show": Command("write one HTML page with frames, captions, states and actions", _INSPECT, "data", "show"),
}


@dataclass(frozen=True)
class Pack:
    """Plans the training sequences of every corpus (records:DIR) in config.data, and stores the plan in the corpus.

    The plan is for the config's sequence length, frames and tokenizer. `rynnvla train` makes it at its start when none
    fits; this command needs no accelerator. For one clip per sequence and for several it prints the length with the
    least padding. Where sequence.clips asks for several and no two fit, it says so and plans nothing.
    """

    config: ConfigName
    """Config file of the run that will read the corpus."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    kinds = "\n".join(f"  {kind + ':PATH':<13} {text}" for kind, text in KINDS.items())
    return dispatch("rynnvla data", COMMANDS, argv, f"Data sets, in commands and in config.data:\n{kinds}")


def pack(argv: list[str]) -> int:
    """`rynnvla data pack`. Returns the exit status."""
    arguments, overrides = parse_with_overrides(Pack, "rynnvla data pack", argv)
    from data_pipelines import checks
    from data_pipelines.corpus import packing
    from data_pipelines.sources import open_sources
    from rynnvla_jax import config_file
    from rynnvla_jax.convert import starting_point
    from rynnvla_jax.stage import STAGES
    from rynnvla_jax.vocabulary import TextTokenizer

    config = config_file.load(arguments.config, overrides).build()
    if not STAGES[config.stage].tokens:
        print(f"stage {config.stage} trains on no token sequences: needs no plan")
        return 0
    start = config.init_from
    if config.tokenizer:
        file = starting_point.file(config.tokenizer)
    elif start.path:
        file = starting_point.model_dir(start.path, start.step, start.weights) / "assets" / "tokenizer.json"
    else:
        raise ConfigError("set config.tokenizer, or config.init_from.path to a model directory that contains one")
    sources = open_sources(config)
    size = checks.common_size(sources, config)
    for source in sources:
        if source.corpus is None:
            print(f"{source.source}: needs no plan")
            continue
        plan = packing.prepare(source.corpus, config, TextTokenizer(file), cast(tuple[int, int], size))
        print(f"{source.source}: {plan.describe()}")
        for proposal in plan.proposals:
            print(f"  possible   {proposal}")
    return 0
