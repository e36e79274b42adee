"""Decoding future frames with a KV cache.

The layout of a sequence is known ahead (`sequence.compose`): only the image codes of future frames are
predicted, and image codes are the only tokens that may stand there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.models.vla import VLA


@functools.partial(jax.jit, static_argnames=("graphdef", "start", "image_tokens", "top_k", "temperature"))
def generate(
    graphdef: nnx.GraphDef,
    params: dict,
    tokens: Int[Array, "B S"],
    predict: Bool[Array, " S"],
    start: int,
    *,
    image_tokens: tuple[int, int],
    state: Float[Array, "B T N"] | None = None,
    state_positions: Int[Array, "B T"] | None = None,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
) -> Int[Array, "B S"]:
    """Fills the positions marked in `predict`; every other token is kept as given.

    Args:
      tokens: rows of one layout, int32.
      predict: positions whose token is predicted.
      start: tokens before it are the prompt, read in one pass; `predict` is False there.
      image_tokens: [first, last) id of the image codes.
      temperature: 0 is greedy; above it `key` is needed, and `top_k` (0: all) limits the choice.
    """
    model: VLA = nnx.merge(graphdef, params)
    first, last = image_tokens
    rows = jnp.arange(model.config.transformer.padded_vocab)
    is_code = (rows >= first) & (rows < last)
    x = model.embed(tokens, state, state_positions)
    cache = model.transformer.empty_cache(*tokens.shape)
    hidden, cache = model.transformer(x[:, :start], cache=cache)

    def choose(hidden, index):
        logits = jnp.where(is_code, model.transformer.logits(hidden), -jnp.inf)
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if top_k:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
        return jax.random.categorical(jax.random.fold_in(key, index), logits / temperature).astype(jnp.int32)

    def step(carry, index):
        hidden, cache = carry
        token = jnp.where(predict[index], choose(hidden, index), tokens[:, index])
        predicted = model.transformer.embed_tokens(token[:, None])
        given = jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1)  # may carry a projected state
        hidden, cache = model.transformer(jnp.where(predict[index], predicted, given), cache=cache)
        return (hidden[:, -1], cache), token

    _, decoded = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(start, tokens.shape[1]))
    return jnp.concatenate([tokens[:, :start], decoded.T], axis=1)


def code_positions(tokens: np.ndarray, image_tokens: tuple[int, int], begin: int) -> np.ndarray:
    """bool [S]: image codes of every frame after the first `<racm3:break>` (`begin`) frame of a row [S]."""
    frames = np.cumsum(tokens == begin)
    return (tokens >= image_tokens[0]) & (tokens < image_tokens[1]) & (frames > 1)


def frames_of(tokens: np.ndarray, token_to_code: np.ndarray, begin: int, end: int, columns: int) -> np.ndarray:
    """Codes [T,h,w] of the front frames in a row [S]; `columns` codes a line."""
    starts, ends = np.flatnonzero(tokens == begin), np.flatnonzero(tokens == end)
    frames = [token_to_code[tokens[a:b]] for a, b in zip(starts, ends, strict=False)]
    return np.stack([f[f >= 0].reshape(-1, columns) for f in frames])
