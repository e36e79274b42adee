"""Ids come from names; the text tokenizer begins with <s> and refuses special tokens."""

import json

import numpy as np
import pytest

from rynnvla_jax.vocabulary import TextTokenizer, Vocabulary, image_name, train_tokenizer

CORPUS = ["pick up the green block and place it on the plate", "put the pen into the holder"] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(CORPUS, num_codes=128), encoding="utf-8")
    return TextTokenizer(path)


def test_ids_are_the_published_ones():
    names = {"<s>": 0, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {image_name(c): c + 4 for c in range(8192)}
    names |= {f"<reserved{n:05d}>": n + 4 for n in range(8194, 9000)}
    vocabulary = Vocabulary.from_vocab(names, 65536)
    assert (vocabulary.action, vocabulary.wrist_start, vocabulary.wrist_end, vocabulary.state) == (
        65536,
        65537,
        65538,
        65539,
    )
    assert (vocabulary.size, vocabulary.begin_image, vocabulary.end_image, vocabulary.new_line) == (
        65540,
        8197,
        8196,
        8803,
    )
    assert vocabulary.grid_token(12) == 8816 and vocabulary.image_tokens == (4, 8196)
    assert image_name(17) == "IMGIMGBHZ"


def test_codes_and_tokens_are_inverse_under_any_permutation():
    order = np.random.default_rng(0).permutation(60) + 4
    names = {image_name(c): int(t) for c, t in enumerate(order)}
    names |= {"<s>": 0, "<eoss>": 70, "<racm3:break>": 71, "<reserved08799>": 72, "<reserved08802>": 73}
    vocabulary = Vocabulary.from_vocab(names, 80)
    back = vocabulary.token_to_code()
    assert back.shape == (84,) and (back >= 0).sum() == 60
    np.testing.assert_array_equal(back[vocabulary.code_to_token], np.arange(60))
    assert vocabulary.grid_token(2) == 73
    for missing in (1, 3, 0):
        with pytest.raises(ValueError, match=rf"<reserved0880{missing}>.*shortest_edge"):
            vocabulary.grid_token(missing)


def test_small_tokenizer_encodes_text(tokenizer):
    ids = tokenizer.encode(CORPUS[0])
    assert ids.dtype == np.int32 and ids[0] == tokenizer.vocabulary.bos
    assert len(ids) < len(CORPUS[0]) and (ids[1:] > tokenizer.vocabulary.grid_tokens[-1]).all()
    assert tokenizer.vocabulary.num_codes == 128 and ids.max() < tokenizer.vocabulary.base_size
    assert len(tokenizer.encode("Füße 漢字")) > 5  # bytes: nothing is unknown


def test_tokenizer_refuses_special_tokens_and_empty_text(tokenizer):
    with pytest.raises(ValueError, match="racm3:break"):
        tokenizer.encode("lift <racm3:break> it")
    with pytest.raises(ValueError, match="empty"):
        tokenizer.encode("  ")


def test_unusable_tokenizers_are_named(tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(ValueError, match="t.json does not exist"):
        Vocabulary.from_tokenizer(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="t.json is not JSON"):
        Vocabulary.from_tokenizer(path)
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}}), encoding="utf-8")
    with pytest.raises(ValueError, match="t.json lacks <s>"):
        Vocabulary.from_tokenizer(path)
    content = json.loads(train_tokenizer(CORPUS, num_codes=16))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != image_name(7)]
    del content["model"]["vocab"][image_name(7)]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="image code 7"):
        Vocabulary.from_tokenizer(path)
