"""The codec gives the codes and frames of the model itself, however many there are and over however many devices."""

import jax
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.models.frozen import without_decoder
from rynnvla_jax.models.params import fingerprint, split
from rynnvla_jax.models.vqgan import VQGAN
from tests import tiny

CONFIG = tiny.typed(tiny.config("vqgan", tiny.SO100)).vqgan_model
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: VQGAN(CONFIG, rngs=nnx.Rngs(0)))()  # compiled as one: drawn in a fraction of the time


@pytest.mark.parametrize("devices", [1, 2])
def test_codes_and_frames_are_those_of_the_model(model, devices):
    codec = FrameCodec(CONFIG, split(model)[1], batch=3, devices=jax.local_devices()[:devices])
    assert codec.batch == 2 + devices  # frames: the last batch of ten is filled up
    codes = codec.encode(FRAMES)
    assert codes.dtype == np.int32 and codes.shape == (2, 5, 2, 4)
    np.testing.assert_array_equal(codes[1], nnx.jit(VQGAN.frames_to_codes)(model, FRAMES[1]))
    frames = codec.decode(codes)
    assert frames.dtype == np.uint8 and frames.shape == FRAMES.shape
    expected = np.asarray(nnx.jit(VQGAN.codes_to_frames)(model, codes[1]))
    assert np.abs(frames[1].astype(int) - expected).max() <= 1  # other batches round otherwise


def test_a_model_brings_its_own_vqgan(model, tmp_path):
    params = split(model)[1]
    model_dir.save_model(tmp_path / "assets" / "vqgan", "vqgan", CONFIG, params)
    inside, own = FrameCodec.load(tmp_path), FrameCodec.load(tmp_path / "assets" / "vqgan")
    assert inside.fingerprint == own.fingerprint == fingerprint(params)


def test_an_encoder_alone_decodes_nothing(model):
    codec = FrameCodec(CONFIG, without_decoder(split(model)[1]))
    with pytest.raises(AttributeError, match="'VQGAN' object has no attribute 'decoder'"):
        codec.decode(np.zeros((1, 2, 4), np.int32))
