"""The gradient step with line search of the published solver, on columns that are in memory.

Benbaki et al., ICML 2023, algorithm 1 as their code runs it. Two defects of that code are left out:
where no candidate lowers the objective the start support stays (theirs returns an empty array), and
a gradient of zero on the support is no division by zero.
"""

from __future__ import annotations

import torch

from vlp_plugins.solvers.columns import weighted_sum, widened
from vlp_plugins.solvers.ranking import top

HALVINGS = 100
TRIALS = 10
SLACK = 1e-10
FLAT = 1e-8
"""A first-order term shorter than this is none."""


def stepped_support(
    part: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    inside: torch.Tensor,
    ridge: float,
    first_order: float,
) -> torch.Tensor:
    """The support after one step from `start`.

    Args:
        part: the columns, `[n, m]`, floating.
        weights: v, float32 `[m]`.
        start: beta, float32 `[m]`, zero outside its support.
        inside: bool `[m]`, the support of `start`.
        ridge: r = n lambda.
        first_order: c, above 0.

    Returns:
        bool `[m]`, as many true as `inside` has.
    """
    keep = int(inside.count_nonzero())
    if keep in (0, len(inside)):
        return inside
    change = start - weights
    moved = weighted_sum(part, change)
    gradient = _transposed(part, moved + first_order) + ridge * change
    uphill = _transposed(part, torch.full_like(moved, first_order))
    if float(uphill.norm()) <= FLAT:
        return inside
    length = exact_length(
        weighted_sum(part, gradient.masked_fill(~inside, 0)), gradient[inside], ridge
    )
    if length == 0:
        return inside
    if stays_on_top(start, gradient, length, inside):
        return inside
    length = shortened(start, gradient, length / 2, inside)

    def value(candidate: torch.Tensor) -> float:
        shift = candidate - weights
        reached = weighted_sum(part, shift)
        linear = float(uphill.double() @ candidate.double())
        distance = float(shift.double() @ shift.double())
        return float(reached @ reached) / 2 + ridge / 2 * distance + linear

    best, support = value(start), inside
    for _ in range(TRIALS):
        candidate = start - length * gradient
        chosen = top(candidate.abs(), keep)
        reached = value(candidate.masked_fill_(~chosen, 0))
        if not reached < best:
            break
        best, support, length = reached, chosen, 2 * length
    return support


def exact_length(reached: torch.Tensor, gradient: torch.Tensor, ridge: float) -> float:
    """The step length that minimises F along the gradient of the support; 0 for no gradient.

    Args:
        reached: A_S g_S, float64 `[n]`.
        gradient: g_S.
        ridge: r = n lambda.
    """
    squared = float(gradient.double() @ gradient.double())
    return squared / (float(reached @ reached) + ridge * squared) if squared else 0.0


def stays_on_top(
    start: torch.Tensor, gradient: torch.Tensor, length: float, inside: torch.Tensor
) -> bool:
    """Whether the largest entry after a step lies on the support; a loose test, as published."""
    size = (start - length * gradient).abs_()
    within = float(size.masked_fill(~inside, 0).max())
    return within >= float(size.masked_fill_(inside, 0).max()) - SLACK


def shortened(
    start: torch.Tensor, gradient: torch.Tensor, length: float, inside: torch.Tensor
) -> float:
    """The length, halved until `stays_on_top`."""
    for _ in range(HALVINGS):
        if stays_on_top(start, gradient, length, inside):
            break
        length /= 2
    return length


def _transposed(part: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """A' x for x `[n]`; float32 `[m]`."""
    wide = widened(part)
    return (vector.to(wide.dtype) @ wide).float()
