"""effort="fast": one Newton step of the relaxed problem, then exchanges near the line in memory."""

from __future__ import annotations

from vlp_plugins.solvers.finish import finish
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.ranked import ranked
from vlp_plugins.solvers.search import first_point, polished

NEAR_PER_ROW = 8


def solve_fast(problem: Problem) -> Solution:
    """A support and its weights in four sweeps over the rows, whatever the number of weights.

    1. a Newton step of the Lagrangian dual from u = 0, where z = v (`relaxed.newton_direction`);
    2. z = v + A'u: its k largest entries are the support;
    3. the dual of the support, and the 16 n columns next to the line, which stay in memory: kept
       and pruned ones are exchanged by exact costs and gains until none helps;
    4. the weights. Two more sweeps follow if magnitude might do better, which is rare (`finish`).

    Keeping everything or nothing takes two sweeps. Beside vectors of the length of the weights, the
    columns next to the line are all that is held: 34 MB at n = 512 in float64.

    Args:
        problem: see `Problem`; its blocks play no part.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
    """
    near = NEAR_PER_ROW * problem.rows.n
    magnitude = ranked(problem.weights.float(), problem.keep)
    chosen = magnitude
    if 0 < problem.keep < problem.rows.p:
        chosen = ranked(first_point(problem, magnitude).z, problem.keep, near)
    found = polished(problem, chosen)
    return finish(problem, found.dual, found.support, magnitude.support)
