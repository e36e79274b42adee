"""Pictures with damaged bytes or of too many pixels: one line, and nothing is decoded before the size is known."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rynnvla_jax.cli.imagine import _state
from rynnvla_jax.config import ConfigError
from rynnvla_jax.images import MAX_PIXELS, check_header, read_image
from tests.hostile import attempt, damaged, examples, json_files

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def picture(kind, size=(24, 32)):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(out, kind, **({"exif": image.getexif()} if kind == "JPEG" else {}))
    return out.getvalue()


def png(height, width, data=b""):
    """A PNG that states this size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data or zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_of_a_picture(kind, tmp_path):
    sound = picture(kind)
    file = tmp_path / "picture"
    file.write_bytes(sound)
    assert read_image(file).shape == (24, 32, 3)

    @examples(15)
    @given(st.one_of(damaged(sound), damaged(sound, 100)))
    def try_it(content):
        file.write_bytes(content)
        attempt(read_image, file)
        attempt(check_header, content, "it")

    try_it()


@pytest.mark.parametrize("edge", [50_000, 13_000, 2**31 - 1])
def test_too_many_pixels_are_refused_by_the_header(edge, tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(edge, edge))  # of which only the beginning is there: decoding it would say so
    for read in (lambda: read_image(file), lambda: check_header(file.read_bytes(), str(file))):
        with pytest.raises(ConfigError, match=rf"bomb.png has .* ?{MAX_PIXELS:,} pixels.*scale it"):
            read()


def test_the_largest_picture_is_read(tmp_path):
    file = tmp_path / "large.png"
    file.write_bytes(png(4096, 8192, zlib.compress(bytes((8192 // 8 + 1) * 4096))))
    assert read_image(file).shape == (4096, 8192, 3)


def test_states_of_imagine(tmp_path):
    np.save(tmp_path / "sound.npy", np.zeros((2, 6)))
    file = tmp_path / "state.npy"
    assert _state(str(tmp_path / "sound.npy"), 6, 2).shape == (2, 6)

    @examples(20)
    @given(damaged((tmp_path / "sound.npy").read_bytes()))
    def arrays(content):
        file.write_bytes(content)
        attempt(_state, str(file), 6, 2)

    @examples(20)
    @given(json_files([[0.0] * 6, [1.0] * 6]))
    def lists(content):
        (tmp_path / "state.json").write_bytes(content)
        attempt(_state, str(tmp_path / "state.json"), 6, 2)

    arrays()
    lists()
