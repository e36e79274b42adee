"""Frame sizes and pixels against the public code; crop and pad reach multiples of 32."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from rynnvla_jax.config import ImageConfig
from rynnvla_jax.images import frame_size, normalize, preprocess
from tests import GOLDEN


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_reference_modes_give_the_public_pixels(image, mode):
    tensors = load_file(GOLDEN / "preprocess.safetensors")
    config = ImageConfig(shortest_edge=32, fit=f"reference_{mode}")
    frame, expected = tensors[f"img{image}"], tensors[f"{mode}{image}"].transpose(1, 2, 0)
    out = preprocess(frame, config)
    assert out.shape[:2] == frame_size(*frame.shape[:2], config) == expected.shape[:2]
    np.testing.assert_allclose(normalize(out), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(480, 640), (480, 848), (640, 480), (1080, 1920), (240, 240), (50, 300)])
def test_crop_and_pad_reach_multiples_of_32(size):
    frame = np.full((*size, 3), 255, np.uint8)
    long = 64 * max(size) / min(size)
    for fit in ("crop", "pad"):
        config = ImageConfig(shortest_edge=64, fit=fit)
        out = preprocess(frame, config)
        assert out.shape[:2] == frame_size(*size, config)
        assert min(out.shape[:2]) == 64 and all(edge % 32 == 0 for edge in out.shape[:2])
        assert abs(max(out.shape[:2]) - long) <= 32
        assert (out.shape[0] > out.shape[1]) == (size[0] > size[1]) or out.shape[0] == out.shape[1]
        black = (out == 0).all(-1)
        assert black.any() == (fit == "pad" and max(out.shape[:2]) > round(long))
        if black.any():  # as much on one side as on the other
            lines = black.all(0) if out.shape[1] > out.shape[0] else black.all(1)
            assert abs(int(lines.argmin()) - int(lines[::-1].argmin())) <= 1


def test_crop_takes_the_centre():
    frame = np.zeros((32, 70, 3), np.uint8)
    frame[:, 3:67] = 200
    out = preprocess(frame, ImageConfig(shortest_edge=32, fit="crop"))
    assert out.shape == (32, 64, 3) and (out == 200).all()


def test_normalize_spans_minus_one_to_one():
    np.testing.assert_allclose(normalize(np.array([0, 255], np.uint8)), [-1, 1])


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        preprocess(np.zeros((4, 4, 3), np.float32), ImageConfig())
