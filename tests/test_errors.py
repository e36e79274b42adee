"""The running text of errors."""

import pytest

from rynnvla_jax.errors import did_you_mean, listing, one_line, shorten


def test_the_nearest_known_word_or_what_there_is():
    known = ["batch_size", "total_steps"]
    assert did_you_mean("bach_size", known, prefix="config.") == " Did you mean config.batch_size?"
    assert did_you_mean("zzz", known) == "" and did_you_mean("zzz", known, otherwise=" Known: a.") == " Known: a."


def test_long_lists_are_cut():
    assert listing([1, 2], 2) == "1, 2" and listing([1, 2, 3], 2) == "1, 2 and 1 more" and listing([], 2) == ""
    assert listing("abcd", 2, "; ") == "a; b and 2 more"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "a.mp4"), "No such file or directory"),
        (ValueError("DATA_LOSS: bad   chunk [source locations='a.cc:1\nb.cc:2']"), "DATA_LOSS: bad chunk"),
        ("x" * 1000, "x" * 395 + " ... " + "x" * 200),
    ],
)
def test_errors_in_one_line(error, said):
    assert shorten(error) == said


def test_what_a_foreign_file_says_stays_in_one_line():
    assert one_line("a\nb\0c\ud800 ü") == "a\\nb\\x00c\\ud800 ü"
    assert len(one_line("x" * 10000)) <= 3000
