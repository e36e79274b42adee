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
from rynnvla_jax.errors import brief, listing, shorten
from rynnvla_jax.storage.files import read_json


class Captioner(Protocol):
    """One caption per clip, "" where a clip has no caption."""

    def __call__(self, clips: Sequence[CandidateClip]) -> list[str]: ...


class Table:
    """A file (.csv with a header, .jsonl or .parquet) with one caption per video, which all clips of the video share.

    Column `file` is the video's path, relative to the folder that was searched.
    """

    def __init__(self, path: str, column: str):
        """Raises DataError naming the file and column."""
        texts = pyarrow.csv.ConvertOptions(column_types={"file": pa.string(), column: pa.string()})  # numbers, too
        readers = {
            ".csv": lambda f: pyarrow.csv.read_csv(f, convert_options=texts),
            ".jsonl": pyarrow.json.read_json,
            ".parquet": lambda f: _two_columns(pyarrow.parquet.ParquetFile(f), column),
        }
        ending = "." + path.rsplit(".", 1)[-1].lower()
        if ending not in readers:
            raise DataError(f"{path} is not a caption file; give one that ends in {', '.join(readers)}")
        try:
            with FileSystems.open(path, compression_type="uncompressed") as file:
                table = readers[ending](pa.BufferReader(file.read()))  # Arrow's threads may outlive a Python file
        except pa.ArrowException as error:
            form = {".csv": "a header and commas, in UTF-8", ".jsonl": "one JSON object a line"}.get(ending, "Parquet")
            raise DataError(f"{path} cannot be read ({shorten(error)}); write it again, as {form}") from None
        for name, option in (("file", ""), (column, "--caption-column")):
            if name not in table.column_names:
                rename = (
                    f"set {option} to the one with captions" if option else "name the one with the videos' paths so"
                )
                columns = listing(table.column_names, 10)
                raise DataError(f"{path} has no column {name!r}, but {columns or 'no columns'}; {rename}")
        names, captions = table["file"], table[column]
        for name, part in (("file", names), (column, captions)):
            kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
            if not any(is_kind(part.type) for is_kind in kinds):
                raise DataError(f"{path}: column {name!r} is {part.type}; write it as texts")
        self.captions: dict[str, str] = {}
        for name, caption in zip(names.to_pylist(), captions.to_pylist(), strict=True):
            caption = (caption or "").strip()
            if self.captions.setdefault(name, caption) != caption:
                raise DataError(f"{path} has two captions for {name}; keep one")

    def __call__(self, clips: Sequence[CandidateClip]) -> list[str]:
        return [self.captions.get(clip.video, "") for clip in clips]


def _two_columns(file: pyarrow.parquet.ParquetFile, column: str) -> pa.Table:
    """A table may have others, and large ones; where it lacks one of the two, no rows."""
    wanted = ["file", column]
    return file.read(wanted) if {*wanted} <= {*file.schema_arrow.names} else file.schema_arrow.empty_table()


def check_model(folder: Path) -> None:
    """Raises DataError unless a folder looks like a Qwen2-VL model. Workers would say so late, and each of them."""
    remedy = "set --caption-model to a folder with a whole Qwen2-VL model"
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except FileNotFoundError:
        raise DataError(f"{folder} holds no config.json; {remedy}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}/config.json cannot be used ({shorten(error)}); copy it again") from None
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        raise DataError(f"{folder} holds a model of the kind {brief(kind)}; {remedy}")
    for patterns in (("*.safetensors", "*.bin"), ("tokenizer.json", "vocab.json"), ("preprocessor_config.json",)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise DataError(f"{folder} holds no {' or '.join(patterns)}; copy it again, or {remedy}")


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
            reason = f"cannot be read as a Qwen2-VL model ({shorten(error)})"
            raise DataError(f"{folder} {reason}; copy it again, or set --caption-model to another") from None
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
