"""The dual of a support against the k x k normal equations and brute force, in float64."""

from dataclasses import replace

import pytest
import torch

from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.solver import problem as rows_module
from vlp_plugins.methods.chita.solver.dual import Band, Dual, adding_gains, removal_costs
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem

N, P = 12, 40


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(rows_module, "_VIEW", 9 * N)


def made(ridge=0.1, first_order=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, P, generator=generator)
    weights = torch.randn(P, generator=generator)
    return Problem(weights, MemoryRows(rows), ridge, P // 2, first_order)


def support_of(k, seed=0):
    support = torch.zeros(P, dtype=torch.bool)
    support[torch.randperm(P, generator=torch.Generator().manual_seed(seed))[:k]] = True
    return support


def by_normal_equations(problem, support):
    """Weights and F of a support: gradient zero on it, solved in the primal."""
    rows, v = problem.rows.matrix.double(), problem.weights.double()
    r, kept = problem.rows.n * problem.ridge, rows[:, support]
    left = kept.T @ kept + r * torch.eye(kept.shape[1], dtype=torch.float64)
    right = kept.T @ (rows @ v) + r * v[support] - problem.first_order * kept.sum(0)
    values = torch.zeros_like(v)
    values[support] = torch.linalg.solve(left, right)
    change = values - v
    moved = rows @ change
    linear = problem.first_order * (rows @ values).sum()
    return values, float(moved @ moved / 2 + r / 2 * change @ change + linear)


@pytest.mark.parametrize("k", [0, 1, N - 3, N, 30, P])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("first_order", [0.0, 0.25])
def test_weights_and_objective_are_those_of_the_normal_equations(k, ridge, first_order):
    problem, support = made(ridge, first_order), support_of(k)
    expected, lowest = by_normal_equations(problem, support)

    dual = Dual.of(problem, support)
    values = dual.values(problem, support)

    scale = abs(lowest) + abs(objective(problem, torch.zeros(P)))
    assert dual.objective == pytest.approx(lowest, rel=1e-5, abs=1e-6 * scale)
    assert objective(problem, values) == pytest.approx(lowest, rel=1e-5, abs=1e-6 * scale)
    assert values.dtype == torch.float32
    assert not values[~support].any()
    if ridge >= 1e-3:
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_small_ridges_do_not_divide_rounding_errors():
    """Woodbury's identity in float32, as published, is off by orders of magnitude at 1e-5."""
    generator = torch.Generator().manual_seed(0)
    n, p, ridge = 64, 3000, 1e-5
    rows = torch.randn(n, p, generator=generator)
    weights = torch.randn(p, generator=generator)
    problem = Problem(weights, MemoryRows(rows), ridge, p // 10)
    support = torch.zeros(p, dtype=torch.bool)
    support[weights.abs().topk(p // 10).indices] = True
    _, lowest = by_normal_equations(problem, support)
    r, kept = n * ridge, rows[:, support]
    right = kept.T @ (rows @ weights) + r * weights[support]
    inner = torch.linalg.solve(r * torch.eye(n) + kept @ kept.T, kept @ right)
    published = torch.zeros(p)
    published[support] = (right - kept.T @ inner) / r
    assert objective(problem, published) > 10 * lowest

    dual = Dual.of(problem, support)

    assert dual.objective == pytest.approx(lowest, rel=1e-5)
    assert objective(problem, dual.values(problem, support)) == pytest.approx(lowest, rel=1e-5)


@pytest.mark.parametrize("k", [5, 15])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("first_order", [0.0, 0.25])
def test_removal_costs_and_adding_gains_are_exact(k, ridge, first_order):
    problem, support = made(ridge, first_order), support_of(k)
    dual = Dual.of(problem, support)
    rows, r = problem.rows.matrix.double(), N * ridge
    z = problem.weights + rows.T @ dual.solution
    h = (dual.whitener @ rows).square().sum(0)

    costs, gains = removal_costs(z, h, r), adding_gains(z, h, r)

    _, before = by_normal_equations(problem, support)
    for j in range(P):
        other = support.clone()
        other[j] = ~other[j]
        expected = by_normal_equations(problem, other)[1] - before
        found = float(costs[j]) if support[j] else -float(gains[j])
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), j


def test_exchanged_columns_give_the_dual_of_the_new_support():
    problem, before, after = made(0.01, 0.25), support_of(15), support_of(15, seed=1)
    band = Band(problem.rows.matrix.double(), problem.weights.double())
    left, joined = (
        (one & ~other).nonzero()[:, 0] for one, other in ((before, after), (after, before))
    )
    expected = Dual.of(problem, after)

    found = Dual.of(problem, before).exchanged(band, left, joined)

    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.target, expected.target, rtol=1e-6, atol=1e-5)
    assert found.pruned == pytest.approx(expected.pruned, rel=1e-6)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)


def test_a_dual_takes_one_sweep_and_its_values_another():
    problem, support = made(), support_of(9)

    dual = Dual.of(problem, support)
    assert (problem.rows.sweeps, dual.objective > 0) == (1, True)
    dual.values(problem, support)

    assert problem.rows.sweeps == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_may_be_of_another_dtype(dtype):
    problem, support = made(), support_of(20)
    matrix = problem.rows.matrix.to(dtype)
    exact = replace(problem, rows=MemoryRows(matrix.float()))

    found = Dual.of(replace(problem, rows=MemoryRows(matrix)), support)

    assert found.objective == pytest.approx(Dual.of(exact, support).objective, rel=1e-5)
