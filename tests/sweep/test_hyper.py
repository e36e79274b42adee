"""The words of a sweep: how points combine, and that no key is set twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rynnvla_jax.config import ConfigError
from rynnvla_jax.sweep import hyper

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes)
def test_a_product_has_every_combination_once_and_the_last_part_turns_fastest(lengths):
    points = hyper.product([hyper.sweep(f"k{i}", range(n)) for i, n in enumerate(lengths)])
    found = [tuple(point[f"k{i}"] for i in range(len(lengths))) for point in points]
    assert found == sorted(set(found))
    total = 1
    for n in lengths:
        total *= n
    assert len(found) == total


@given(sizes)
def test_chained_points_follow_each_other(lengths):
    points = hyper.chainit([hyper.sweep(f"k{i}", range(n)) for i, n in enumerate(lengths)])
    assert points == [{f"k{i}": v} for i, n in enumerate(lengths) for v in range(n)]


def test_zipped_points_go_together():
    parts = [hyper.sweep("a", [1, 2]), hyper.sweep("b", [3, 4])]
    assert hyper.zipit(parts) == hyper.zipit(iter(parts)) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ConfigError, match="2, 3 points"):
        hyper.zipit([hyper.sweep("a", [1, 2]), hyper.sweep("b", [3, 4, 5])])


@pytest.mark.parametrize("join", [hyper.product, hyper.zipit])
def test_a_key_that_two_parts_set_is_an_error_that_names_it(join):
    with pytest.raises(ConfigError, match="set seed"):
        join([hyper.sweep("seed", [1]), hyper.product([hyper.fixed("remat", "none"), hyper.fixed("seed", 2)])])


def test_a_name_stands_for_what_its_points_have_in_common_and_stays_in_products():
    big = hyper.named("big", hyper.product([hyper.fixed("width", 8), hyper.sweep("layers", [1, 2])]))
    points = hyper.product([big, hyper.sweep("seed", [0])])
    assert points == [{"width": 8, "layers": 1, "seed": 0}, {"width": 8, "layers": 2, "seed": 0}]
    assert {p.names for p in points} == {("big",)}
    assert {p.told for p in points} == {frozenset({"width"})}
    assert hyper.product([big, hyper.named("b", hyper.fixed("x", 1))])[0].names == ("big", "b")
