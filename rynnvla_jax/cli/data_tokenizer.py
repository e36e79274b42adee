"""`rynnvla data tokenizer`: a tokenizer.json for runs without public weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET
from rynnvla_jax.cli.data_source import parse_with_data
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import ConfigError, VQGANConfig

PROGRAM = "rynnvla data tokenizer"


@dataclass(frozen=True)
class Tokenizer:
    """Learns a small tokenizer.json from the instructions of data sets, for training without public weights.

    It has Chameleon's structure: image codes, the tokens around frames, and a byte-level BPE that can write any text.
    Every later stage and robot needs the same file; a model directory contains it. With the public weights use their
    text_tokenizer.json instead, because the weights know only its ids.

      rynnvla data tokenizer egodex:EGODEX lerobot:DATA --vqgan runs/vqgan --out tokenizer.json
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Data sets as KIND:PATH, or only PATH when its files show the kind."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json"), OR_BUCKET]
    """The tokenizer.json to write; it must not exist."""
    vqgan: Annotated[Path | None, tyro.conf.arg(metavar="MODEL_DIR"), OR_BUCKET] = None
    """Model directory of the VQGAN that the runs use, for the number of codes; without it as many as the public one."""
    merges: Annotated[int, tyro.conf.arg(metavar="N")] = 4000
    """At most this many tokens of several letters."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    arguments, data = parse_with_data(Tokenizer, PROGRAM, argv)
    if not arguments.sources:
        raise UsageError("name at least one data set")
    if arguments.merges < 0:
        raise UsageError("--merges must be at least 0")
    from data_pipelines.corpus import records
    from data_pipelines.episode import DataError
    from data_pipelines.sources import open_source
    from data_pipelines.sources.recognize import source_of
    from rynnvla_jax.storage import files
    from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer

    files.check(arguments.out, write=True)
    if files.exists(arguments.out):
        raise ConfigError(
            f"{arguments.out} exists, and models that were trained with it need it; give another --out, or remove it"
        )
    codes = VQGANConfig().num_codes
    if arguments.vqgan:
        from rynnvla_jax.checkpoint import model_dir

        inside = files.place(arguments.vqgan) / "assets" / "vqgan"
        codes = model_dir.read_model_config(inside if inside.is_dir() else arguments.vqgan, "vqgan").num_codes
    texts: set[str] = set()
    for text in arguments.sources:
        source = open_source(source_of(text), data, ())
        texts.update(source.texts)
        if source.corpus is not None:
            lengths = records.read_corpus(source.corpus)[0]["shard_lengths"]
            for table in records.read_manifest(source.corpus, lengths, ["captions"]):
                texts.update(caption for captions in table["captions"].to_pylist() for caption in captions)
    texts = {text for text in texts if text.strip()}
    if not texts:
        raise DataError(f"{', '.join(arguments.sources)}: no instructions to learn from; name data sets that have some")
    files.write_text(arguments.out, train_tokenizer(sorted(texts), codes, arguments.merges))
    tokenizer = TextTokenizer(arguments.out)
    longest = max(len(tokenizer.encode(text)) for text in texts)
    print(
        f"{arguments.out}: {tokenizer.vocabulary.base_size} tokens, {codes} of them image codes; {len(texts)} "
        f"instructions have at most {longest} tokens\nto train with it: --config.tokenizer={arguments.out}"
    )
    return 0
