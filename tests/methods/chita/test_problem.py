"""The problem as a value: what it accepts, its objective, and how rows are cut into parts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parity import chita_problems as objective_module
from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem, part_bounds
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError


def problem(**changes):
    given = {"weights": torch.ones(6), "rows": MemoryRows(torch.ones(2, 6)), "ridge": 0.1}
    return Problem(**{**given, "keep": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": 0.0}, "above 0, not 0"),
        ({"ridge": -1.0}, "above 0, not -1"),
        ({"ridge": float("nan")}, "above 0, not nan"),
        ({"ridge": float("inf")}, "above 0, not inf"),
        ({"keep": 7}, "7 of 6 weights cannot be kept"),
        ({"keep": -1}, "-1 of 6 weights cannot be kept"),
        ({"first_order": -1.0}, "first_order is a weight >= 0, not -1"),
        ({"weights": torch.ones(5)}, "do not fit rows of 6 columns"),
        ({"bounds": (0, 4)}, "from 0 to 6"),
        ({"bounds": (0, 4, 2, 6)}, "from 0 to 6"),
    ],
)
def test_a_problem_that_makes_no_sense_says_why(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        problem(**changes)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        problem(weights=torch.tensor([1.0, 1, 1, float("nan"), 1, 1]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,)])
def test_empty_rows_are_refused(shape):
    with pytest.raises(UnsupportedError, match="at least one of each"):
        MemoryRows(torch.ones(shape))


@pytest.mark.parametrize("first_order", [0.0, 0.25])
def test_the_objective_is_that_of_a_loop_over_elements(first_order, monkeypatch):
    monkeypatch.setattr(objective_module, "_WIDTH", 4)
    generator = torch.Generator().manual_seed(0)
    rows, v, w = (torch.randn(s, generator=generator) for s in ((3, 11), (11,), (11,)))
    expected = 0.0
    for row in rows.tolist():
        moved = sum(a * (x - y) for a, x, y in zip(row, w.tolist(), v.tolist(), strict=True))
        linear = sum(a * x for a, x in zip(row, w.tolist(), strict=True))
        expected += moved**2 / 2 + first_order * linear
    expected += 3 * 0.1 / 2 * sum((x - y) ** 2 for x, y in zip(w.tolist(), v.tolist(), strict=True))

    found = objective(Problem(v, MemoryRows(rows), 0.1, 5, first_order), w)

    assert found == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
@settings(max_examples=100, deadline=None)
def test_parts_cover_all_columns_once_and_hold_whole_blocks(sizes, elements, blocked):
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    p = bounds[-1]
    if p == 0:
        return

    cuts = part_bounds(2, p, bounds if blocked else None, elements)

    assert (cuts[0], cuts[-1]) == (0, p)
    assert all(start < stop for start, stop in pairwise(cuts))
    if blocked:
        assert set(cuts) <= set(bounds)
        largest = max(sizes)
        assert all(stop - start <= max(elements // 2, largest) for start, stop in pairwise(cuts))
    else:
        assert all(stop - start <= max(1, elements // 2) for start, stop in pairwise(cuts))


def test_a_sweep_is_counted():
    rows = MemoryRows(torch.arange(12.0).view(2, 6))

    parts = [(start, part.clone()) for start, part in rows.parts()]

    assert torch.equal(torch.cat([part for _, part in parts], 1), rows.matrix)
    assert rows.sweeps == 1
