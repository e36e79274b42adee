"""Every special id, the text tokenizer, and VQ code <-> token id. Ids are read from names, never assumed.

Source: Chameleon's `text_tokenizer.json` and RynnVLA-001 (arXiv 2509.15212), which appends four rows.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.config import EXTRA_VIEWS, ConfigError
from rynnvla_jax.errors import shorten
from rynnvla_jax.metadata import Between
from rynnvla_jax.storage import files

BOS = "<s>"
BEGIN_IMAGE = "<racm3:break>"
END_IMAGE = "<eoss>"
NEW_LINE = "<reserved08799>"
_GRID_BASE = 8800
_VIEW_BASE = 9000  # above all sizes of frames; unused by the public models
_IMAGE_NAME = re.compile(r"IMGIMG([A-J]+)Z")
_Id = Annotated[int, Between(0, 2**24)]  # tables have an entry for each
_GRID_NAME = re.compile(r"<reserved(\d{5})>")


@dataclass(frozen=True)
class _Model:
    vocab: dict[str, _Id]


@dataclass(frozen=True)
class _AddedToken:
    id: _Id
    content: str


@dataclass(frozen=True)
class _File:
    """What is read of tokenizer.json beside what the library reads."""

    model: _Model
    added_tokens: list[_AddedToken] = field(default_factory=list)


KINDS = ("text", "image", "delimiter")  # of tokens


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of one tokenizer plus the four rows that RynnVLA appends.

    `grid_tokens[n - 1]` is the token of n blocks of 32 pixels, -1 where the tokenizer lacks it. `view_tokens` are the
    (start, end) of extra views, from reserved tokens that the public models never use; () where the tokenizer has none.
    `code_to_token` is int32 [number of VQ codes].
    """

    base_size: int  # rows of tokenizer.json
    bos: int
    begin_image: int
    end_image: int
    new_line: int
    grid_tokens: tuple[int, ...]
    code_to_token: np.ndarray
    view_tokens: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.base_size + 4

    @property
    def action(self) -> int:
        return self.base_size

    @property
    def wrist_start(self) -> int:
        return self.base_size + 1

    @property
    def wrist_end(self) -> int:
        return self.base_size + 2

    @property
    def state(self) -> int:
        return self.base_size + 3

    @property
    def num_codes(self) -> int:
        return len(self.code_to_token)

    @property
    def image_tokens(self) -> tuple[int, int]:
        """[first, last + 1) id of the image codes."""
        return int(self.code_to_token.min()), int(self.code_to_token.max()) + 1

    def grid_token(self, n: int) -> int:
        """Id of a frame edge of `n` blocks of 32 pixels. Raises ConfigError if the tokenizer has none."""
        if not 1 <= n <= len(self.grid_tokens) or self.grid_tokens[n - 1] < 0:
            raise ConfigError(
                f"tokenizer has no <reserved{_GRID_BASE + n:05d}> for an edge of {32 * n} pixels; "
                f"use smaller frames (data.image.shortest_edge) or a tokenizer that has it"
            )
        return self.grid_tokens[n - 1]

    def delimiters(self, view: str, extra_views: Sequence[str]) -> tuple[int, int]:
        """(start, end) of a frame of `view`: "front", "wrist" or one of `extra_views`. Raises ConfigError."""
        if view == "front":
            return self.begin_image, self.end_image
        if view == "wrist":
            return self.wrist_start, self.wrist_end
        index = extra_views.index(view)
        if index >= len(self.view_tokens):
            name = _view_names(index)[0]
            raise ConfigError(
                f"tokenizer has no {name}, which begins a frame of {view!r}; leave it out of data.extra_views, or "
                "use Chameleon's tokenizer, or one that `rynnvla data tokenizer` makes"
            )
        return self.view_tokens[index]

    def kinds(self) -> np.ndarray:
        """int32 [size]: the index of each token's kind in KINDS; what stands around codes, state and action too, is a
        delimiter."""
        table = np.zeros(self.size, np.int32)
        table[self.code_to_token] = KINDS.index("image")
        around = [self.begin_image, self.end_image, self.new_line, *self.grid_tokens, *sum(self.view_tokens, ())]
        around += [self.action, self.wrist_start, self.wrist_end, self.state]
        table[[token for token in around if token >= 0]] = KINDS.index("delimiter")
        return table

    def token_to_code(self) -> np.ndarray:
        """int32 [size]: the VQ code of a token id, -1 for ids that are not a code."""
        table = np.full(self.size, -1, np.int32)
        table[self.code_to_token] = np.arange(self.num_codes, dtype=np.int32)
        return table

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int], base_size: int, origin: str = "vocabulary") -> "Vocabulary":
        """Reads ids from names. Raises ConfigError (names `origin`) when a special name or a VQ code is missing."""
        missing = [n for n in (BOS, BEGIN_IMAGE, END_IMAGE, NEW_LINE) if n not in vocab]
        if missing:
            raise ConfigError(f"{origin} lacks {', '.join(missing)}; it is not a Chameleon tokenizer")
        codes: dict[int, int] = {}
        grids: dict[int, int] = {}
        for name, token in vocab.items():
            if (match := _IMAGE_NAME.fullmatch(name)) and len(match[1]) < 10:  # a letter A..J per decimal digit
                codes[int("".join(str(ord(c) - ord("A")) for c in match[1]))] = token
            elif (match := _GRID_NAME.fullmatch(name)) and _GRID_BASE < int(match[1]) <= _VIEW_BASE:
                grids[int(match[1]) - _GRID_BASE] = token
        # Codes index a table, so a missing one would shift the meaning of all after it.
        gap = next((c for c in range(len(codes)) if c not in codes), None)
        if not codes or gap is not None:
            raise ConfigError(f"{origin} lacks image code {gap or 0} ({image_name(gap or 0)}); codes must be 0..n-1")
        # Up to the first that is missing: a view is known by its place.
        pairs = takewhile(lambda names: set(names) <= vocab.keys(), map(_view_names, range(EXTRA_VIEWS)))
        if max(vocab.values()) >= base_size:
            raise ConfigError(f"{origin} has id {max(vocab.values())} but only {base_size} rows; fix its vocabulary")
        return cls(
            base_size=base_size,
            bos=vocab[BOS],
            begin_image=vocab[BEGIN_IMAGE],
            end_image=vocab[END_IMAGE],
            new_line=vocab[NEW_LINE],
            grid_tokens=tuple(grids.get(n, -1) for n in range(1, max(grids, default=0) + 1)),
            code_to_token=np.array([codes[c] for c in range(len(codes))], np.int32),
            view_tokens=tuple((vocab[start], vocab[end]) for start, end in pairs),
        )

    @classmethod
    def from_tokenizer(cls, path: str | Path) -> "Vocabulary":
        """Reads `tokenizer.json`. Raises ConfigError naming the file when it cannot be used."""
        try:
            content = metadata.parse(_File, _read_json(path), f"tokenizer {path}")
        except metadata.MetadataError as error:
            raise ConfigError(
                f"{error}, so it is not a BPE tokenizer.json; pass Chameleon's text_tokenizer.json"
            ) from None
        vocab = dict(content.model.vocab)
        # Special tokens may be listed in one of the two parts only.
        vocab.update({token.content: token.id for token in content.added_tokens})
        return cls.from_vocab(vocab, max(vocab.values(), default=-1) + 1, str(path))


