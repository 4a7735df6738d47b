"""The solvers by name, on whole problems and block by block."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_elimination import solve_elimination

from benchmarks.parity.chita_problems import objective
from vlp_plugins.methods.chita.solver.blocks import by_blocks
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.chita.solver.published import starting_points
from vlp_plugins.methods.chita.solver.search import solve_best, solve_fast
from vlp_plugins.methods.chita.solver.solve import searched, solve
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError

BOUNDS = (0, 40, 40, 100, 101, 240)


def made(n=6, p=240, keep=50, bounds=BOUNDS, first_order=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(p, generator=generator)
    rows = torch.randn(n, p, generator=generator) * torch.rand(p, generator=generator)
    rows = MemoryRows(rows.to(dtype), bounds)
    return Problem(weights, rows, 1e-2, keep, first_order, bounds)


def alone(problem, start, stop, keep):
    rows = MemoryRows(problem.rows.matrix[:, start:stop])
    return Problem(problem.weights[start:stop], rows, problem.ridge, keep, problem.first_order)


def test_fast_is_the_default():
    problem = made(bounds=None)
    assert torch.equal(solve(problem).values, solve(problem, "fast").values)


def test_no_effort_is_above_a_lesser_one():
    problem = made(bounds=None, first_order=0.2)
    published, fast, best = (solve(problem, e).objective for e in ("published", "fast", "best"))
    assert best <= fast < published


@pytest.mark.parametrize(("effort", "hint"), [("bset", "'best'"), ("", "known: best, fast")])
def test_an_unknown_effort_is_named(effort, hint):
    with pytest.raises(UnsupportedError, match=f"no effort '{effort}'.*{hint}"):
        solve(made(), effort)


def blockwise(problem, search):
    """Every block searched as a full problem of its own."""
    [start] = starting_points([problem])
    return by_blocks([searched(search, start)])[0].solution()


def test_blocks_are_eliminated_at_fast_and_searched_at_best():
    problem = made(first_order=0.1)
    assert torch.equal(solve(problem, "fast").values, solve_elimination(problem).values)
    assert torch.equal(solve(problem, "best").values, blockwise(problem, solve_best).values)


@pytest.mark.parametrize("search", [solve_fast, solve_best])
@pytest.mark.parametrize("first_order", [0.0, 0.3])
def test_every_block_is_a_problem_of_its_own(search, first_order):
    problem = made(first_order=first_order)
    found = blockwise(problem, search)
    start = starting_points([problem])[0].support
    assert int(found.support.sum()) == problem.keep
    for first, last in pairwise(BOUNDS):
        keep = int(start[first:last].sum())
        assert int(found.support[first:last].sum()) == keep
        if last > first:
            expected = search(alone(problem, first, last, keep))
            assert torch.equal(found.values[first:last], expected.values)
    assert found.objective == pytest.approx(objective(problem, found.values), rel=1e-5)


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_blocks_take_one_sweep_without_first_order_term(effort):
    problem = made()
    solve(problem, effort)
    assert problem.rows.sweeps == 1


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("keep", [0, 1, 239, 240])
def test_blocks_that_keep_nothing_or_everything(effort, keep):
    found = solve(made(keep=keep), effort)
    assert int(found.support.sum()) == keep
    assert torch.isfinite(found.values).all()


def test_blocks_of_bf16_rows():
    short = made(dtype=torch.bfloat16)
    wide = Problem(
        short.weights,
        MemoryRows(short.rows.matrix.float(), BOUNDS),
        short.ridge,
        short.keep,
        bounds=BOUNDS,
    )
    assert torch.equal(solve(short).values, solve(wide).values)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("effort", ["fast", "published", "best"])
def test_rows_with_nan_are_refused(effort, bounds):
    problem = made(bounds=bounds)
    problem.rows.matrix[2, int(problem.weights.abs().argmin())] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        solve(problem, effort)


@pytest.mark.parametrize("effort", ["fast", "published", "best"])
def test_a_lambda_below_rounding_is_refused(effort):
    problem = replace(made(n=64, keep=5, bounds=None), bounds=(0, 240), ridge=1e-30)
    with pytest.raises(UnsupportedError, match="lambda is too small"):
        solve(problem, effort)


@pytest.mark.parametrize("effort", ["fast", "published", "best"])
def test_solvers_run_in_inference_mode(effort, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = solve(made(), effort)
    with torch.inference_mode():
        found = solve(made(), effort)
    assert torch.equal(found.support, expected.support)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("effort", ["published", "fast", "best"])
def test_precision_of_gpus_set_by_the_newer_switch_changes_nothing(effort, bounds):
    problem = made(bounds=bounds, first_order=0.1)
    expected = solve(problem, effort)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        found = solve(problem, effort)
    finally:
        matmul.fp32_precision = before
    assert torch.equal(found.support, expected.support)
    assert torch.equal(found.values, expected.values)
