"""Staged backward elimination: exact counts, and one weight at a time is exact elimination."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.solver import elimination
from vlp_plugins.methods.chita.solver.blocks import Task, by_blocks
from vlp_plugins.methods.chita.solver.elimination import STAGES, eliminate
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.published import solve_published


def solve_elimination(problem, stages=STAGES):
    task = Task(problem, problem.largest(), partial(eliminate, stages=stages))
    return by_blocks([task])[0].solution()


def made(n=8, p=60, seed=0, bounds=(0, 20, 20, 45, 60), keep=20, ridge=1e-3, first_order=0.0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(p, generator=generator)
    rows = torch.randn(n, p, generator=generator) * torch.rand(p, generator=generator)
    return Problem(weights, MemoryRows(rows, bounds), ridge, keep, first_order, bounds)


def refit(rows, weights, inside, ridge, c):
    """The minimiser of one block on a support, by its normal equations in float64."""
    rows, weights = rows.double(), weights.double()
    kept = rows[:, inside]
    r = len(rows) * ridge
    right = kept.T @ (rows @ weights) + r * weights[inside] - c * kept.sum(0)
    left = kept.T @ kept + r * torch.eye(int(inside.sum()), dtype=torch.float64)
    values = torch.zeros_like(weights)
    values[inside] = torch.linalg.solve(left, right)
    return values


def block_objective(rows, weights, values, ridge, c):
    change = values - weights.double()
    moved = rows.double() @ change
    return float(
        moved @ moved / 2
        + len(rows) * ridge / 2 * change @ change
        + c * (rows.double() @ values).sum()
    )


@pytest.mark.parametrize("first_order", [0.0, 0.25])
@pytest.mark.parametrize("n", [5, 40])
def test_one_weight_at_a_time_is_exact_backward_elimination(n, first_order):
    bounds = (0, 12)
    problem = made(n=n, p=12, bounds=bounds, keep=5, first_order=first_order)
    rows, weights = problem.rows.matrix, problem.weights
    inside = torch.ones(12, dtype=torch.bool)
    while int(inside.sum()) > problem.keep:
        costs = []
        for j in inside.nonzero()[:, 0].tolist():
            without = inside.clone()
            without[j] = False
            values = refit(rows, weights, without, problem.ridge, first_order)
            costs.append((block_objective(rows, weights, values, problem.ridge, first_order), j))
        inside[min(costs)[1]] = False

    found = solve_elimination(problem, stages=200)

    assert torch.equal(found.support, inside)
    expected = refit(rows, weights, inside, problem.ridge, first_order)
    assert torch.allclose(found.values.double(), expected, atol=1e-5)


@pytest.mark.parametrize("stages", [1, 3, 16])
@pytest.mark.parametrize("keep", [0, 1, 20, 59, 60])
@pytest.mark.parametrize("n", [8, 50])
def test_counts_are_exact_and_the_objective_is_that_of_the_values(n, stages, keep):
    problem = made(n=n, keep=keep, first_order=0.1)

    found = solve_elimination(problem, stages)

    assert int(found.support.sum()) == keep
    assert not bool(found.values[~found.support].any())
    assert found.objective == pytest.approx(objective(problem, found.values), rel=1e-5)


@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 1.0])
def test_blocks_keep_as_many_as_magnitude_leaves_them(ridge):
    problem = made(ridge=ridge)
    magnitude = solve_published(problem).support

    found = solve_elimination(problem)

    for start, stop in ((0, 20), (20, 45), (45, 60)):
        assert int(found.support[start:stop].sum()) == int(magnitude[start:stop].sum())


def test_more_stages_find_a_lower_objective_of_the_blocks():
    def blocks_objective(problem, values):
        parts = [slice(0, 20), slice(20, 45), slice(45, 60)]
        return sum(
            block_objective(
                problem.rows.matrix[:, part], problem.weights[part], values[part].double(),
                problem.ridge, 0.0,
            )
            for part in parts
        )  # fmt: skip

    gains = []
    for seed in range(10):
        problem = made(seed=seed)
        found = [blocks_objective(problem, solve_elimination(problem, t).values) for t in (1, 16)]
        magnitude = blocks_objective(problem, solve_published(problem).values)
        assert found[1] < magnitude
        gains.append(found[0] - found[1])
    assert sum(gains) > 0


def test_weights_that_are_zero_stay_removed():
    problem = made(keep=15)
    problem.weights[::2] = 0

    found = solve_elimination(problem)

    assert not bool(found.support[::2].any())
    assert int(found.support.sum()) == 15


def test_small_parts_change_nothing():
    problem = made()
    parts = MemoryRows(problem.rows.matrix, problem.bounds)
    parts._cuts = [0, 20, 45, 60]
    split = Problem(problem.weights, parts, problem.ridge, problem.keep, 0.0, problem.bounds)

    whole, found = solve_elimination(problem), solve_elimination(split)

    assert torch.equal(whole.support, found.support)
    assert torch.allclose(whole.values, found.values, atol=1e-6)
    assert parts.sweeps == 1


def test_leverages_of_many_rows_are_estimated_with_nearly_the_same_objective(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    matrix, weights = torch.randn(200, 1_600, generator=draw), torch.randn(1_600, generator=draw)
    problem = Problem(weights, MemoryRows(matrix, (0, 1_600)), 0.01, 400, bounds=(0, 1_600))
    exact = solve_elimination(problem)
    monkeypatch.setattr(elimination, "MANY_ROWS", 199)

    found = solve_elimination(problem)

    assert not torch.equal(found.values, exact.values)
    assert int(found.support.sum()) == 400
    assert found.objective == pytest.approx(exact.objective, rel=0.02)
    assert found.objective == pytest.approx(objective(problem, found.values), rel=1e-5)
    assert torch.equal(solve_elimination(problem).values, found.values)


def test_blocks_of_many_rows_are_larger_by_default():
    default = Settings()
    assert [default.for_rows(n).block_size for n in (32, 512, 1_000)] == [2_000, 2_000, 16_000]
    assert Settings(block_size=300).for_rows(1_000).block_size == 300
    assert Settings(block_size=None).for_rows(1_000).block_size is None


def test_gram_matrices_of_many_rows_are_made_once_for_all_lambdas(monkeypatch):
    monkeypatch.setattr(elimination, "MANY_ROWS", 7)
    first, again = made(), made(ridge=1e-5)
    solve_elimination(first)
    held = {key: system for key, (_, system) in first.rows.held.items()}
    assert {edge for key in held for edge in key} == {0, 20, 45, 60}
    assert sum(each.nbytes for each in held.values()) == elimination.held_bytes(8, 3, 1)
    shared = replace(first, ridge=1e-5)

    found, alone = solve_elimination(shared), solve_elimination(again)

    assert all(shared.rows.held[key][1] is system for key, system in held.items())
    assert torch.equal(found.values, alone.values)
    assert found.objective == alone.objective


def test_a_gram_matrix_of_other_columns_is_not_used(monkeypatch):
    monkeypatch.setattr(elimination, "MANY_ROWS", 7)
    first, fresh = made(), made()
    solve_elimination(first)
    for problem in (first, fresh):
        problem.weights[::2] = 0

    found, alone = solve_elimination(first), solve_elimination(fresh)

    assert torch.equal(found.values, alone.values)


def test_columns_move_up_in_pieces_as_they_do_in_one(monkeypatch):
    one = solve_elimination(made(first_order=0.1))
    monkeypatch.setattr(elimination, "_ELEMENTS", 50)  # six columns at a time

    found = solve_elimination(made(first_order=0.1))

    assert torch.equal(found.support, one.support)
    assert torch.allclose(found.values, one.values, atol=1e-6)
