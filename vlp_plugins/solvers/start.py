"""Where the published solver starts: the largest weights, or one gradient step from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.solvers.block_step import FLAT, TRIALS, exact_length, shortened, stays_on_top
from vlp_plugins.solvers.columns import weighted_sum, widened
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.ranking import top_by


@dataclass(frozen=True)
class Start:
    """A support and the vector that blocks start from.

    Attributes:
        values: beta, float32 `[p]`; its entries outside the support mean nothing.
        support: bool `[p]`, `keep` of them true.
    """

    values: torch.Tensor
    support: torch.Tensor


def starting_point(problem: Problem) -> Start:
    """The largest weights, or with a first-order term the published gradient step from v.

    The importance of the columns weighs all sizes that are compared.

    No sweep without a first-order term. With one it is one sweep for the gradient and its exact
    length, and one more where the step does not keep the support: all candidates of the line
    search are then evaluated together.
    """
    support = problem.largest()
    if problem.first_order == 0 or problem.keep in (0, problem.rows.p):
        return Start(problem.weights, support)
    gradient, length = _gradient(problem, support)
    if length == 0:
        return Start(problem.weights, support)
    sizes = problem.weights, gradient
    if problem.importance is not None:  # compared as the support is chosen
        sizes = problem.weighed(problem.weights.clone()), problem.weighed(gradient.clone())
    if stays_on_top(*sizes, length, support):
        return Start(problem.weights - length * gradient, support)
    length = shortened(*sizes, length / 2, support)
    return _searched(problem, support, gradient, length)


def _gradient(problem: Problem, support: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The gradient c A'1 of F at v, float32 `[p]`, and its exact length on the support.

    A part holds all rows of its columns, so both come from one sweep. The length is 0 if there is
    no step to make.
    """
    rows, c = problem.rows, problem.first_order
    gradient = torch.zeros_like(problem.weights)
    reached = problem.weights.new_zeros(rows.n, dtype=torch.float64)
    for start, part in rows.parts():
        columns = slice(start, start + part.shape[1])
        gradient[columns] = c * widened(part).sum(0)
        reached += weighted_sum(part, gradient[columns].masked_fill(~support[columns], 0))
    reached, gradient = rows.add_up(reached), rows.fill(gradient)
    if float(gradient.norm()) <= FLAT:
        return gradient, 0.0
    return gradient, exact_length(reached, gradient[support], rows.n * problem.ridge)


def _searched(
    problem: Problem, support: torch.Tensor, gradient: torch.Tensor, length: float
) -> Start:
    """The line search of the published step: doubling while F falls."""
    weights, p = problem.weights, problem.rows.p
    members = support.to(torch.int16)  # bit i: candidate i keeps the weight; bit 0 is the start
    for trial in range(TRIALS):
        step = length * 2**trial

        def size(entries: slice, step: float = step) -> torch.Tensor:
            moved = (weights[entries] - step * gradient[entries]).abs_()
            return problem.weighed(moved, entries)

        chosen = top_by(size, p, problem.keep, weights.device)
        members |= chosen.to(torch.int16) << (trial + 1)
    lengths = [0.0, *(length * 2**trial for trial in range(TRIALS))]
    values = _objectives(problem, members, gradient, lengths)
    best = 0
    while best < TRIALS and values[best + 1] < values[best]:
        best += 1
    return Start(weights - lengths[best] * gradient, (members >> best & 1).bool())


def _objectives(
    problem: Problem, members: torch.Tensor, gradient: torch.Tensor, lengths: list[float]
) -> list[float]:
    """F of the candidates `v - length g` on their supports; one sweep for all of them."""
    rows, device = problem.rows, problem.weights.device
    steps = torch.tensor(lengths, dtype=torch.float32, device=device)
    bits = torch.arange(len(lengths), dtype=torch.int16, device=device)
    moved = torch.zeros(rows.n, len(lengths), dtype=torch.float64, device=device)
    others = torch.zeros(2, len(lengths), dtype=torch.float64, device=device)
    for start, part in rows.parts():
        columns = slice(start, start + part.shape[1])
        weights = problem.weights[columns, None]
        candidates = weights - gradient[columns, None] * steps
        candidates *= members[columns, None] >> bits & 1
        others[0] += (candidates * gradient[columns, None]).sum(0, dtype=torch.float64)
        candidates -= weights
        others[1] += candidates.square().sum(0, dtype=torch.float64)
        moved += weighted_sum(part, candidates)
    moved, others = rows.add_up(moved), rows.add_up(others)
    # The gradient at v is the first-order term itself.
    ridge = rows.n * problem.ridge
    return (moved.square().sum(0) / 2 + others[0] + ridge / 2 * others[1]).tolist()
