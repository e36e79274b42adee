"""The layout agrees with the public code in all 32 option combinations; positions, masks, truncation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rynnvla_jax.config import SequenceConfig
from rynnvla_jax.sequence import (
    code_placeholders,
    compose,
    find_positions,
    frame_length,
    frame_tokens,
    prompt,
    sequence_length,
)
from rynnvla_jax.vocabulary import Vocabulary
from tests import GOLDEN

LAYOUT = json.loads((GOLDEN / "layout.json").read_text(encoding="utf-8"))
NAMES = {"<s>": 0, "<eoss>": 8196, "<racm3:break>": 8197, **LAYOUT["image_vocab"]}
NAMES |= {f"<reserved{n:05d}>": n + 4 for n in range(8799, 8864)}
VOCABULARY = Vocabulary.from_vocab(NAMES, 65536)
OPTIONS = (
    "language_first",
    "language_instruction_per_frame",
    "repeat_lang_tokens",
    "condition_frame_num",
    "use_wrist_frame",
)


def codes(value):
    row, column = np.mgrid[: LAYOUT["image_hw"][0] // 16, : LAYOUT["image_hw"][1] // 16]
    return (value * 37 + 5 * row + 3 * column) % LAYOUT["n_codes"]


def config_of(case):
    return SequenceConfig(num_frames=LAYOUT["num_frames"], **{k: case[k] for k in OPTIONS})


def sample(case, i):
    text = LAYOUT["texts"][LAYOUT["video_text"][i]]
    front = np.stack([codes(v) for v in LAYOUT["front_frame_values"][i]])
    if not case["use_wrist_frame"]:
        return text, {"front": front}
    return text, {"front": front, "wrist": np.stack([codes(v) for v in LAYOUT["wrist_frame_values"][i]])}


def test_vocabulary_has_the_golden_ids():
    assert VOCABULARY.code_to_token.tolist() == LAYOUT["code_to_token"]
    special = LAYOUT["special"]
    assert (VOCABULARY.begin_image, VOCABULARY.end_image, VOCABULARY.new_line, VOCABULARY.action) == (
        special["boi"],
        special["eoi"],
        special["new_line"],
        special["action"],
    )


@pytest.mark.parametrize("case", LAYOUT["cases"], ids=lambda c: "-".join(str(int(c[k])) for k in OPTIONS))
def test_layout_and_labels_match_the_public_code(case):
    config = config_of(case)
    for i in range(2):
        text, views = sample(case, i)
        out = compose(text, views, VOCABULARY, config)
        assert out.tokens.tolist() == case["input_ids"][i]
        assert out.labels.tolist() == case["labels"][i]
        assert sequence_length(len(text), frame_length(*LAYOUT["image_hw"]), config) == len(out.tokens)
        assert (out.tokens[out.state_positions] == VOCABULARY.state).all()
        assert (out.tokens[out.action_positions] == VOCABULARY.action).all()
        found = find_positions(out.tokens[None], VOCABULARY.action, config.num_frames)
        np.testing.assert_array_equal(found[0], out.action_positions)


@pytest.mark.parametrize("case", LAYOUT["inferencer_prompts"], ids=lambda c: str(c["repeat_lang_tokens"]))
def test_prompts_match_the_public_inferencer(case):
    config = SequenceConfig(repeat_lang_tokens=case["repeat_lang_tokens"])
    views = {"front": codes(case["front_value"]), "wrist": codes(case["wrist_value"])}
    ids = prompt(LAYOUT["texts"][case["text"]], views, VOCABULARY, config)
    assert ids.tolist() == case["prompt"]


@pytest.mark.parametrize("language_first", [True, False])
def test_a_prompt_is_what_stands_before_the_first_action(language_first):
    text, views = sample({"use_wrist_frame": True}, 0)
    config = SequenceConfig(num_frames=3, language_first=language_first)
    out = compose(text, views, VOCABULARY, config)
    first = {view: frames[0] for view, frames in views.items()}
    np.testing.assert_array_equal(prompt(text, first, VOCABULARY, config), out.tokens[: out.action_positions[0]])


def test_padding_and_truncation():
    text, views = sample({"use_wrist_frame": True}, 0)
    config = SequenceConfig(num_frames=3)
    full = compose(text, views, VOCABULARY, config)
    n = len(full.tokens)
    padded = compose(text, views, VOCABULARY, config, length=n + 5)
    assert (padded.tokens[n:] == 0).all() and not padded.loss_mask[n:].any()
    np.testing.assert_array_equal(padded.tokens[:n], full.tokens)
    cut = compose(text, views, VOCABULARY, config, length=int(full.action_positions[1]))
    assert len(cut.tokens) == len(cut.loss_mask) == full.action_positions[1]
    assert cut.action_positions.tolist() == [full.action_positions[0], -1, -1]
    assert cut.state_positions.tolist() == [*full.state_positions[:2], -1]


def test_later_text_can_be_masked():
    text, views = sample({"use_wrist_frame": False}, 0)
    config = SequenceConfig(num_frames=3, use_wrist_frame=False)
    trained = compose(text, views, VOCABULARY, config)
    masked = compose(text, views, VOCABULARY, replace(config, train_later_text=False))
    np.testing.assert_array_equal(trained.tokens, masked.tokens)
    differs = trained.loss_mask & ~masked.loss_mask
    assert trained.tokens[differs].tolist() == text * 2 and not (masked.loss_mask & ~trained.loss_mask).any()


def test_video_stage_has_neither_state_nor_action():
    text, views = sample({"use_wrist_frame": False}, 0)
    config = SequenceConfig(num_frames=3, use_wrist_frame=False, use_state=False)
    out = compose(text, views, VOCABULARY, config)
    assert not np.isin(out.tokens, [VOCABULARY.state, VOCABULARY.action]).any()
    assert (out.state_positions == -1).all() and (out.action_positions == -1).all()
    assert len(out.tokens) == sequence_length(len(text), frame_length(64, 64), config)


def test_placeholders_filled_on_the_device_give_the_same_tokens():
    text, views = sample({"use_wrist_frame": True}, 1)
    config = SequenceConfig(num_frames=3)
    holders = compose(text, code_placeholders(config.views, 3, 4, 4), VOCABULARY, config)
    flat = np.concatenate([views["front"].ravel(), views["wrist"].ravel()])
    filled = np.where(
        holders.tokens < 0, VOCABULARY.code_to_token[flat[np.maximum(-holders.tokens - 1, 0)]], holders.tokens
    )
    np.testing.assert_array_equal(filled, compose(text, views, VOCABULARY, config).tokens)


def test_extra_views_follow_with_delimiters_of_their_own_and_change_nothing_else():
    text, views = sample({"use_wrist_frame": True}, 0)
    config = SequenceConfig(num_frames=3, extra_views=("left", "top"))
    vocabulary = Vocabulary.from_vocab(NAMES | {f"<reserved{n:05d}>": n + 4 for n in range(9001, 9009)}, 65536)
    more = views | {"top": views["front"][::-1], "left": views["wrist"][::-1]}
    out = compose(text, more, vocabulary, config)
    known = compose(text, views, vocabulary, replace(config, extra_views=()))
    frame = frame_length(*LAYOUT["image_hw"])
    assert len(out.tokens) == len(known.tokens) + 3 * 2 * frame == sequence_length(len(text), frame, config)
    starts = [vocabulary.begin_image, vocabulary.wrist_start, 9005, 9007]
    assert out.tokens[np.isin(out.tokens, starts)].tolist() == starts * 3
    assert (
        out.tokens[np.isin(out.tokens, [vocabulary.wrist_end, 9006, 9008])].tolist()
        == [
            vocabulary.wrist_end,
            9006,
            9008,
        ]
        * 3
    )
    own = np.zeros(len(out.tokens), bool)
    for start in np.flatnonzero(np.isin(out.tokens, starts[2:])):
        own[start : start + frame] = True
    np.testing.assert_array_equal(out.tokens[~own], known.tokens)
    np.testing.assert_array_equal(out.loss_mask[~own], known.loss_mask)
    assert vocabulary.size == VOCABULARY.size  # the public weights have the rows already
    with pytest.raises(ValueError, match="reserved09001.*'left'.*rynnvla data tokenizer"):
        compose(text, more, VOCABULARY, config)


def test_published_frame_lengths():
    assert frame_length(384, 384) == 604 and frame_length(384, 512) == 796


def test_sizes_that_are_no_multiple_of_32_are_errors():
    with pytest.raises(ValueError, match="48 x 64.*fit"):
        frame_tokens(np.zeros((3, 4), int), VOCABULARY, (0, 1))
    with pytest.raises(ValueError, match="384 x 500"):
        frame_length(384, 500)


def test_unknown_codes_and_missing_wrist_are_errors():
    with pytest.raises(ValueError, match="60"):
        frame_tokens(np.full((2, 2), 60), VOCABULARY, (0, 1))
    with pytest.raises(ValueError, match="use_wrist_frame"):
        prompt([0], {"front": np.zeros((2, 2), int)}, VOCABULARY, SequenceConfig())


def test_find_positions_marks_what_is_absent():
    tokens = np.array([[1, 7, 2, 7], [1, 2, 3, 7], [0, 0, 0, 0]])
    assert find_positions(tokens, 7, 2).tolist() == [[1, 3], [3, -1], [-1, -1]]
