"""A search inside every block of the block-diagonal approximation, in one visit of the rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from vlp_plugins.runtime.parallel import over_tensors
from vlp_plugins.solvers.blocks import edges_of, full_objective
from vlp_plugins.solvers.columns import weighted_sum, widened
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.rows import MemoryRows
from vlp_plugins.solvers.start import starting_point


def solve_blockwise(
    problem: Problem, bounds: tuple[int, ...], solve: Callable[[Problem], Solution]
) -> Solution:
    """Solves every block as a full problem of its own, all in memory while its part is.

    Blocks keep as many weights as in the start of the published solver (`start.starting_point`):
    one threshold over the whole vector, `keep` in all. One sweep over the rows; with a first-order
    term one more, or two, for that start.

    Args:
        problem: what is to be solved.
        bounds: boundaries of its blocks.
        solve: a solver of full problems.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
        NonFiniteError: if the rows hold NaN or infinity.
    """
    rows, support = problem.rows, starting_point(problem).support
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    sums = torch.zeros(rows.n + 2, dtype=torch.float64, device=values.device)
    for first, part in rows.parts():
        columns = slice(first, first + part.shape[1])
        weights, inside, found = problem.weights[columns], support[columns], values[columns]

        def search(
            block: tuple[int, int],
            part: torch.Tensor = part,
            weights: torch.Tensor = weights,
            inside: torch.Tensor = inside,
            found: torch.Tensor = found,
        ) -> torch.Tensor:
            span = slice(*block)
            alone = _block_problem(problem, part[:, span], weights[span], inside[span])
            solution = solve(alone)
            found[span], inside[span] = solution.values, solution.support
            return _added_to_f(alone, solution)

        blocks = list(pairwise(edges_of(bounds, columns.start, columns.stop)))
        sums += torch.stack(over_tensors(search, blocks, part.device)).sum(0)
    support = rows.fill(support.to(torch.uint8)).bool()
    return Solution(rows.fill(values), support, full_objective(problem, rows.add_up(sums)))


def _block_problem(
    problem: Problem, part: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor
) -> Problem:
    """A block as a full problem that keeps as many weights as the start does there."""
    rows = MemoryRows(widened(part).contiguous())
    keep = int(inside.count_nonzero())
    return Problem(weights, rows, problem.ridge, keep, problem.first_order)


def _added_to_f(block: Problem, solution: Solution) -> torch.Tensor:
    """A (w - v), |w - v|^2 and 1'A v of a block, see `full_objective`; float64 `[n + 2]`."""
    change = solution.values.double() - block.weights.double()
    ((_, part),) = block.rows.parts()
    dense = weighted_sum(part, block.weights).sum()
    moved = weighted_sum(part.double(), change)
    return torch.cat((moved, torch.stack((change @ change, dense))))
