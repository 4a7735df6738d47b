"""Factors of the columns of a problem: they decide how many weights a block keeps, not which."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from vlp_plugins.methods.chita.solver.dual import Dual
from vlp_plugins.methods.chita.solver.problem import Importance, MemoryRows, Problem
from vlp_plugins.methods.chita.solver.solve import solve
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.threshold import top

BOUNDS = (0, 40, 40, 100, 101, 240)
IMPORTANCE = Importance(BOUNDS, (1.0, 0.5, 0.05, 0.7, 0.3))


def made(first_order=0.0, bounds=BOUNDS, importance=IMPORTANCE):
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(240, generator=generator)
    rows = torch.randn(6, 240, generator=generator)
    return Problem(weights, MemoryRows(rows, bounds), 1e-2, 50, first_order, bounds, importance)


def per_column():
    return IMPORTANCE.times(torch.ones(240))


@pytest.mark.parametrize("entries", [slice(0, 240), slice(35, 103), slice(3, 200, 7), slice(5, 5)])
def test_every_column_gets_its_factor(entries):
    expected = torch.cat([
        torch.full((stop - start,), factor)
        for (start, stop), factor in zip(pairwise(BOUNDS), IMPORTANCE.factors, strict=True)
    ])  # fmt: skip
    values = torch.arange(240.0)[entries].clone()

    found = IMPORTANCE.times(values.clone(), entries)

    torch.testing.assert_close(found, values * expected[entries])


@pytest.mark.parametrize("effort", ["fast", "best", "published"])
def test_blocks_keep_what_magnitude_times_importance_leaves_them(effort):
    problem = made()
    found = solve(problem, effort)

    expected = top(problem.weights.abs() * per_column(), 50)
    assert int(found.support.sum()) == 50
    for start, stop in pairwise(BOUNDS):
        assert int(found.support[start:stop].sum()) == int(expected[start:stop].sum())
    plain = solve(replace(problem, importance=None), effort)
    assert not torch.equal(found.support, plain.support)


@pytest.mark.parametrize("effort", ["fast", "best", "published"])
@pytest.mark.parametrize("first_order", [0.0, 0.3])
def test_equal_importance_changes_nothing(effort, first_order):
    problem = made(first_order, importance=Importance((0, 240), (0.5,)))
    found, plain = solve(problem, effort), solve(replace(problem, importance=None), effort)
    assert torch.equal(found.support, plain.support)
    assert torch.equal(found.values, plain.values)


def test_a_gradient_step_is_compared_by_importance_too():
    problem = made(first_order=0.3, bounds=None)
    found = solve(problem, "published")
    plain = solve(replace(problem, importance=None), "published")

    assert int(found.support.sum()) == int(plain.support.sum()) == 50
    weighed = per_column()[found.support].mean()
    assert weighed > per_column()[plain.support].mean()


def test_without_blocks_the_published_support_is_the_largest_by_importance():
    problem = made(bounds=None)
    found = solve(problem, "published")
    expected = top(problem.weights.abs() * per_column(), 50)
    assert torch.equal(found.support, expected)
    assert found.objective == Dual.of(problem, expected).objective


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_search_over_the_whole_vector_has_no_use_for_it(effort):
    with pytest.raises(UnsupportedError, match=f"effort '{effort}' .* give a block size"):
        solve(made(bounds=None), effort)


@pytest.mark.parametrize(
    ("bounds", "factors", "message"),
    [
        ((0, 10), (1.0, 2.0), "1 ranges of columns"),
        ((0, 10, 20), (1.0, 0.0), "2 ranges of columns have as many factors above 0"),
        ((1, 10), (1.0,), "ascending order"),
        ((0, 10, 5), (1.0, 1.0), "ascending order"),
    ],
)
def test_ranges_and_factors_that_do_not_fit_are_refused(bounds, factors, message):
    with pytest.raises(UnsupportedError, match=message):
        Importance(bounds, factors)


def test_importance_of_other_columns_is_refused():
    with pytest.raises(UnsupportedError, match="factors of 10 columns do not fit rows of 240"):
        made(importance=Importance((0, 10), (1.0,)))
