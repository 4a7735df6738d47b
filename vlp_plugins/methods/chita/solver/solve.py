"""solve(): every effort by name, the published solver among them.

A start support, for the block-diagonal approximation a step inside every block, and the exact
weights on what was found. Defects that are not shared: blocks zeroed where the line search finds
nothing better, division by zero, blocks that keep everything or nothing, ties that keep fewer than
asked for, float32 solves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch

from vlp_plugins.methods.chita.solver.blocks import (
    edges_of,
    full_objective,
    solve_blocks,
    solve_blockwise,
)
from vlp_plugins.methods.chita.solver.dual import Dual
from vlp_plugins.methods.chita.solver.elimination import solve_elimination
from vlp_plugins.methods.chita.solver.problem import Problem, Solution
from vlp_plugins.methods.chita.solver.search import solve_best, solve_fast
from vlp_plugins.methods.chita.solver.start import Start, starting_point, stepped_support
from vlp_plugins.runtime.errors import UnsupportedError, suggest


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


Effort = Literal["fast", "published", "best"]

_SEARCHES: dict[str, Callable[[Problem], Solution]] = {"fast": solve_fast, "best": solve_best}


def solve(problem: Problem, effort: Effort = "fast") -> Solution:
    """Chooses the weights that stay and solves for them.

    `published` is the solver of Benbaki et al. (ICML 2023) without its defects. `fast` and `best`
    search for a better support, `fast` in four sweeps over the rows, `best` in 25 at most; the
    objective of neither is above that of the largest weights, solved for exactly.

    A problem with block bounds is solved block by block in one sweep (`best` and `published` make
    up to two more for a first-order term). There `fast` is staged backward elimination
    (`elimination`), made for the model rather than for the objective.

    Args:
        problem: see `Problem`.
        effort: `fast`, `published` or `best`.

    Raises:
        UnsupportedError: if the effort is none of these, the rows come in parts that cut blocks,
            or lambda is so small that float64 cannot tell it from rounding errors; and see
            `check_importance`.
        NonFiniteError: if the rows hold NaN or infinity.
    """
    if effort == "published":
        return solve_published(problem)
    if effort not in _SEARCHES:
        known = [*_SEARCHES, "published"]
        raise UnsupportedError(f"there is no effort {effort!r}{suggest(effort, known)}")
    if problem.bounds is None:
        check_importance(problem.importance is not None, effort, None)
        return _SEARCHES[effort](problem)
    if effort == "fast":
        return solve_elimination(problem)
    return solve_blockwise(problem, problem.bounds, _SEARCHES[effort])


def check_importance(weighed: bool, effort: Effort, block_size: int | None) -> None:
    """Makes sure that factors of the columns have something to multiply.

    Raises:
        UnsupportedError: if the support is searched over the whole vector by the objective alone.
    """
    if weighed and block_size is None and effort in _SEARCHES:
        raise UnsupportedError(
            f"without blocks effort {effort!r} searches the support over all weights by the "
            "objective, where a factor of their importance has no meaning; give a block size, or "
            "effort='published'"
        )
