"""The published solver of CHITA (Benbaki et al., ICML 2023), without its defects.

A start support, for the block-diagonal approximation a step inside every block, and the exact
weights on what was found. Defects that are not shared: blocks zeroed where the line search finds
nothing better, division by zero, blocks that keep everything or nothing, ties that keep fewer than
asked for, float32 solves.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from vlp_plugins.solvers.block_step import stepped_support
from vlp_plugins.solvers.blocks import edges_of, full_objective, solve_blocks
from vlp_plugins.solvers.dual import Dual
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.start import Start, starting_point


def solve_published(problem: Problem) -> Solution:
    """The support and weights of the published solver, with exactly `keep` weights kept.

    Sweeps over the rows: one with blocks, two without. A first-order term adds one for its gradient
    step, and one more if that step would leave the start support.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
    """
    start = starting_point(problem)
    if problem.bounds is None:
        dual = Dual.of(problem, start.support)
        return Solution(dual.values(problem, start.support), start.support, dual.objective)
    return _by_blocks(problem, problem.bounds, start)


def _by_blocks(problem: Problem, bounds: tuple[int, ...], start: Start) -> Solution:
    rows = problem.rows
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    support = start.support
    sums = problem.weights.new_zeros(rows.n + 2, dtype=torch.float64)
    for first, part in rows.parts():
        columns = slice(first, first + part.shape[1])
        edges = edges_of(bounds, columns.start, columns.stop)
        weights = problem.weights[columns]
        if problem.first_order:
            _step(problem, part, weights, start.values[columns], support[columns], edges)
        values[columns], added = solve_blocks(problem, part, weights, support[columns], edges)
        sums += added
    if problem.first_order:
        support = rows.fill(support.to(torch.uint8)).bool()
    return Solution(rows.fill(values), support, full_objective(problem, rows.add_up(sums)))


def _step(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    support: torch.Tensor,
    edges: list[int],
) -> None:
    """Replaces the support of every block of a part by that after the published step."""
    for start, stop in pairwise(edges):
        inside = support[start:stop]
        support[start:stop] = stepped_support(
            part[:, start:stop],
            weights[start:stop],
            values[start:stop].masked_fill(~inside, 0),
            inside,
            problem.rows.n * problem.ridge,
            problem.first_order,
        )
