"""effort="best": the relaxed problem to its end, then exchanges until none near the line helps."""

from __future__ import annotations

import logging

from vlp_plugins.solvers.ascent import ascend
from vlp_plugins.solvers.fast import NEAR_PER_ROW as NEAR_IN_FAST
from vlp_plugins.solvers.finish import finish
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.ranked import beside, ranked
from vlp_plugins.solvers.relaxed import shifts
from vlp_plugins.solvers.search import Candidate, first_point, polished

logger = logging.getLogger(__name__)

_NEAR_PER_ROW = 32
_LEAST_NEAR = 1024
_ROUNDS = 3
_SMALL = 1e-9


def solve_best(problem: Problem) -> Solution:
    """The best support we can find; a bound that is logged says how far from the optimum at most.

    Two supports are tried: that of `fast` (3 sweeps over the rows), and the k largest entries of z
    at the maximum of the Lagrangian dual (`ascent.ascend`, 14 sweeps, and one more); exchanges of
    many weights and of pairs within the 64 n columns next to the line (2048 at least). The better
    one goes through up to 3 more rounds of them, with a new band (two sweeps each), and one sweep
    gives the weights: 25 in all at most, and two more where magnitude might do better (`finish`).

    Args:
        problem: see `Problem`; its blocks play no part.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
    """
    near = max(_LEAST_NEAR, _NEAR_PER_ROW * problem.rows.n)
    magnitude = ranked(problem.weights.float(), problem.keep)
    if problem.keep in (0, problem.rows.p):
        found = polished(problem, magnitude)
        return finish(problem, found.dual, found.support, magnitude.support)
    first = first_point(problem, magnitude)
    # The same band as in `fast`, whose result is then never better than this one.
    chosen = ranked(first.z, problem.keep, NEAR_IN_FAST * problem.rows.n)
    found = polished(problem, chosen, pairs=True)
    top = ascend(problem, first)
    other = polished(problem, ranked(top.z, problem.keep, near), pairs=True)
    found = min(found, other, key=lambda candidate: candidate.dual.objective)
    for _ in range(_ROUNDS):
        again = _again(problem, found, near)
        found = again
        if again.better <= _SMALL * abs(again.dual.objective):
            break
    logger.info("F is %.9g, and at least %.9g for any support", found.dual.objective, top.bound)
    return finish(problem, found.dual, found.support, magnitude.support)


def _again(problem: Problem, found: Candidate, near: int) -> Candidate:
    """Another round of exchanges, next to the line of what was found; two sweeps over the rows."""
    z = problem.weights + shifts(problem, found.dual.solution)
    return polished(problem, beside(z, found.support, near), pairs=True)
