"""The words of a sweep: how points combine, and that no key is set twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rynnvla_jax import hyper as h
from rynnvla_jax.config import ConfigError

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes)
def test_a_product_has_every_combination_once_and_the_last_part_turns_fastest(lengths):
    points = h.product([h.sweep(f"k{i}", range(n)) for i, n in enumerate(lengths)])
    found = [tuple(point[f"k{i}"] for i in range(len(lengths))) for point in points]
    assert found == sorted(set(found))
    total = 1
    for n in lengths:
        total *= n
    assert len(found) == total


@given(sizes)
def test_chained_points_follow_each_other(lengths):
    points = h.chainit([h.sweep(f"k{i}", range(n)) for i, n in enumerate(lengths)])
    assert points == [{f"k{i}": v} for i, n in enumerate(lengths) for v in range(n)]


def test_zipped_points_go_together():
    parts = [h.sweep("a", [1, 2]), h.sweep("b", [3, 4])]
    assert h.zipit(parts) == h.zipit(iter(parts)) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ConfigError, match="2, 3 points"):
        h.zipit([h.sweep("a", [1, 2]), h.sweep("b", [3, 4, 5])])


@pytest.mark.parametrize("join", [h.product, h.zipit])
def test_a_key_that_two_parts_set_is_an_error_that_names_it(join):
    with pytest.raises(ConfigError, match="set seed"):
        join([h.sweep("seed", [1]), h.product([h.fixed("remat", "none"), h.fixed("seed", 2)])])


def test_a_name_stands_for_what_its_points_have_in_common_and_stays_in_products():
    big = h.named("big", h.product([h.fixed("width", 8), h.sweep("layers", [1, 2])]))
    points = h.product([big, h.sweep("seed", [0])])
    assert points == [{"width": 8, "layers": 1, "seed": 0}, {"width": 8, "layers": 2, "seed": 0}]
    assert {p.names for p in points} == {("big",)}
    assert {p.told for p in points} == {frozenset({"width"})}
    assert h.product([big, h.named("b", h.fixed("x", 1))])[0].names == ("big", "b")
