"""Rank correlation: formula, ties, strata, interval and p-value, against naive ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.tasks.sensitivity.relations import pearson, rank_correlation


def naive_ranks(values):
    """Mean of the places that a value takes among the sorted ones, from 1."""
    ordered = sorted(values)
    return [
        np.mean([place for place, other in enumerate(ordered, start=1) if other == value])
        for value in values
    ]


@given(st.permutations(range(8)))
def test_without_ties_it_is_one_minus_six_times_squared_distances(order):
    distance = sum((a - b) ** 2 for a, b in enumerate(order))
    expected = 1 - 6 * distance / (8 * (8**2 - 1))
    found = rank_correlation(range(8), order, resamples=10)
    assert found.rho == pytest.approx(expected)
    assert found.count == 8


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=10))
def test_with_ties_it_is_the_linear_correlation_of_the_ranks(pairs):
    x, y = zip(*pairs, strict=True)
    a, b = np.array(naive_ranks(x)), np.array(naive_ranks(y))
    found = rank_correlation(x, y, resamples=5).rho
    if a.std() == 0 or b.std() == 0:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_only_the_order_counts():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    stretched = rank_correlation(np.exp(x), np.power(y, 3))
    assert stretched == rank_correlation(x, y)


def test_the_exact_p_value_counts_all_arrangements():
    x, y = [1, 2, 3, 4, 5], [1, 3, 2, 5, 4]
    rho = rank_correlation(x, y).rho
    as_far = [
        abs(np.corrcoef(x, order)[0, 1]) >= rho - 1e-12 for order in itertools.permutations(y)
    ]
    assert rank_correlation(x, y).p == pytest.approx(np.mean(as_far))


def test_the_random_p_value_agrees_with_the_exact_one(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=7)
    y = x + rng.normal(size=7)
    exact = rank_correlation(x, y).p  # 5,040 arrangements
    monkeypatch.setattr("vlp_plugins.tasks.sensitivity.relations._ARRANGEMENTS", 5_039)
    drawn = rank_correlation(x, y).p
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.02)


def test_p_is_small_for_many_ordered_pairs_and_large_for_none():
    rng = np.random.default_rng(0)
    x = np.arange(40)
    assert rank_correlation(x, -x).p < 0.001
    assert rank_correlation(x, rng.permutation(40)).p > 0.05


def test_the_interval_holds_rho_and_narrows_with_pairs():
    rng = np.random.default_rng(1)
    widths = []
    for count in (10, 160):
        x = rng.normal(size=count)
        found = rank_correlation(x, x + rng.normal(size=count))
        assert found.low < found.rho < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of a normal with linear correlation 0.6
    covered = []
    for _ in range(60):
        x = rng.normal(size=50)
        y = 0.6 * x + 0.8 * rng.normal(size=50)
        found = rank_correlation(x, y, resamples=200)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) > 0.85


def test_few_pairs_have_no_interval_and_fewer_no_correlation():
    found = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert (found.rho, found.low, found.high) == (pytest.approx(1), None, None)
    assert found.p == pytest.approx(2 / 24)
    assert rank_correlation([1, 2], [1, 2]).rho is None
    assert rank_correlation([], []).rho is None


def test_a_constant_side_has_none():
    assert rank_correlation([1, 1, 1], [1, 2, 3]).rho is None


def test_strata_take_out_what_they_have_in_common():
    """Within each stratum the order falls; the strata themselves rise."""
    x = [1, 2, 3, 11, 12, 13]
    y = [3, 2, 1, 13, 12, 11]
    assert rank_correlation(x, y).rho > 0
    within = rank_correlation(x, y, [0, 0, 0, 1, 1, 1])
    assert within.rho == pytest.approx(-1)
    assert within.p == pytest.approx(2 / 36)  # of 3! x 3! arrangements both-falling and both-rising


def test_one_stratum_is_the_plain_correlation():
    x, y = [1, 5, 2, 4, 3, 9], [2, 4, 1, 5, 3, 0]
    assert rank_correlation(x, y, ["a"] * 6) == rank_correlation(x, y)


def test_a_stratum_of_one_pair_is_left_out():
    found = rank_correlation([1, 2, 3, 50], [1, 2, 3, -50], ["a", "a", "a", "b"])
    assert found.count == 3
    assert found.rho == pytest.approx(1)


def test_the_same_seed_gives_the_same_numbers():
    x, y = np.arange(12.0), np.array([3, 1, 2, 5, 4, 9, 8, 6, 7, 11, 10, 0.0])
    assert rank_correlation(x, y, seed=3) == rank_correlation(x, y, seed=3)
    assert rank_correlation(x, y, seed=3) != rank_correlation(x, y, seed=4)


def test_linear_correlation_of_constants_is_none_despite_rounding():
    assert np.isnan(pearson(np.full(3, 0.1), np.array([1.0, 2.0, 3.0])))


def test_resampled_ranks_do_not_depend_on_how_many_are_compared_at_a_time(monkeypatch):
    x, y = [1, 5, 2, 4, 3, 9], [2, 4, 1, 5, 3, 0]
    whole = rank_correlation(x, y)
    monkeypatch.setattr("vlp_plugins.tasks.sensitivity.relations._ENTRIES", 100)
    assert rank_correlation(x, y) == whole
