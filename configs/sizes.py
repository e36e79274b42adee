"""Model sizes: tiny (CPU, demo and tests), 1b, 7b (Chameleon-7B), 34b (Chameleon-34B)."""

import dataclasses

from ml_collections import ConfigDict

from rynnvla_jax.config import DERIVED, TrainConfig, without
from rynnvla_jax.config_origin import recorded

TRANSFORMERS = {
    "tiny": {
        "vocab_size": 0,  # the tokenizer's
        "width": 192,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "feed_forward": 512,
    },
    "1b": {"width": 2048, "num_layers": 20, "num_heads": 16, "num_kv_heads": 16, "feed_forward": 5504},
    "7b": {"width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "feed_forward": 11008},
    "34b": {
        "width": 8192,
        "num_layers": 48,
        "num_heads": 64,
        "num_kv_heads": 8,
        "feed_forward": 22016,
        "q_norm_rows": 4,
        "k_norm_rows": 4,
        "swin_norm": True,
    },
}


def base(stage: str, size: str) -> ConfigDict:
    """Every key of `TrainConfig` at its default, with the transformer of `size`, but without keys derived from others.

    Raises:
      ValueError: unknown size.
    """
    if size not in TRANSFORMERS:
        raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(TRANSFORMERS)}")
    config = recorded(without(DERIVED, dataclasses.asdict(TrainConfig(stage=stage))))
    config.vla.transformer.update(TRANSFORMERS[size])
    if size == "tiny":
        config.update(compute_dtype="float32", remat="projections", log_every=5)
        config.checkpoint.every_steps = 50
        config.data.image.shortest_edge = 128
    return config
