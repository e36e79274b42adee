"""Decoding future frames with a KV cache.

The layout of a sequence is known in advance (`sequence.compose`): only the image codes of future frames are predicted,
and only image codes are possible at these positions.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rynnvla_jax.config import ConfigError
from rynnvla_jax.models.transformer import Cache, masked_logits
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.progress import progress_bar

STRETCH = 64  # positions between two reports of progress


@dataclass(frozen=True)
class Sampling:
    """How a code is chosen from the logits, in this order: temperature (0: the most likely), the `top_k` most likely
    (0: all), of those the most likely whose probabilities add up to `top_p` (1: all)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:  # NaN compares false
            raise ConfigError(
                f"temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}: the first two must be at "
                "least 0, top_p above 0 and at most 1"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "top_k and top_p need sampling, but temperature 0 takes the most likely code; set a higher temperature"
            )


GREEDY = Sampling()


class TokenBar:
    """Counts tokens as `generate` reports them; a context manager. The time to compile is not counted."""

    def __init__(self, total: int):
        self._bar = progress_bar(total=total, unit="token", desc="tokens")
        self._seconds, self._since, self._tokens = 0.0, 0.0, 0

    def __enter__(self) -> "TokenBar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def __call__(self, tokens: int) -> None:
        now = time.perf_counter()
        if tokens:
            self._seconds += now - self._since
        self._since = now
        self._tokens += tokens
        self._bar.update(tokens)

    def speed(self) -> str:
        return f"{self._tokens} tokens in {self._seconds:.1f} s: {self._tokens / self._seconds:.0f} tokens/s"


class _Decoding(NamedTuple):
    tokens: Int[Array, "B S"]
    hidden: Float[Array, "B D"]  # after the last token that was read
    cache: Cache


def generate(
    graphdef: nnx.GraphDef,
    params: dict,
    tokens: Int[Array | np.ndarray, "B S"],
    predict: Bool[Array | np.ndarray, "B S"],
    start: int,
    *,
    image_tokens: tuple[int, int],
    state: Float[Array | np.ndarray, "B T N"] | None = None,
    state_positions: Int[Array | np.ndarray, "B T"] | None = None,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> Int[Array, "B S"]:
    """Fills the positions marked in `predict`; every other token is kept as given.

    Rows may differ in layout. One program is compiled per shape and `start`, for any tokens.

    Args:
      tokens: int32.
      predict: positions whose token is predicted.
      start: tokens before it are the prompt, read in one pass; `predict` is False there.
      image_tokens: [first, last) id of the image codes.
      key: needed for sampling. The samples of row i do not depend on the number of rows after it.
      progress: called with 0 after compilation and the prompt, then with the numbers of predicted tokens.
    """
    chosen = np.asarray(predict)
    key = jax.random.key(0) if key is None else key
    x, decoding = _read_prompt(graphdef, params, jnp.array(tokens), state, state_positions, start=start)
    advance = functools.partial(_advance, graphdef, params, x, jnp.asarray(chosen), key)
    begin, last = start, tokens.shape[1]
    for end in [start, *range(start + STRETCH, last, STRETCH), last] if progress else [last]:
        decoding = advance(decoding, end, image_tokens=image_tokens, sampling=sampling)
        if progress:
            jax.block_until_ready(decoding.tokens)
            progress(int(chosen[:, begin:end].sum()))
        begin = end
    return decoding.tokens


@functools.partial(jax.jit, static_argnames=("graphdef", "start"))
def _read_prompt(graphdef, params, tokens, state, state_positions, *, start: int) -> tuple[Array, _Decoding]:
    """Embeddings of all tokens as given, and the prompt in the cache."""
    model: VLA = nnx.merge(graphdef, params)
    x = model.embed(tokens, state, state_positions)
    hidden, cache = model.transformer(x[:, :start], cache=model.transformer.empty_cache(*tokens.shape))
    assert cache is not None  # as one was given
    return x, _Decoding(tokens, hidden[:, -1], cache)


@functools.partial(jax.jit, static_argnames=("graphdef", "image_tokens", "sampling"), donate_argnums=5)
def _advance(graphdef, params, x, predict, key, decoding: _Decoding, end, *, image_tokens, sampling) -> _Decoding:
    """Decodes up to position `end`. One pass a position, given tokens too: on a CPU, reading a stretch of them in one
    pass gained nothing that could be measured, and of a 384-pixel frame they are 5 %."""
    model: VLA = nnx.merge(graphdef, params)
    first, last = image_tokens
    head = model.transformer.head[...][:, first:last].astype(model.dtype)

    def step(index, decoding: _Decoding) -> _Decoding:
        here = predict[:, index]
        chosen = choose(masked_logits(decoding.hidden, head, True), sampling, jax.random.fold_in(key, index))
        token = jnp.where(here, first + chosen, decoding.tokens[:, index])
        given = jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1)  # may be a projected state
        own = model.transformer.embed_tokens(token[:, None])
        hidden, cache = model.transformer(jnp.where(here[:, None, None], own, given), cache=decoding.cache)
        assert cache is not None  # as one was given
        return _Decoding(decoding.tokens.at[:, index].set(token), hidden[:, -1], cache)

    return jax.lax.fori_loop(decoding.cache.length, end, step, decoding)


def choose(logits: Float[Array, "B V"], sampling: Sampling, key: jax.Array) -> Int[Array, " B"]:
    """One code per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        sorted_ = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(sorted_, axis=-1)
        likelier = jnp.cumsum(share, axis=-1) - share  # probability of all that come before
        least = jnp.min(jnp.where(likelier < sampling.top_p, sorted_, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def code_positions(tokens: np.ndarray, image_tokens: tuple[int, int], begin: int) -> np.ndarray:
    """bool [S]: image codes of every frame after the first `<racm3:break>` (`begin`) frame of a row [S]."""
    frames = np.cumsum(tokens == begin)
    return (tokens >= image_tokens[0]) & (tokens < image_tokens[1]) & (frames > 1)


def frames_of(tokens: np.ndarray, token_to_code: np.ndarray, begin: int, end: int, columns: int) -> np.ndarray:
    """Codes [T,h,w] of the front frames in a row [S]; `columns` codes a line."""
    starts, ends = np.flatnonzero(tokens == begin), np.flatnonzero(tokens == end)
    frames = [token_to_code[tokens[a:b]] for a, b in zip(starts, ends, strict=False)]
    return np.stack([f[f >= 0].reshape(-1, columns) for f in frames])
