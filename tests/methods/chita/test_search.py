"""The search for a better support: the relaxed problem, exchanges near the line, both efforts."""

import itertools
import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.solver.dual import Dual, dual_and_band
from vlp_plugins.methods.chita.solver.problem import (
    MemoryRows,
    Problem,
    Rows,
    part_bounds,
    ranked,
    with_band,
)
from vlp_plugins.methods.chita.solver.search import (
    Point,
    ascend,
    dual_value,
    exchange,
    exchange_pairs,
    finish,
    first_point,
    newton_direction,
    polished,
    shifts,
    slopes,
    solve_best,
    solve_fast,
)
from vlp_plugins.runtime.errors import NonFiniteError

EFFORTS = pytest.mark.parametrize("solve", [solve_fast, solve_best])


def made(n=8, p=300, keep=60, seed=0, ridge=1e-2, first_order=0.0):
    """Rows of low rank and noise, columns of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, n // 3)
    low = torch.randn(n, rank, generator=generator) @ torch.randn(rank, p, generator=generator)
    rows = low + 0.3 * torch.randn(n, p, generator=generator)
    rows *= torch.rand(p, generator=generator).square()
    weights = torch.randn(p, generator=generator)
    return Problem(weights, MemoryRows(rows), ridge, keep, first_order)


def at_magnitude(problem):
    support = ranked(problem.weights, problem.keep).support
    return Dual.of(problem, support).objective


def least(problem):
    """The optimum, by trying every support."""
    p = problem.rows.p
    every = itertools.combinations(range(p), problem.keep)
    nothing = torch.zeros(p, dtype=torch.bool)
    supports = (nothing.index_fill(0, torch.tensor(kept), True) for kept in every)
    return min(Dual.of(problem, support).objective for support in supports)


def origin(problem):
    return Point(torch.zeros(problem.rows.n, dtype=torch.float64), problem.weights)


class Parts(MemoryRows):
    """Rows that come in parts of a few columns."""

    def __init__(self, matrix, width):
        super().__init__(matrix)
        self._cuts = part_bounds(*matrix.shape, None, elements=width * len(matrix))


# --- the k largest, and what is next to the line ---


def test_the_band_is_next_to_the_line_on_both_sides():
    found = ranked(torch.tensor([5.0, -1.0, 4.0, 0.5, -3.0, 2.0]), keep=3, near=2)
    assert found.support.tolist() == [True, False, True, False, True, False]
    assert found.threshold == 2.0
    assert found.band.tolist() == [1, 2, 4, 5]


def test_a_side_with_fewer_entries_gives_fewer():
    vector = torch.arange(1.0, 6.0)
    assert ranked(vector, 4, near=3).band.tolist() == [0, 1, 2, 3]
    assert ranked(vector, 5, near=2).band.tolist() == [0, 1]
    assert ranked(vector, 5).threshold == -math.inf
    assert ranked(vector, 0, near=2).band.tolist() == [3, 4]


def test_a_given_support_has_its_smallest_and_the_largest_of_the_others():
    support = torch.tensor([True, False, True, False, True])
    found = with_band(torch.tensor([1.0, 2.0, 3.0, 9.0, 5.0]), support, near=1)
    assert found.band.tolist() == [0, 3]
    assert found.threshold == 9.0


# --- the relaxed problem ---


def test_a_slope_is_the_derivative_of_the_mean_of_hard_thresholding():
    threshold, width = 2.0, 0.3
    noise = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    density = torch.exp(-noise.square() / 2)
    density /= density.sum()

    def mean(z):
        there = z + noise * width * threshold
        return float((density * there * (there > threshold)).sum())

    for z in (1.0, 1.7, 2.0, 2.4, 4.0):
        expected = (mean(z + 1e-2) - mean(z - 1e-2)) / 2e-2
        found = float(slopes(torch.tensor([-z]), threshold, width))
        assert found == pytest.approx(expected, abs=2e-3)


def test_everything_kept_has_the_slope_1():
    assert slopes(torch.tensor([0.0, 1.0]), 0.0, 0.3).tolist() == [1.0, 1.0]
    assert slopes(torch.tensor([0.0, 1.0]), -math.inf, 0.3).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("first_order", [0.0, 0.5])
def test_the_relaxed_value_is_never_above_the_optimum(first_order):
    problem = made(n=3, p=8, keep=3, first_order=first_order)
    rows = problem.rows.matrix.double()
    optimum = least(problem)
    dense = rows @ problem.weights.double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        u = torch.randn(3, generator=generator, dtype=torch.float64)
        z = (problem.weights.double() + rows.T @ u).float()
        assert dual_value(problem, Point(u, z), dense) <= optimum + 1e-6 * abs(optimum)
    top = ascend(problem, origin(problem))
    assert dual_value(problem, origin(problem), dense) < top.bound <= optimum * (1 + 1e-6)


def test_the_bound_meets_the_objective_of_the_best_support():
    problem = made(n=8, p=2000, keep=400, first_order=0.1)
    top = ascend(problem, first_point(problem, ranked(problem.weights, problem.keep)))
    found = solve_best(problem).objective
    assert top.bound <= found + 1e-6 * abs(found)
    assert found - top.bound < 0.02 * (at_magnitude(problem) - top.bound)


def test_with_a_sharp_corner_the_newton_step_solves_for_the_support():
    problem = made()
    chosen = ranked(problem.weights, problem.keep)
    smallest = float(problem.weights[chosen.support].abs().min())
    between = replace(chosen, threshold=(chosen.threshold + smallest) / 2)
    step = newton_direction(problem, origin(problem), between, width=1e-5).step
    expected = Dual.of(problem, chosen.support).solution
    assert torch.allclose(step, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_shifts_are_products_with_the_rows():
    problem = made()
    u = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = problem.rows.matrix.double().T @ u
    assert torch.allclose(shifts(problem, u).double(), expected, atol=1e-5)


# --- exchanges ---


@pytest.mark.parametrize("improve", [exchange, exchange_pairs])
@pytest.mark.parametrize("first_order", [0.0, 0.5])
def test_exchanges_know_the_objective_of_their_support(improve, first_order):
    problem = made(first_order=first_order)
    chosen = ranked(problem.weights, problem.keep, near=40)
    before, band = dual_and_band(problem, chosen)
    after, inside = improve(before, band, chosen.support[chosen.band])
    support = chosen.support.clone()
    support[chosen.band] = inside
    assert int(support.sum()) == problem.keep
    assert after.objective < before.objective
    assert after.objective == pytest.approx(Dual.of(problem, support).objective, rel=1e-5)


def test_no_exchange_of_one_pair_is_left_to_make():
    problem = made(n=4, p=16, keep=6)
    found = polished(problem, ranked(problem.weights, 6, near=16), pairs=True)
    for out, into in itertools.product(range(16), range(16)):
        if found.support[out] and not found.support[into]:
            other = found.support.clone()
            other[out], other[into] = False, True
            assert Dual.of(problem, other).objective >= found.dual.objective * (1 - 1e-6)


# --- both efforts ---


def test_best_finds_the_optimum_of_tiny_problems():
    for seed in range(4):
        problem = made(n=3, p=8, keep=3, seed=seed, first_order=0.2 * (seed % 2))
        optimum = least(problem)
        assert solve_best(problem).objective == pytest.approx(optimum, rel=1e-5)


@EFFORTS
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    share=st.floats(0, 1),
    ridge=st.sampled_from([1e-5, 1e-3, 0.1, 10.0]),
    first_order=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_never_above_magnitude_and_an_exact_count(solve, seed, n, share, ridge, first_order):
    keep = round(share * 200)
    problem = made(n, 200, keep, seed, ridge, first_order)
    found = solve(problem)
    assert int(found.support.sum()) == keep
    assert not found.values[~found.support].any()
    usual = at_magnitude(problem)
    scale = abs(usual) + abs(objective(problem, torch.zeros(200)))
    assert found.objective <= usual + 1e-7 * scale
    assert found.objective == pytest.approx(objective(problem, found.values), abs=1e-6 * scale)


@pytest.mark.parametrize(("ridge", "first_order"), [(1e-5, 0.0), (1e-3, 0.1), (0.1, 0.0)])
def test_fast_closes_nearly_all_of_the_gap_and_best_no_less(ridge, first_order):
    problem = made(n=12, p=1500, keep=300, ridge=ridge, first_order=first_order)
    usual = at_magnitude(problem)
    bound = ascend(problem, first_point(problem, ranked(problem.weights, 300))).bound
    fast, best = solve_fast(problem).objective, solve_best(problem).objective
    assert usual - fast > 0.9 * (usual - bound)
    assert best <= fast + 1e-7 * abs(fast)


@EFFORTS
def test_the_same_twice_and_whatever_the_parts(solve):
    problem = made(first_order=0.3)
    first, second = solve(problem), solve(problem)
    assert torch.equal(first.values, second.values)
    for width in (13, 64):
        found = solve(replace(problem, rows=Parts(problem.rows.matrix, width)))
        assert torch.equal(found.support, first.support)
        assert torch.allclose(found.values, first.values, atol=1e-4)


def test_fast_sweeps_four_times_and_best_25_times_at_most():
    problem = made(first_order=0.3)
    solve_fast(problem)
    assert problem.rows.sweeps == 4
    problem.rows.sweeps = 0
    solve_best(problem)
    assert 15 <= problem.rows.sweeps <= 25


@EFFORTS
@pytest.mark.parametrize("keep", [0, 300])
def test_keeping_nothing_or_everything_takes_two_sweeps(solve, keep):
    problem = made(keep=keep, first_order=0.1)
    found = solve(problem)
    assert problem.rows.sweeps == 2
    assert int(found.support.sum()) == keep
    assert found.objective == pytest.approx(objective(problem, found.values), rel=1e-5)


@EFFORTS
def test_equal_weights_and_equal_columns(solve):
    rows = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 50)
    found = solve(Problem(torch.ones(50), MemoryRows(rows), 0.1, 20))
    assert int(found.support.sum()) == 20
    # 50 equal columns: what 20 weights must make up for is the same wherever they are.
    assert found.values[found.support].std() < 1e-5


@EFFORTS
def test_zero_rows_zero_columns_and_zero_weights(solve):
    problem = made()
    matrix = problem.rows.matrix.clone()
    matrix[2], matrix[:, ::3] = 0, 0
    weights = problem.weights.clone()
    weights[::2] = 0
    for keep in (20, 200):
        found = solve(Problem(weights, MemoryRows(matrix), 0.1, keep))
        assert int(found.support.sum()) == keep
        assert torch.isfinite(found.values).all()
    weights = problem.weights
    nothing = solve(Problem(weights, MemoryRows(torch.zeros_like(matrix)), 0.1, 60))
    assert torch.equal(nothing.support, ranked(weights, 60).support)
    assert torch.equal(nothing.values, weights * nothing.support)


@EFFORTS
def test_bf16_rows_are_their_own_problem(solve):
    problem = made()
    short = problem.rows.matrix.bfloat16()
    wide = solve(replace(problem, rows=MemoryRows(short.float())))
    found = solve(replace(problem, rows=MemoryRows(short)))
    assert found.values.dtype == torch.float32
    assert torch.equal(found.support, wide.support)
    assert torch.allclose(found.values, wide.values, atol=1e-5)


@EFFORTS
def test_rows_that_are_not_finite_are_refused(solve):
    problem = made()
    problem.rows.matrix[3, 5] = math.nan
    with pytest.raises(NonFiniteError, match="rows of the problem"):
        solve(problem)


def test_a_support_worse_than_magnitude_is_not_returned():
    problem = made()
    magnitude = ranked(problem.weights, problem.keep).support
    worst = ~ranked(problem.weights, len(magnitude) - problem.keep).support
    found = finish(problem, Dual.of(problem, worst), worst, magnitude)
    assert torch.equal(found.support, magnitude)
    # Products of rows run in float32, whose rounding is another on every kind of processor.
    assert found.objective == pytest.approx(objective(problem, found.values), rel=1e-5)


# --- several processes ---


class Meeting:
    """Where threads that stand for processes add up what they have."""

    def __init__(self, count):
        self._barrier = threading.Barrier(count, timeout=30)
        self._given = [None] * count

    def sum(self, rank, tensor):
        self._given[rank] = tensor
        self._barrier.wait()
        total = sum(self._given)
        self._barrier.wait()
        return total


class Shared(Rows):
    """Every second part of some rows."""

    def __init__(self, matrix, rank, meeting):
        self.n, self.p = matrix.shape
        self._all, self._rank, self._meeting = Parts(matrix, 50), rank, meeting

    def _owned(self):
        return [part for i, part in enumerate(self._all.parts()) if i % 2 == self._rank]

    def parts(self):
        self.sweeps += 1
        yield from self._owned()

    def add_up(self, tensor):
        return self._meeting.sum(self._rank, tensor)

    def fill(self, vector):
        own = torch.zeros_like(vector)
        for start, part in self._owned():
            own[start : start + part.shape[1]] = vector[start : start + part.shape[1]]
        return vector.copy_(self._meeting.sum(self._rank, own))


@EFFORTS
def test_two_processes_find_what_one_finds(solve):
    problem = made(first_order=0.2)
    alone, meeting, found = solve(problem), Meeting(2), [None, None]

    def run(rank):
        rows = Shared(problem.rows.matrix, rank, meeting)
        found[rank] = solve(replace(problem, rows=rows))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        assert torch.equal(one.support, alone.support)
        assert torch.allclose(one.values, alone.values, atol=1e-4)
        assert one.objective == pytest.approx(alone.objective, rel=1e-5)
