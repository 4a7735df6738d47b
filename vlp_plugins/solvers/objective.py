"""F of a problem, evaluated in float64."""

from __future__ import annotations

import torch

from vlp_plugins.solvers.problem import Problem

_WIDTH = 1 << 14  # columns in work at a time: a part in float64 may not fit


def objective(problem: Problem, values: torch.Tensor) -> float:
    """F of the full problem; one sweep over the rows.

    Args:
        problem: see `Problem`; its blocks play no part.
        values: `[p]`.
    """
    change = values.double() - problem.weights.double()
    moved = change.new_zeros(problem.rows.n)
    linear = change.new_zeros(())
    for first, part in problem.rows.parts():
        for start in range(0, part.shape[1], _WIDTH):
            exact = part[:, start : start + _WIDTH].double()
            columns = slice(first + start, first + start + exact.shape[1])
            moved += exact @ change[columns]
            if problem.first_order:
                linear += (exact @ values[columns].double()).sum()
    moved, linear = problem.rows.add_up(moved), problem.rows.add_up(linear)
    ridge = problem.rows.n * problem.ridge
    quadratic = moved @ moved / 2 + ridge / 2 * (change @ change)
    return float(quadratic + problem.first_order * linear)
