"""The published effort against its formulas in float64, and outside the published defects."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.solver import blocks as blocks_module
from vlp_plugins.methods.chita.solver import problem as rows_module
from vlp_plugins.methods.chita.solver.blocks import edges_of, similar
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.published import solve_published
from vlp_plugins.runtime.errors import UnsupportedError

BOUNDS = (0, 30, 30, 75, 90, 120)


def made(seed=0, n=10, p=120, keep=40, ridge=0.01, first_order=0.0, bounds=None):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(p, generator=generator)
    rows = torch.randn(n, p, generator=generator)
    rows *= torch.where(weights.abs() < 0.5, 3.0, 0.5)  # a step can leave the support
    return Problem(weights, MemoryRows(rows, bounds), ridge, keep, first_order, bounds)


def top(beta, k):
    """Positions of the k largest; of equal ones the last."""
    chosen = torch.zeros(len(beta), dtype=torch.bool)
    chosen[beta.abs().sort(stable=True).indices[len(beta) - k :]] = True
    return chosen


def step(rows, w, beta, support, ridge, c):
    """The step of the published solver; a start that cannot be improved stays."""
    k = int(support.sum())
    alpha = c * rows.sum(0)
    start = torch.where(support, beta, 0.0)
    if alpha.norm() <= 1e-8 or k in (0, len(w)):
        return start, support

    def value(x):
        return (rows @ (w - x)).square().sum() / 2 + alpha @ x + ridge / 2 * (x - w).square().sum()

    def passes(length):
        size = (beta - length * g).abs()
        return size[support].max() >= size[~support].max() - 1e-10

    g = -rows.T @ (rows @ (w - beta)) + alpha - ridge * (w - beta)
    masked = torch.where(support, g, 0.0)
    if not masked.any():
        return start, support
    length = masked.square().sum() / (
        (rows @ masked).square().sum() + ridge * masked.square().sum()
    )
    if passes(length):
        return torch.where(support, beta - length * g, 0.0), support
    length = length / 2
    for _ in range(100):
        if passes(length):
            break
        length = length / 2
    best, lowest = (start, support), value(start)
    for _ in range(10):
        candidate = beta - length * g
        chosen = top(candidate, k)
        candidate = torch.where(chosen, candidate, 0.0)
        if value(candidate) >= lowest:
            break
        best, lowest, length = (candidate, chosen), value(candidate), 2 * length
    return best


def published(problem):
    """Support and weights by the formulas, one block after the other."""
    rows, w = problem.rows.matrix.double(), problem.weights.double()
    ridge, c = len(rows) * problem.ridge, problem.first_order
    support = top(problem.weights, problem.keep)
    beta, support = step(rows, w, w, support, ridge, c)
    support = support.clone()
    values = torch.zeros_like(w)
    for a, b in pairwise(problem.bounds or (0, len(w))):
        if a == b:
            continue
        if problem.bounds and c:
            _, support[a:b] = step(rows[:, a:b], w[a:b], beta[a:b], support[a:b], ridge, c)
        inside = support[a:b].nonzero()[:, 0] + a
        kept = rows[:, inside]
        left = kept.T @ kept + ridge * torch.eye(len(inside), dtype=torch.float64)
        right = kept.T @ (rows[:, a:b] @ w[a:b]) + ridge * w[inside] - c * kept.sum(0)
        values[inside] = torch.linalg.solve(left, right)
    return support, values


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("first_order", [0.0, 0.25, 2.0, 30.0])
@pytest.mark.parametrize("ridge", [0.003, 0.1, 10.0])
def test_support_and_weights_are_those_of_the_formulas(bounds, first_order, ridge):
    for seed in range(6):
        problem = made(seed, ridge=ridge, first_order=first_order, bounds=bounds)
        support, values = published(problem)

        solution = solve_published(problem)

        assert torch.equal(solution.support, support)
        torch.testing.assert_close(solution.values.double(), values, rtol=1e-3, atol=1e-3)
        assert solution.objective == pytest.approx(objective(problem, solution.values), rel=1e-4)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_step_can_move_the_support(bounds):
    """So that the comparison with the formulas covers the line search and its candidates."""
    problem = made(first_order=30.0, ridge=10.0, bounds=bounds)

    solution = solve_published(problem)

    assert not torch.equal(solution.support, top(problem.weights, problem.keep))
    assert problem.rows.sweeps == (3 if bounds else 4)


def test_without_a_first_order_term_the_largest_weights_stay():
    problem = made(bounds=BOUNDS)
    assert torch.equal(solve_published(problem).support, top(problem.weights, problem.keep))


@given(
    keep=st.integers(0, 24),
    kinds=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=24, max_size=24),
    first_order=st.sampled_from([0.0, 0.25]),
    blocked=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_exactly_as_many_weights_stay_as_asked(keep, kinds, first_order, blocked):
    """Also with equal weights, zeros among them, and blocks that keep everything or nothing."""
    bounds = (0, 5, 12, 12, 24) if blocked else None
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(keep))
    problem = Problem(torch.tensor(kinds), MemoryRows(rows, bounds), 0.1, keep, first_order, bounds)

    solution = solve_published(problem)

    assert int(solution.support.sum()) == keep
    assert not solution.values[~solution.support].any()
    assert torch.isfinite(solution.values).all()
    assert solution.objective == pytest.approx(
        objective(problem, solution.values), rel=1e-4, abs=1e-4
    )


def test_a_block_without_gradients_keeps_its_weights():
    problem = made(first_order=0.25, bounds=BOUNDS)
    problem.rows.matrix[:, 30:75] = 0

    solution = solve_published(problem)

    inside = solution.support[30:75]
    assert inside.any()
    torch.testing.assert_close(solution.values[30:75][inside], problem.weights[30:75][inside])


def test_a_step_that_improves_nothing_leaves_the_block_as_it_was():
    """Where the published code returns an empty array and the block comes out zero."""
    found = 0
    for seed in range(40):
        problem = made(seed, n=4, p=12, keep=6, ridge=1e-3, first_order=2.0)
        support, values = published(problem)
        solution = solve_published(problem)
        assert torch.equal(solution.support, support)
        assert solution.values.any() == values.any()
        found += stuck(problem)
    assert found > 0


def stuck(problem):
    """Whether the line search of the global step rejects its first candidate."""
    rows, w = problem.rows.matrix.double(), problem.weights.double()
    ridge, support = len(rows) * problem.ridge, top(problem.weights, problem.keep)
    beta, chosen = step(rows, w, w, support, ridge, problem.first_order)
    return torch.equal(chosen, support) and torch.equal(beta, torch.where(support, w, 0.0))


@pytest.mark.parametrize(
    ("bounds", "first_order", "sweeps"), [(BOUNDS, 0.0, 1), (None, 0.0, 2), (None, 1e-9, 3)]
)
def test_sweeps_are_as_few_as_promised(bounds, first_order, sweeps):
    problem = made(first_order=first_order, bounds=bounds)
    solve_published(problem)
    assert problem.rows.sweeps == sweeps


@pytest.mark.parametrize("first_order", [0.0, 30.0])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_parts_change_nothing(bounds, first_order, monkeypatch):
    problem = made(3, ridge=10.0, first_order=first_order, bounds=bounds)
    whole = solve_published(problem)
    monkeypatch.setattr(rows_module, "_VIEW", 400)
    cut = replace(problem, rows=MemoryRows(problem.rows.matrix, bounds))
    assert len(list(cut.rows.parts())) > 2

    parts = solve_published(cut)

    assert torch.equal(parts.support, whole.support)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-3, atol=1e-4)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("first_order", [0.0, 0.25])
def test_rows_may_be_of_any_floating_dtype(dtype, first_order):
    problem = made(first_order=first_order, bounds=BOUNDS)
    rows = problem.rows.matrix.to(dtype)
    wide = solve_published(replace(problem, rows=MemoryRows(rows.float(), BOUNDS)))

    solution = solve_published(replace(problem, rows=MemoryRows(rows, BOUNDS)))

    assert torch.equal(solution.support, wide.support)
    torch.testing.assert_close(solution.values, wide.values, rtol=1e-4, atol=1e-4)
    assert solution.objective == pytest.approx(wide.objective, rel=1e-5)


def test_blocks_are_shared_out_among_threads_without_changing_a_bit(monkeypatch):
    monkeypatch.setattr(blocks_module, "_ELEMENTS", 1 << 14)
    problem = made(n=70, p=4000, keep=900, bounds=tuple(range(0, 4001, 250)))
    before = torch.get_num_threads()
    try:
        solutions = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            solutions.append(solve_published(problem))
    finally:
        torch.set_num_threads(before)
    one, three = solutions
    assert torch.equal(one.values, three.values)
    assert one.objective == three.objective


def test_rows_that_cut_a_block_are_refused(monkeypatch):
    monkeypatch.setattr(rows_module, "_VIEW", 400)
    problem = made(bounds=BOUNDS)
    with pytest.raises(UnsupportedError, match="make the rows with the same block bounds"):
        solve_published(replace(problem, rows=MemoryRows(problem.rows.matrix)))


def test_edges_of_a_part_leave_out_empty_blocks():
    assert edges_of((0, 4, 4, 9, 9, 12, 12), 4, 12) == [0, 5, 8]


def test_blocks_of_about_one_size_are_padded_together():
    sizes = [100, 10, 90, 1, 70, 8]
    groups = similar(sizes)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(max(sizes[i] for i in g) <= 1.5 * min(sizes[i] for i in g) for g in groups)
