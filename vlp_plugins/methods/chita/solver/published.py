"""The published solver: Benbaki et al., ICML 2023, algorithm 1 as their code runs it.

A gradient step with line search makes a start support; for the block-diagonal approximation every
block makes a step of its own; then come the exact weights on what was found. Defects that are left
out: where no candidate lowers the objective the start support stays (theirs is an empty array, and
the block comes out zero), a gradient of zero on the support is no division by zero, blocks may keep
everything or nothing, ties keep as many as asked for, and systems are solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.methods.chita.solver.blocks import Part, by_blocks, fit
from vlp_plugins.methods.chita.solver.dual import Dual
from vlp_plugins.methods.chita.solver.gram import weighted_sum, widened
from vlp_plugins.methods.chita.solver.problem import Problem, Solution
from vlp_plugins.scoring.threshold import top, top_by

HALVINGS = 100
TRIALS = 10
SLACK = 1e-10
FLAT = 1e-8
"""A first-order term shorter than this is none."""


def stepped_support(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    inside: torch.Tensor,
) -> torch.Tensor:
    """The support of a block after one step from `start`.

    Args:
        problem: what the block belongs to, with a first-order term.
        part: its columns, `[n, m]`, floating.
        weights: v, float32 `[m]`.
        start: beta, float32 `[m]`, zero outside its support.
        inside: bool `[m]`, the support of `start`.

    Returns:
        bool `[m]`, as many true as `inside` has.
    """
    ridge, c = problem.rows.n * problem.ridge, problem.first_order
    keep = int(inside.count_nonzero())
    if keep in (0, len(inside)):
        return inside
    change = start - weights
    moved = weighted_sum(part, change)
    gradient = _transposed(part, moved + c) + ridge * change
    uphill = _transposed(part, torch.full_like(moved, c))
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


def solve_published(problem: Problem) -> Solution:
    """The support and weights of the published solver, with exactly `keep` weights kept.

    Sweeps over the rows: one with blocks, two without. A first-order term adds one for its gradient
    step, and one more if that step would leave the start support.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
    """
    start = starting_point(problem)
    if problem.bounds is None:
        dual = Dual.of(problem, start.support)
        return Solution(dual.values(problem, start.support), start.support, dual.objective)

    def step_and_fit(part: Part) -> torch.Tensor:
        if problem.first_order:
            values = start.values[part.columns]
            for span in part.blocks:
                inside = part.support[span]
                part.support[span] = stepped_support(
                    problem,
                    part.matrix[:, span],
                    part.weights[span],
                    values[span].masked_fill(~inside, 0),
                    inside,
                )
        return fit(part)

    return by_blocks(problem, start.support, step_and_fit)
