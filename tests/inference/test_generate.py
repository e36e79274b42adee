"""Decoding with the KV cache: the same as computing everything again, choices as asked for, no new programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.config import ConfigError, TransformerConfig, VLAConfig
from rynnvla_jax.inference import generate as generate_lib
from rynnvla_jax.inference.generate import Sampling, choose, code_positions, frames_of, generate
from rynnvla_jax.models.params import split
from rynnvla_jax.models.vla import VLA

SMALL = TransformerConfig(
    vocab_size=90, width=32, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward=64, init_std=0.1
)
CODES = (4, 40)


@pytest.fixture(scope="module")
def model():
    return VLA(VLAConfig(transformer=SMALL), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def rows():
    """Two rows of unlike layout, predicted from 10 on."""
    tokens = np.random.default_rng(0).integers(0, 90, (2, 30)).astype(np.int32)
    columns = np.arange(30)
    predict = np.stack([(columns % 3 == 0) & (columns >= 10), (columns % 4 < 2) & (columns >= 13)])
    return np.where(predict, 0, tokens), predict


def test_greedy_decoding_equals_teacher_forcing(model, rows):
    tokens, predict = rows
    graphdef, params = split(model)
    state, positions = jax.random.normal(jax.random.key(1), (2, 2, 6)), jnp.array([[3, 20], [4, -1]])
    out = np.asarray(
        generate(graphdef, params, tokens, predict, 10, image_tokens=CODES, state=state, state_positions=positions)
    )
    hidden, _ = model.transformer(model.embed(out, state, positions))
    expected = np.asarray(model.transformer.logits(hidden))[..., 4:40].argmax(-1) + 4
    np.testing.assert_array_equal(out[:, 1:][predict[:, 1:]], expected[:, :-1][predict[:, 1:]])
    np.testing.assert_array_equal(out[~predict], tokens[~predict])


def test_a_row_is_continued_as_it_would_be_alone(model, rows):
    tokens, predict = rows
    graphdef, params = split(model)
    for sampling in (Sampling(), Sampling(1.0, top_k=9)):
        together = generate(graphdef, params, tokens, predict, 10, image_tokens=CODES, sampling=sampling)
        alone = generate(graphdef, params, tokens[:1], predict[:1], 10, image_tokens=CODES, sampling=sampling)
        np.testing.assert_array_equal(together[0], alone[0])


def test_samples_are_codes_and_depend_on_the_key_and_the_row(model, rows):
    tokens, predict = (np.stack([x[0]] * 2) for x in rows)
    graphdef, params = split(model)

    def sample(seed):
        key = jax.random.key(seed)
        return np.asarray(
            generate(graphdef, params, tokens, predict, 10, image_tokens=CODES, key=key, sampling=Sampling(2.0))
        )

    out = sample(0)
    assert np.all((out[predict] >= 4) & (out[predict] < 40))
    np.testing.assert_array_equal(out, sample(0))
    assert (out[0] != out[1]).any() and (out != sample(1)).any()


def test_image_codes_are_predicted_even_where_the_model_masks_them(rows):
    tokens, predict = rows
    masking = dataclasses.replace(SMALL, mask_image_logits=True, image_tokens=CODES)
    graphdef, params = split(VLA(VLAConfig(transformer=masking), rngs=nnx.Rngs(1)))
    plain, _ = split(VLA(VLAConfig(transformer=SMALL), rngs=nnx.Rngs(1)))
    np.testing.assert_array_equal(
        generate(graphdef, params, tokens, predict, 10, image_tokens=CODES),
        generate(plain, params, tokens, predict, 10, image_tokens=CODES),
    )


def test_other_tokens_need_no_other_program(model, rows):
    tokens, predict = rows
    graphdef, params = split(model)
    generate(graphdef, params, tokens, predict, 10, image_tokens=CODES)
    programs = generate_lib._advance._cache_size(), generate_lib._read_prompt._cache_size()
    other = np.roll(predict, 1, axis=1)
    generate(graphdef, params, tokens + 1, other, 10, image_tokens=CODES, progress=lambda count: None)
    assert (generate_lib._advance._cache_size(), generate_lib._read_prompt._cache_size()) == programs


def test_progress_counts_every_predicted_token(model, rows, monkeypatch):
    monkeypatch.setattr(generate_lib, "STRETCH", 7)
    tokens, predict = rows
    graphdef, params = split(model)
    counts = []
    out = generate(graphdef, params, tokens, predict, 10, image_tokens=CODES, progress=counts.append)
    assert counts[0] == 0 and len(counts) == 4 and sum(counts) == predict.sum()
    np.testing.assert_array_equal(out, generate(graphdef, params, tokens, predict, 10, image_tokens=CODES))


PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.69), {1, 3}),
        (Sampling(1.0, top_p=0.71), {1, 2, 3}),
        (Sampling(1.0, top_p=1e-6), {1}),
        (Sampling(1.0, top_k=3, top_p=0.8), {1, 3}),  # of the three, 0.82 is in the first two
        (Sampling(0.5, top_p=0.8), {1, 3}),  # squared and normalised: 0.56, 0.32, ...
        (Sampling(), {1}),
    ],
)
def test_choices_are_those_allowed(sampling, allowed):
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (4000, 1))
    drawn = np.asarray(choose(logits, sampling, jax.random.key(0)))
    assert set(drawn.tolist()) == allowed
    left = np.where(np.isin(np.arange(5), list(allowed)), PROBABILITIES ** (1 / (sampling.temperature or 1)), 0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4000, left / left.sum(), atol=0.03)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": np.nan}, {"temperature": 1.0, "top_p": 0.0}, {"top_k": 5}]
)
def test_contradictory_sampling_is_refused(wrong):
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(**wrong)


def test_frames_are_found_in_a_sequence():
    begin, end, newline = 50, 51, 52
    frame = [begin, 60, 60, 4, 5, newline, 6, 7, newline, end]
    tokens = np.array([70, *frame, 70, *frame, 0])
    codes = np.full(90, -1)
    codes[4:40] = np.arange(36)
    np.testing.assert_array_equal(frames_of(tokens, codes, begin, end, 2), [[[0, 1], [2, 3]]] * 2)
    assert np.flatnonzero(code_positions(tokens, (4, 40), begin)).tolist() == [15, 16, 18, 19]
