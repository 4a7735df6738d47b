"""Schedules: they rise, stay within bounds, and end exactly at the target."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.scoring.schedules import SCHEDULES, levels_of

SPARSITIES = st.floats(0, 1, exclude_max=True)


@given(target=SPARSITIES, rounds=st.integers(1, 80), name=st.sampled_from(sorted(SCHEDULES)))
def test_every_schedule_rises_and_ends_exactly_at_the_target(target, rounds, name):
    levels = levels_of(target, name, rounds)

    assert len(levels) == rounds
    assert levels[-1] == target
    assert all(0 <= level <= target for level in levels)
    assert levels == sorted(levels)


def test_the_formulas_are_those_of_the_papers():
    assert levels_of(0.75, "exp", 2) == pytest.approx([0.5, 0.75])
    assert levels_of(0.63, "exp", 3) == pytest.approx([0.28209456, 0.48461179, 0.63])
    assert levels_of(0.9, "linear", 3) == pytest.approx([0.3, 0.6, 0.9])
    assert levels_of(0.9, "const", 2) == [0.9, 0.9]
    assert levels_of(0.8, "cubic", 2) == pytest.approx([0.8 * (1 - 0.5**3), 0.8])


def test_the_exponential_one_removes_the_same_fraction_of_the_rest_in_every_round():
    kept = [1, *(1 - float(level) for level in levels_of(0.9, "exponential", 5))]

    ratios = [after / before for before, after in pairwise(kept)]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_every_modality_follows_the_schedule_to_its_own_target():
    levels = levels_of({"vision": 0.5, "text": 0.8}, "linear", 2)

    assert levels == [{"vision": 0.25, "text": 0.4}, {"vision": 0.5, "text": 0.8}]


def test_unknown_names_and_no_rounds_are_refused():
    with pytest.raises(SparsityError, match="did you mean 'linear'"):
        levels_of(0.5, "lineer", 3)
    with pytest.raises(SparsityError, match="rounds=0"):
        levels_of(0.5, "exp", 0)
