"""The Lagrangian dual of the whole problem, and its maximum by Newton steps.

For any u `[n]`, with z = v + A'u and r = n lambda,

    D(u) = - r/2 (sum of the k largest z_j^2) + r u'(A v - c 1) - r^2/2 |u|^2
           + r/2 |v|^2 + c 1'A v - n c^2/2

is at most F of every vector with k non-zeros. D is concave, and by the Shapley-Folkman theorem at
most n + 1 weights make the difference between its maximum and the least F: the k largest |z_j| at
the maximum are a near-optimal support, and what remains to be decided lies near their threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlp_plugins.methods.chita.solver.gram import (
    check_finite,
    factor,
    gram,
    pick_columns,
    weighted_sum,
)
from vlp_plugins.methods.chita.solver.problem import Problem, Ranked, ranked

_LEAST_SLOPE = 0.2
_ROUGH = 1e3
"""How much less exact than that of a support the Gram matrix of a direction may be."""


@dataclass(frozen=True)
class Point:
    """A point of the dual.

    Attributes:
        u: float64 `[n]`.
        z: `v + A'u`, float32 `[p]`.
    """

    u: torch.Tensor
    z: torch.Tensor


@dataclass(frozen=True)
class Direction:
    """A Newton step of the dual.

    Attributes:
        step: d, float64 `[n]`.
        dense: A v, float64 `[n]`.
    """

    step: torch.Tensor
    dense: torch.Tensor


def newton_direction(problem: Problem, point: Point, chosen: Ranked, width: float) -> Direction:
    """The Newton step from u for a dual whose corners are smoothed; one sweep over the rows.

    The gradient of D is r (A (v - w) - c 1 - r u), w = z on the support and 0 elsewhere. It jumps
    wherever some |z_j| crosses the threshold, so that its derivative says nothing of those that
    will cross. We take its mean slope over a normal spread of z instead (`slopes`).

    Args:
        problem: see `Problem`; its blocks play no part.
        point: where to start from.
        chosen: the `keep` largest of z.
        width: standard deviation of the spread, as a share of the threshold.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
    """
    rows, ridge, u, z = problem.rows, problem.rows.n * problem.ridge, point.u, point.z
    matrix, sums = torch.zeros_like(u).diag(), u.new_zeros((rows.n, 2))
    for start, part in rows.parts():
        columns = slice(start, start + part.shape[1])
        weights = slopes(z[columns], chosen.threshold, width)
        active = (weights >= _LEAST_SLOPE).nonzero()[:, 0]
        matrix += gram(pick_columns(part, active) * weights[active].sqrt(), _ROUGH * ridge)
        kept = z[columns].masked_fill(~chosen.support[columns], 0)
        sums += weighted_sum(part, torch.stack((problem.weights[columns].to(kept), kept), 1))
    matrix, sums = rows.add_up(matrix), rows.add_up(sums)
    check_finite(matrix.sum() + sums.sum())
    matrix.diagonal().add_(ridge)
    gradient = sums[:, 0] - sums[:, 1] - problem.first_order - ridge * u
    step = torch.cholesky_solve(gradient[:, None], factor(matrix))[:, 0]
    return Direction(step, sums[:, 0])


def slopes(z: torch.Tensor, threshold: float, width: float) -> torch.Tensor:
    """Mean derivative of hard thresholding over a normal spread of its argument.

    With x = (|z| / t - 1) / s, t the threshold and s the width, it is Phi(x) + phi(x) / s: 1 far
    above the threshold, 0 far below, and above 1 near it, where weights come and go as a whole.

    Args:
        z: float32 `[m]`.
        threshold: t; at 0 or below everything is kept, and the derivative is 1.
        width: s.
    """
    if not threshold > 0:
        return torch.ones_like(z)
    x = (z.abs() / threshold - 1) / width
    density = x.square().mul_(-0.5).exp_().mul_(1 / (math.sqrt(2 * math.pi) * width))
    return torch.special.ndtr(x).add_(density)


def shifts(problem: Problem, u: torch.Tensor) -> torch.Tensor:
    """A'u, float32 `[p]`; one sweep over the rows."""
    total = torch.zeros_like(problem.weights, dtype=torch.float32)
    for start, part in problem.rows.parts():
        total[start : start + part.shape[1]] = part.float().T @ u.float()
    return problem.rows.fill(total)


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
    """D(u), see the module; no sweep.

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
