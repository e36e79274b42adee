"""Captions of kept clips: from a caption file, or from a Qwen2-VL model in a local folder."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from apache_beam.io.filesystems import FileSystems

from data_pipelines.curate.clips import CandidateClip
from data_pipelines.curate.config import CurateConfig
from data_pipelines.episode import DataError


class Captioner(Protocol):
    """One caption per clip, "" where a clip has no caption."""

    def __call__(self, clips: Sequence[CandidateClip]) -> list[str]: ...


class Table:
    """A file (.csv with a header, .jsonl or .parquet) with one caption per video, which all clips of the video share.

    Column `file` is the video's path, relative to the folder that was searched.
    """

    def __init__(self, path: str, column: str):
        """Raises DataError naming the file and column."""
        readers = {
            ".csv": pyarrow.csv.read_csv,
            ".jsonl": pyarrow.json.read_json,
            ".parquet": lambda f: pyarrow.parquet.read_table(f, columns=["file", column]),
        }
        ending = "." + path.rsplit(".", 1)[-1].lower()
        if ending not in readers:
            raise DataError(f"{path} is not a caption file; give one that ends in {', '.join(readers)}")
        try:
            with FileSystems.open(path, compression_type="uncompressed") as file:
                table = readers[ending](pa.BufferReader(file.read()))  # Arrow's threads may outlive a Python file
            names, captions = table["file"], table[column]
        except (pa.ArrowException, KeyError) as error:
            raise DataError(f"{path} must have the columns 'file' and {column!r}: {error}") from None
        if not all(pa.types.is_string(c.type) or pa.types.is_large_string(c.type) for c in (names, captions)):
            raise DataError(f"{path}: 'file' and {column!r} must be text; they are {names.type} and {captions.type}")
        self.captions: dict[str, str] = {}
        for name, caption in zip(names.to_pylist(), captions.to_pylist(), strict=True):
            caption = (caption or "").strip()
            if self.captions.setdefault(name, caption) != caption:
                raise DataError(f"{path} has two captions for {name}; keep one")

    def __call__(self, clips: Sequence[CandidateClip]) -> list[str]:
        return [self.captions.get(clip.video, "") for clip in clips]


class QwenVL:
    """Qwen2-VL through transformers, on the first CUDA device if there is one. Greedy decoding: repeatable captions."""

    def __init__(self, folder: str | Path, config: CurateConfig):
        """Raises DataError when the folder does not hold the model."""
        # Here, because it takes seconds and a caption table does without.
        from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil
        from transformers.utils import import_utils

        self._config, self._lock = config, threading.Lock()
        try:
            # Any: transformers annotates `generate` in a way that only its own type checker follows.
            self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="auto")
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
            # Not AutoProcessor: for Qwen2-VL that needs torchvision.
            self._images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} cannot be read as a Qwen2-VL model: {error}") from None
        self._model.eval().to("cuda" if import_utils.is_torch_cuda_available() else "cpu")
        content = [{"type": "image"}] * config.samples + [{"type": "text", "text": config.caption_prompt}]
        message: dict[str, Any] = {"role": "user", "content": content}
        self._prompt = str(  # what it is without tokens
            self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        )

    def __call__(self, clips: Sequence[CandidateClip]) -> list[str]:
        frames: list[np.ndarray] = []
        for clip in clips:
            assert clip.frames is not None  # captions are asked for after the frames were judged
            frames += list(clip.frames)
        images = self._images(images=frames, return_tensors="pt")
        sizes = images["image_grid_thw"].prod(-1) // self._images.merge_size**2
        pad, marker = self._tokenizer.convert_tokens_to_ids("<|image_pad|>"), "<|image_pad|>"
        prompts = []
        for counts in sizes.reshape(len(clips), -1).tolist():
            first, *rest = self._prompt.split(marker)
            prompts.append(first + "".join(marker * n + part for n, part in zip(counts, rest, strict=True)))
        inputs = self._tokenizer(prompts, padding=True, return_tensors="pt")
        ids = inputs["input_ids"]
        inputs = {
            "input_ids": ids,
            "attention_mask": inputs["attention_mask"],
            "mm_token_type_ids": (ids == pad).int(),
            "pixel_values": images["pixel_values"].to(self._model.dtype),
            "image_grid_thw": images["image_grid_thw"],
        }
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        with self._lock:  # one model per worker process, whatever its number of threads
            out = self._model.generate(**inputs, max_new_tokens=self._config.caption_tokens, do_sample=False)
        texts = self._tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
