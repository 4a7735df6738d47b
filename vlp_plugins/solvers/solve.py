"""The solvers of a problem by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vlp_plugins.runtime.errors import UnsupportedError, suggest
from vlp_plugins.solvers.best import solve_best
from vlp_plugins.solvers.blockwise import solve_blockwise
from vlp_plugins.solvers.elimination import solve_elimination
from vlp_plugins.solvers.fast import solve_fast
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.published import solve_published

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
