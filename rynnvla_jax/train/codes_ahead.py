"""VQ codes of every frame, computed before the first step and stored in `workdir/codes`, so that steps are faster."""

from pathlib import Path

import jax

from data_pipelines.checks import tokenized_corpus
from data_pipelines.corpus.codes import CodeStore, encode_all
from data_pipelines.episode import Episodes
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.distributed import multihost
from rynnvla_jax.inference.codec import FrameCodec

BATCH = 32  # frames


def encode_ahead(config: DataConfig, vqgan: Path, sources: list[Episodes], workdir: Path) -> list[CodeStore | None]:
    """The codes of each source by the VQGAN of a model directory; a restart continues or reuses them.

    The episodes are divided among the processes; each uses all its devices, and checks the sums of those codes that
    exist. A tokenized corpus already has codes, and gets None.

    Raises:
      DataError: codes that exist are damaged.
      ConfigError: a corpus was tokenized by another VQGAN.
    """
    codec = FrameCodec.load(vqgan, batch=BATCH, devices=jax.local_devices())
    layouts = list(map(tokenized_corpus, sources))
    for source, layout in zip(sources, layouts, strict=True):
        if layout and layout.vqgan != codec.fingerprint:
            raise ConfigError(
                f"{source.source} was tokenized by a different VQGAN (weights {layout.vqgan[:12]}) than this run's "
                f"({codec.fingerprint[:12]}); set config.vqgan to that one, or tokenize again"
            )
    return [
        None if layout else _encode_source(source, codec, config, workdir / "codes" / str(number))
        for number, (source, layout) in enumerate(zip(sources, layouts, strict=True))
    ]


def _encode_source(source: Episodes, codec: FrameCodec, config: DataConfig, directory: Path) -> CodeStore:
    """The code store of one source, which the processes fill together."""

    def encode(share: tuple[int, int]) -> None:
        encode_all(
            source,
            codec.encode,
            config,
            directory,
            codec.fingerprint,
            batch=codec.batch,
            progress=multihost.primary(),
            share=share,
        )

    multihost.first(lambda: encode((len(source), 1)))  # the store itself, no episode
    multihost.together(lambda: encode((jax.process_index(), jax.process_count())))
    store = CodeStore(directory, source.source, config, codec.fingerprint)
    if not store.summed:
        multihost.say(
            f"{directory} was begun by an older version, without SHA-256 sums: damage of its codes may not be found; "
            "delete the folder and start again to make them anew"
        )
    return store
