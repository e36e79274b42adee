"""Real photographs from packages: with hands, a face, both or neither. Also videos and a tiny Qwen2-VL."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate.footage import write_video
from rynnvla_jax.storage import fetch

RATE = Fraction(10)


def missing(why: str) -> None:
    """A test that cannot run is skipped on a developer's machine; in CI it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def need_people() -> None:
    """The networks, downloaded once per machine."""
    try:
        fetch.fetch("people")
    except OSError as error:
        missing(str(error))


def load(cache: Path) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by name: hand0 to hand2, face, both, cup, cat."""
    import skimage.data

    if not (cache / "package").is_dir():
        if not shutil.which("npm"):
            missing("the photographs of hands come with the npm package fingerpose: install npm")
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "fingerpose@0.1.0", "--silent"], cwd=cache, capture_output=True, text=True, check=False
        )
        if done.returncode:
            missing(f"npm cannot reach its registry: {done.stderr.strip()}")
        with tarfile.open(cache / done.stdout.split()[-1]) as archive:
            archive.extractall(cache, filter="data")
    folder = cache / "package" / "assets"
    files = {
        "hand0": "nocurl.jpg",
        "hand1": "halfcurl.jpg",
        "hand2": "fullcurl.jpg",
        "both": "fingers-lq.gif",
    }
    photographs = {name: np.asarray(Image.open(folder / file).convert("RGB")) for name, file in files.items()}
    others = {"face": skimage.data.astronaut, "cup": skimage.data.coffee, "cat": skimage.data.chelsea}
    return {**photographs, **{name: read() for name, read in others.items()}}


def video(photograph: np.ndarray, seconds: float, size: tuple[int, int] = (320, 240)) -> bytes:
    """An mp4 of a camera that moves slowly over a photograph."""

    def frames() -> Iterator[np.ndarray]:
        image = Image.fromarray(photograph)
        scale = 0.9 * min(image.width / size[0], image.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        for i in range(round(seconds * RATE)):
            left = (image.width - width) / 2 * (1 + 0.5 * np.sin(i / 9))
            top = (image.height - height) / 2
            yield np.asarray(image.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height)))

    return write_video(frames(), RATE, 23)


def tiny_qwen(folder: Path) -> Path:
    """A random Qwen2-VL of 200,000 weights with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        set_seed,
    )

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    marks += ["<|image_pad|>", "<|video_pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["pick up the red cup", "open the drawer", "user assistant"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=marks[2], pad_token=marks[0], additional_special_tokens=marks[1:]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = bpe.get_vocab()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters=rope,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    set_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return folder
