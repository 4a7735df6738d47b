"""The maximum of the Lagrangian dual, by Newton steps of ever sharper corners."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.ranked import ranked
from vlp_plugins.solvers.relaxed import Point, newton_direction, shifts

_WIDTHS = (0.15, 0.1, 0.07, 0.05, 0.05, 0.03, 0.03)
_LENGTHS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Top:
    """Where the dual is nearly greatest.

    Attributes:
        z: `v + A'u`, float32 `[p]`.
        bound: D(u): no support has a lower F.
    """

    z: torch.Tensor
    bound: float


def ascend(problem: Problem, point: Point) -> Top:
    """Climbs D by 7 Newton steps at most; two sweeps over the rows for each.

    A step that does not raise D even at an eighth of its length is left out; the next one is
    sharper. z is kept up to date by adding A'd, so that no length costs a sweep.

    Args:
        problem: see `Problem`; its blocks play no part. `keep` is neither 0 nor p.
        point: where to start.
    """
    bound, failed = -float("inf"), 0.0
    for width in _WIDTHS:
        if width == failed:
            continue  # the same point and width would give the same direction
        direction = newton_direction(problem, point, ranked(point.z, problem.keep), width)
        if bound == -float("inf"):
            bound = dual_value(problem, point, direction.dense)
        shift = shifts(problem, direction.step)
        for length in _LENGTHS:
            there = Point(point.u + length * direction.step, point.z + length * shift)
            raised = dual_value(problem, there, direction.dense)
            if raised > bound:
                point, bound = there, raised
                break
        else:
            failed = width
    return Top(point.z, bound)


def dual_value(problem: Problem, point: Point, dense: torch.Tensor) -> float:
    """D(u), see `relaxed`; no sweep.

    Args:
        problem: see `Problem`.
        point: u and z = v + A'u.
        dense: A v, float64 `[n]`.
    """
    n, c, ridge = problem.rows.n, problem.first_order, problem.rows.n * problem.ridge
    kept = point.z[ranked(point.z, problem.keep).support]
    squares = _square(problem.weights) - _square(kept)
    linear = ridge * float(point.u @ (dense - c)) + c * float(dense.sum())
    return ridge / 2 * squares - ridge**2 / 2 * float(point.u @ point.u) + linear - n * c**2 / 2


def _square(vector: torch.Tensor) -> float:
    return float(vector.square().sum(dtype=torch.float64))