class TextTokenizer:
    """Text -> ids that begin with `<s>` and have no end token."""

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer

        self.path = str(path)
        self.vocabulary = Vocabulary.from_tokenizer(path)
        with self._usable():
            self._tokenizer = Tokenizer.from_buffer(files.place(path).read_bytes())
        vocabulary = self.vocabulary
        # A text that spells one of these would be read by the model as the beginning of a frame or as pixels.
        self._forbidden = {vocabulary.bos, vocabulary.begin_image, vocabulary.end_image, vocabulary.new_line}
        self._forbidden.update(vocabulary.code_to_token.tolist())

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Raises ConfigError for what the library raises: bare Exceptions, and panics, which are no Exceptions."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(f"tokenizer {self.path} cannot be used ({shorten(error)}); copy it again") from None

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]. Raises ConfigError for an empty text or one that spells special tokens."""
        if not text.strip():
            raise ConfigError("instruction is empty; describe the task in words")
        with self._usable():
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        bad = next((i for i in ids if i in self._forbidden), None)
        if bad is not None:
            raise ConfigError(
                f"instruction {text!r} contains the special token {self._tokenizer.id_to_token(bad)!r}; remove it"
            )
        return np.array([self.vocabulary.bos, *ids], np.int32)


def image_name(code: int) -> str:
    """Name of a VQ code in the tokenizer: code 17 is `IMGIMGBHZ`."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _view_names(index: int) -> tuple[str, str]:
    """Names of the tokens around a frame of the extra view of this index."""
    return f"<reserved{_VIEW_BASE + 2 * index + 1:05d}>", f"<reserved{_VIEW_BASE + 2 * index + 2:05d}>"


def train_tokenizer(corpus: Iterable[str], num_codes: int, num_text: int = 300, max_edge: int = 2048) -> str:
    """A small byte-level BPE with Chameleon's structure, as `tokenizer.json` text.

    Holds `num_codes` image codes, at most `num_text` merges learnt from `corpus`, and only those reserved
    names that frames up to `max_edge` pixels and extra views use, so that tiny models keep tiny embeddings.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + num_text, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    content = json.loads(tokenizer.to_str())
    learnt = content["model"]["vocab"]
    # The special names come first, so that the ids of image codes are contiguous whatever the corpus gave.
    special = [BOS, "<pad>", "</s>", "<unk>", *map(image_name, range(num_codes)), END_IMAGE, BEGIN_IMAGE, NEW_LINE]
    special += [f"<reserved{_GRID_BASE + n:05d}>" for n in range(1, max_edge // 32 + 1)]
    special += [name for index in range(EXTRA_VIEWS) for name in _view_names(index)]
    content["model"]["vocab"] = {name: i for i, name in enumerate(special + sorted(learnt, key=learnt.get))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": i, "content": name, **flags} for i, name in enumerate(special)]
    return json.dumps(content)


def _read_json(path: str | Path) -> dict:
    try:
        return files.read_json(files.place(path))
    except FileNotFoundError:
        raise ConfigError(f"tokenizer {path} does not exist; set config.tokenizer to a tokenizer.json") from None
    except files.DamagedFileError as error:
        raise ConfigError(f"tokenizer {error}; copy it again") from None
    except OSError as error:
        raise ConfigError(f"tokenizer {path} cannot be read ({error.strerror}); copy it again") from None
