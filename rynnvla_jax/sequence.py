"""Text, frames, state and action -> tokens and loss mask.

Source: arXiv 2509.15212, section 3; the layout agrees token by token with the public code. Departure on
purpose: frames whose size is not a multiple of 32 are an error instead of being cut differently in training
and inference.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rynnvla_jax.config import ConfigError, SequenceConfig
from rynnvla_jax.images import BLOCK
from rynnvla_jax.vocabulary import Vocabulary

PAD = 0
PATCH = 16  # edge of one VQ code in pixels
NOT_TRAINED = -100


@dataclass(frozen=True, eq=False)
class Sequence:
    """One training sequence: `tokens` int32 [S], `loss_mask` bool [S] (True: this token is a target).

    `state_positions`, `action_positions` int32 [T] are the indices of the state and <action> tokens in `tokens`,
    -1 where absent or truncated. The action embedding is read one position before <action>.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    state_positions: np.ndarray
    action_positions: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 [S], -100 where not trained."""
        return np.where(self.loss_mask, self.tokens, NOT_TRAINED).astype(np.int32)


def frame_length(height: int, width: int) -> int:
    """Tokens of one frame of `height` x `width` pixels. Raises ConfigError unless both are multiples of 32."""
    _check_size(height, width)
    # The start and two numbers of the size, the rows of codes with a line end each, the end.
    return 3 + (height // PATCH) * (width // PATCH + 1) + 1


def frame_tokens(codes: np.ndarray, vocabulary: Vocabulary, delimiters: tuple[int, int]) -> np.ndarray:
    """VQ codes [H/16, W/16] of one frame -> int32 [n] tokens with size, line ends and delimiters (start, end).

    Negative codes are placeholders and pass through unchanged. Raises ConfigError for a size that is not a multiple
    of 32 pixels and for codes the tokenizer lacks.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ConfigError(f"codes of one frame must be [H/16, W/16], got {list(codes.shape)}; pass one frame")
    rows, columns = codes.shape
    _check_size(rows * PATCH, columns * PATCH)
    if codes.max() >= vocabulary.num_codes:
        raise ConfigError(
            f"VQ code {codes.max()} is outside the tokenizer's {vocabulary.num_codes}; VQGAN and tokenizer differ"
        )
    grid = np.full((rows, columns + 1), vocabulary.new_line, np.int32)
    # Placeholders are negative, and would index the table from its end.
    grid[:, :-1] = np.where(codes >= 0, vocabulary.code_to_token[np.maximum(codes, 0)], codes)
    start, end = delimiters
    size = vocabulary.grid_token(rows * PATCH // BLOCK), vocabulary.grid_token(columns * PATCH // BLOCK)
    return np.concatenate([[start, *size], grid.ravel(), [end]]).astype(np.int32)


def code_placeholders(views: tuple[str, ...], frames: int, rows: int, columns: int) -> dict[str, np.ndarray]:
    """By view int32 [T, H/16, W/16] of placeholders -(1 + k).

    k indexes the row's flattened codes: all frames of the first view, then all of the next.
    """
    count = len(views) * frames * rows * columns
    arrays = -(1 + np.arange(count, dtype=np.int32)).reshape(len(views), frames, rows, columns)
    return dict(zip(views, arrays, strict=True))


def sequence_length(num_text: int, frame: int, config: SequenceConfig) -> int:
    """Tokens of a sequence whose text has `num_text` ids and whose every frame has `frame` tokens."""
    texts = config.num_frames if config.language_instruction_per_frame else 1
    return texts * config.repeat_lang_tokens * num_text + config.num_frames * (
        len(config.views) * frame + (2 if config.use_state else 0)
    )


def compose(
    text_ids: np.ndarray,
    views: Mapping[str, np.ndarray],
    vocabulary: Vocabulary,
    config: SequenceConfig,
    length: int | None = None,
) -> Sequence:
    """Lays out one training sequence.

    Args:
      text_ids: int [n], beginning with <s>.
      views: by name of `config.views`, int [T, H/16, W/16] VQ codes or negative placeholders.
      length: pads with id 0 or truncates to this many tokens; None leaves the sequence as it is.

    Raises:
      ConfigError: views that are not those of the config, or a frame that cannot be tokenized.
    """
    _check_views(views, config)
    delimiters = {view: vocabulary.delimiters(view, config.extra_views) for view in config.views}
    text = np.tile(np.asarray(text_ids, np.int32), config.repeat_lang_tokens)
    pieces: list[np.ndarray] = []
    trained: list[bool] = []
    states, actions = [], []
    position = 0

    def add(tokens: np.ndarray, is_trained: bool) -> int:
        nonlocal position
        pieces.append(tokens)
        trained.append(is_trained)
        position += len(tokens)
        return position - len(tokens)

    num_frames = len(views["front"])
    for t in range(num_frames):
        # As in the public code: the first frame and its text are given at inference, so they are never targets; later
        # texts are, and so are the state and <action> placeholders of every frame.
        has_text = t == 0 or config.language_instruction_per_frame
        text_trained = t > 0 and config.train_later_text
        image_trained = t >= config.condition_frame_num
        if config.language_first and has_text:
            add(text, text_trained)
        for view, ends in delimiters.items():
            add(frame_tokens(views[view][t], vocabulary, ends), image_trained)
        if config.use_state:
            states.append(add(np.array([vocabulary.state], np.int32), True))
        if not config.language_first and has_text:
            add(text, text_trained)
        if config.use_state:
            actions.append(add(np.array([vocabulary.action], np.int32), True))

    tokens = np.concatenate(pieces)
    # One flag per piece, spread over its tokens once: no Python work per token.
    loss_mask = np.repeat(trained, [len(p) for p in pieces])
    length = len(tokens) if length is None else length
    padding = max(0, length - len(tokens))
    return Sequence(
        tokens=np.pad(tokens, (0, padding), constant_values=PAD)[:length],
        loss_mask=np.pad(loss_mask, (0, padding))[:length],
        state_positions=_positions(states, num_frames, length),
        action_positions=_positions(actions, num_frames, length),
    )


def prompt(
    text_ids: np.ndarray, views: Mapping[str, np.ndarray], vocabulary: Vocabulary, config: SequenceConfig
) -> np.ndarray:
    """int32 [P]: everything before the first <action>, for one observation with codes [H/16, W/16] by view.

    Ends with the state token when `language_first`, else with the text. Raises as `compose`.
    """
    _check_views(views, config)
    text = np.tile(np.asarray(text_ids, np.int32), config.repeat_lang_tokens)
    pieces = [
        frame_tokens(views[view], vocabulary, vocabulary.delimiters(view, config.extra_views)) for view in config.views
    ]
    if config.use_state:
        pieces.append(np.array([vocabulary.state], np.int32))
    pieces = [text, *pieces] if config.language_first else [*pieces, text]
    return np.concatenate(pieces).astype(np.int32)


def find_positions(tokens: np.ndarray, token_id: int, count: int) -> np.ndarray:
    """int32 [B, count]: positions of `token_id` in each row of `tokens` [B, S], in order, -1 where absent."""
    positions = np.full((len(tokens), count), -1, np.int32)
    for row, found in zip(positions, tokens == token_id, strict=True):
        where = np.flatnonzero(found)[:count]
        row[: len(where)] = where
    return positions


def _positions(found: list[int], count: int, length: int) -> np.ndarray:
    positions = np.full(count, -1, np.int32)
    positions[: len(found)] = found
    # A truncated sequence may have lost its last states and actions: these become absent.
    return np.where(positions < length, positions, -1).astype(np.int32)


def _check_views(views: Mapping[str, np.ndarray], config: SequenceConfig) -> None:
    if set(views) != set(config.views):
        raise ConfigError(
            f"got frames of {', '.join(views)} but the sequence has {', '.join(config.views)}; make "
            "sequence.use_wrist_frame and data.extra_views agree with them"
        )


def _check_size(height: int, width: int) -> None:
    if height < BLOCK or width < BLOCK or height % BLOCK or width % BLOCK:
        raise ConfigError(
            f"frame of {height} x {width} pixels: both edges must be multiples of {BLOCK}; "
            f"set data.image.fit to 'crop' or 'pad'"
        )
