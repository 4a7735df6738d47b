"""solve(): every effort by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import torch

from vlp_plugins.methods.chita.solver.blocks import Part, Task, by_blocks
from vlp_plugins.methods.chita.solver.dual import weighted_sum, widened
from vlp_plugins.methods.chita.solver.elimination import eliminate
from vlp_plugins.methods.chita.solver.problem import (
    MemoryRows,
    Problem,
    Solution,
    largest_of,
)
from vlp_plugins.methods.chita.solver.published import (
    Start,
    solve_published,
    starting_points,
    stepped,
)
from vlp_plugins.methods.chita.solver.search import solve_best, solve_fast
from vlp_plugins.runtime.errors import UnsupportedError, suggest
from vlp_plugins.runtime.parallel import over_tensors

Effort = Literal["fast", "published", "best"]

_WITHOUT_BLOCKS: dict[Effort, Callable[[Problem], Solution]] = {
    "fast": solve_fast,
    "published": solve_published,
    "best": solve_best,
}


def solve(problem: Problem, effort: Effort = "fast") -> Solution:
    """Chooses the weights that stay and solves for them; see `solve_all`."""
    return next(solve_all([problem], effort))()


def solve_all(problems: Sequence[Problem], effort: Effort) -> Iterator[Callable[[], Solution]]:
    """Chooses the weights that stay and solves for them, in problems with the same rows.

    `published` is the solver of Benbaki et al. (ICML 2023) without its defects. `fast` and `best`
    search for a better support, `fast` in four sweeps over the rows, `best` in 25 at most; the
    objective of neither is above that of the largest weights, solved for exactly.

    Problems with block bounds are solved block by block, all of them in one sweep (`best` and
    `published` make up to two more for a first-order term). There `fast` is staged backward
    elimination (`elimination`), made for the model rather than for the objective.

    Args:
        problems: all with block bounds or all without, and of one first-order term.
        effort: `fast`, `published` or `best`.

    Yields:
        By problem, what gives its solution (a collective). Many with blocks are held packed.

    Raises:
        UnsupportedError: if the effort is none of these, the rows come in parts that cut blocks,
            or lambda is so small that float64 cannot tell it from rounding errors; and see
            `check_importance`.
        NonFiniteError: if the rows hold NaN or infinity.
    """
    if effort not in _WITHOUT_BLOCKS:
        raise UnsupportedError(
            f"there is no effort {effort!r}{suggest(effort, list(get_args(Effort)))}"
        )
    if problems[0].bounds is None:
        for problem in problems:
            check_importance(problem.importance is not None, effort, None)
            solution = _WITHOUT_BLOCKS[effort](problem)
            yield partial(_itself, solution)
        return
    if effort == "fast":
        pairs = zip(problems, largest_of(problems), strict=True)
        tasks = [Task(problem, support, eliminate) for problem, support in pairs]
    else:
        starts = starting_points(problems)
        of_effort = stepped if effort == "published" else partial(searched, solve_best)
        tasks = [of_effort(start) for start in starts]
    yield from (found.solution for found in by_blocks(tasks))


def _itself(solution: Solution) -> Solution:
    return solution


def searched(search: Callable[[Problem], Solution], start: Start) -> Task:
    """Every block as a full problem of its own, all in memory while its part is.

    Blocks keep as many weights as in the start of the published solver: one threshold over the
    whole vector, `keep` in all.

    Args:
        search: a solver of full problems.
        start: of a problem with block bounds.
    """

    def search_part(part: Part) -> torch.Tensor:
        return torch.stack(
            over_tensors(partial(search_block, part), part.blocks, part.matrix.device)
        ).sum(0)

    def search_block(part: Part, span: slice) -> torch.Tensor:
        problem = part.problem
        matrix, weights = widened(part.matrix[:, span]).contiguous(), part.weights[span]
        keep = int(part.support[span].count_nonzero())
        alone = Problem(weights, MemoryRows(matrix), problem.ridge, keep, problem.first_order)
        found = search(alone)
        part.values[span], part.support[span] = found.values, found.support
        change = found.values.double() - weights.double()
        moved = weighted_sum(matrix.double(), change)
        dense = weighted_sum(matrix, weights).sum()
        return torch.cat((moved, torch.stack((change @ change, dense))))

    return Task(start.problem, start.support, search_part)


def check_importance(weighed: bool, effort: Effort, block_size: int | None) -> None:
    """Makes sure that factors of the columns have something to multiply.

    Raises:
        UnsupportedError: if the support is searched over the whole vector by the objective alone.
    """
    if weighed and block_size is None and effort != "published":
        raise UnsupportedError(
            f"without blocks effort {effort!r} searches the support over all weights by the "
            "objective, where a factor of their importance has no meaning; give a block size, or "
            "effort='published'"
        )
