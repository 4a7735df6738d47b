"""Numbers shared out in proportion, in whole parts, between bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.scoring.allocation import shares


def test_in_proportion_where_no_bound_is_met():
    assert shares(60, [1, 2, 3], [0, 0, 0], [100, 100, 100]) == [10, 20, 30]


def test_what_one_cannot_take_goes_to_the_others_in_proportion():
    assert shares(60, [1, 2, 3], [0, 0, 0], [100, 100, 12]) == [16, 32, 12]


def test_what_one_must_have_is_taken_from_the_others_in_proportion():
    assert shares(60, [1, 2, 3], [30, 0, 0], [100, 100, 100]) == [30, 12, 18]


def test_fractions_go_to_the_largest_and_among_equals_to_the_first():
    assert shares(4, [1, 1, 1], [0, 0, 0], [9, 9, 9]) == [2, 1, 1]
    assert shares(5, [2.4, 1.3, 1.3], [0, 0, 0], [9, 9, 9]) == [3, 1, 1]


def test_a_total_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match="31 is not between 3 and 30"):
        shares(31, [1, 1], [3, 0], [10, 20])


def test_proportional_to_what_there_is_gives_that_exactly():
    sizes = [123_457, 7, 1_000_003, 64]
    for factor in (1.0, 7.3, 0.1):
        assert (
            shares(sum(sizes), [s * factor for s in sizes], [0] * 4, [2 * s for s in sizes])
            == sizes
        )


@given(data=st.data(), count=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_exact_totals_within_bounds_and_in_order_of_the_proportions(data, count):
    most = data.draw(st.lists(st.integers(0, 500), min_size=count, max_size=count))
    least = [data.draw(st.integers(0, top)) for top in most]
    weights = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    total = data.draw(st.integers(sum(least), sum(most)))

    found = shares(total, weights, least, most)

    assert sum(found) == total
    assert all(low <= share <= high for low, share, high in zip(least, found, most, strict=True))
    free = [
        (weight, share)
        for weight, low, share, high in zip(weights, least, found, most, strict=True)
        if low < share < high
    ]
    # One level for all that no bound holds, up to the rounding to whole numbers.
    for weight, share in free:
        for other, theirs in free:
            assert (share - 1) / weight <= (theirs + 1) / other + 1e-9
