"""Decoding future frames with the KV cache, compared with computing the whole prefix again for every token.

    python -m benchmarks.imagine

Both decode greedily in one process with the same weights, and must give the same tokens. The baseline is one compiled
loop too: a forward pass over the row (`attend` skips later positions in blocks) and the logits of one position. The two
take turns. Prints one JSON line: smallest and median seconds, tokens/s, and the speed-up of the cache, which is
computed in each round (a busy machine slows both of a round) and given as the median over rounds.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rynnvla_jax.config import SequenceConfig, TransformerConfig, VLAConfig
from rynnvla_jax.configs.sizes import TRANSFORMERS
from rynnvla_jax.inference.generate import code_positions, generate
from rynnvla_jax.models.params import count, split
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.sequence import compose
from rynnvla_jax.vocabulary import Vocabulary

CODES, TEXT = 128, 16


def vocabulary() -> Vocabulary:
    codes = np.arange(4, 4 + CODES, dtype=np.int32)
    grids = tuple(range(140, 150))
    return Vocabulary(600, bos=0, begin_image=150, end_image=151, new_line=152, grid_tokens=grids, code_to_token=codes)


@functools.partial(jax.jit, static_argnames=("graphdef", "start"))
def recompute(graphdef, params, tokens, predict, start: int):
    """The same tokens without a cache."""
    model = nnx.merge(graphdef, params)

    def step(index, tokens):
        hidden, _ = model.transformer(model.transformer.embed_tokens(tokens))
        logits = model.transformer.logits(hidden[:, index - 1])[:, 4 : 4 + CODES]
        chosen = 4 + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens.at[:, index].set(jnp.where(predict[:, index], chosen, tokens[:, index]))

    return jax.lax.fori_loop(start, tokens.shape[1], step, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=TRANSFORMERS, default="tiny")
    parser.add_argument("--frames", type=int, default=3, help="including the given frame")
    parser.add_argument("--codes", type=int, default=8, help="VQ codes per edge of a frame")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    words = vocabulary()
    values: dict[str, Any] = TRANSFORMERS[options.size] | {"vocab_size": words.size, "image_tokens": words.image_tokens}
    model = VLA(VLAConfig(transformer=TransformerConfig(**values, init_std=0.1), state_dim=0), rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    codes = np.random.default_rng(0).integers(0, CODES, (options.frames, options.codes, options.codes))
    layout = SequenceConfig(num_frames=options.frames, use_wrist_frame=False, use_state=False)
    row = compose(np.arange(200, 200 + TEXT), {"front": codes}, words, layout).tokens
    mask = code_positions(row, words.image_tokens, words.begin_image)
    tokens, predict = (np.tile(x, (options.batch, 1)) for x in (np.where(mask, 0, row), mask))
    start = int(mask.argmax())
    implementations = {
        "cache": lambda: np.asarray(
            generate(graphdef, params, tokens, predict, start, image_tokens=words.image_tokens)
        ),
        "recompute": lambda: np.asarray(recompute(graphdef, params, tokens, predict, start)),
    }
    np.testing.assert_array_equal(implementations["cache"](), implementations["recompute"]())  # also compiles
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(options.rounds):
        for name, run in implementations.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    predicted = int(predict.sum())
    report = {
        "benchmark": "imagine",
        "device": jax.devices()[0].device_kind,
        "parameters": count(params),
        "batch": options.batch,
        "sequence": tokens.shape[1],
        "predicted_tokens": predicted,
        "rounds": options.rounds,
        "median_seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "fastest_seconds": {name: round(min(times), 4) for name, times in seconds.items()},
        "fastest_tokens_per_second": {name: round(predicted / min(times), 1) for name, times in seconds.items()},
        "median_speedup_of_the_cache": round(
            statistics.median(r / c for r, c in zip(seconds["recompute"], seconds["cache"], strict=True)), 2
        ),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
