"""solve(): every effort by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from vlp_plugins.methods.chita.solver.blocks import Part, by_blocks
from vlp_plugins.methods.chita.solver.elimination import solve_elimination
from vlp_plugins.methods.chita.solver.gram import weighted_sum, widened
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem, Solution
from vlp_plugins.methods.chita.solver.published import solve_published, starting_point
from vlp_plugins.methods.chita.solver.search import solve_best, solve_fast
from vlp_plugins.runtime.errors import UnsupportedError, suggest
from vlp_plugins.runtime.parallel import over_tensors

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
    return solve_blockwise(problem, _SEARCHES[effort])


def solve_blockwise(problem: Problem, search: Callable[[Problem], Solution]) -> Solution:
    """Solves every block as a full problem of its own, all in memory while its part is.

    Blocks keep as many weights as in the start of the published solver: one threshold over the
    whole vector, `keep` in all. One sweep over the rows; with a first-order term one more, or two,
    for that start.

    Args:
        problem: with block bounds.
        search: a solver of full problems.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
        NonFiniteError: if the rows hold NaN or infinity.
    """

    def search_part(part: Part) -> torch.Tensor:
        return torch.stack(
            over_tensors(partial(search_block, part), part.blocks, part.matrix.device)
        ).sum(0)

    def search_block(part: Part, span: slice) -> torch.Tensor:
        matrix, weights = widened(part.matrix[:, span]).contiguous(), part.weights[span]
        keep = int(part.support[span].count_nonzero())
        alone = Problem(weights, MemoryRows(matrix), problem.ridge, keep, problem.first_order)
        found = search(alone)
        part.values[span], part.support[span] = found.values, found.support
        change = found.values.double() - weights.double()
        moved = weighted_sum(matrix.double(), change)
        dense = weighted_sum(matrix, weights).sum()
        return torch.cat((moved, torch.stack((change @ change, dense))))

    return by_blocks(problem, starting_point(problem).support, search_part)


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
