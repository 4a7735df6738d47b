"""The published solver: Benbaki et al., ICML 2023, algorithm 1 as their code runs it.

A gradient step with line search makes a start support; for the block-diagonal approximation every
block makes a step of its own; then come the exact weights on what was found. Defects that are left
out: where no candidate lowers the objective the start support stays (theirs is an empty array, and
the block comes out zero), a gradient of zero on the support is no division by zero, blocks may keep
everything or nothing, ties keep as many as asked for, and systems are solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlp_plugins.methods.chita.solver.blocks import (
    Part,
    Task,
    by_blocks,
    fit,
    put_apart,
    together,
)
from vlp_plugins.methods.chita.solver.dual import Dual, weighted_sum, widened
from vlp_plugins.methods.chita.solver.problem import Problem, Solution, largest_of, swept
from vlp_plugins.scoring.threshold import top_by

HALVINGS = 100
TRIALS = 10
SLACK = 1e-10
FLAT = 1e-8
"""A first-order term shorter than this is none."""
_WIDTH = 1 << 14
_BAND = 1 << 12


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
    start: torch.Tensor, gradient: torch.Tensor, length: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """Whether the largest entry after a step lies on the support; a loose test, as published.

    Args:
        start: where steps begin, float32 `[b, m]`.
        gradient: float32 `[b, m]`.
        length: of the steps, float64 `[b]`.
        inside: bool `[b, m]`, the supports.

    Returns:
        Bool `[b]`.
    """
    size = (start - length.float()[:, None] * gradient).abs_()
    within = size.masked_fill(~inside, 0).amax(1)
    return within.double() >= size.masked_fill_(inside, 0).amax(1).double() - SLACK


def shortened(
    start: torch.Tensor,
    gradient: torch.Tensor,
    length: torch.Tensor,
    inside: torch.Tensor,
    moving: torch.Tensor,
) -> torch.Tensor:
    """The lengths, of the steps that are `moving` `[b]` halved until each `stays_on_top`."""
    for _ in range(HALVINGS):
        away = moving & ~stays_on_top(start, gradient, length, inside)
        if not bool(away.any()):
            break
        length = torch.where(away, length / 2, length)
    return length


@dataclass(frozen=True)
class Start:
    """A support and the vector that blocks start from, beta = v - length g.

    Attributes:
        problem: what starts.
        support: bool `[p]`, `keep` of them true.
        gradient: g, float32 `[p]`; None where there is no step.
        length: of the step.
    """

    problem: Problem
    support: torch.Tensor
    gradient: torch.Tensor | None = None
    length: float = 0.0

    def values(self, columns: slice) -> torch.Tensor:
        """Beta in some columns, float32; its entries outside the support mean nothing."""
        weights = self.problem.weights[columns]
        return weights if self.gradient is None else weights - self.length * self.gradient[columns]


def starting_points(problems: Sequence[Problem]) -> list[Start]:
    """The largest weights, or with a first-order term the published gradient step from v.

    The importance of the columns weighs all sizes that are compared.

    No sweep without a first-order term. With one it is one sweep for the gradients and their exact
    lengths, and one more where a step does not keep its support: all candidates of all line
    searches are then evaluated together.

    Args:
        problems: with the same rows.
    """
    starts = [Start(*pair) for pair in zip(problems, largest_of(problems), strict=True)]
    if problems[0].first_order == 0:
        return starts
    starts = _stepped_along_gradients(starts)
    leaving = [i for i, start in enumerate(starts) if not _keeps_support(start)]
    for i, found in zip(leaving, _searched([starts[i] for i in leaving]), strict=True):
        starts[i] = found
    return starts


def _step(
    start: Start, length: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of all weights as `stays_on_top` takes it, by the sizes that choose a support."""
    problem, gradient, weights = start.problem, start.gradient, start.problem.weights
    assert gradient is not None
    if problem.importance is not None:
        weights, gradient = problem.weighed(weights.clone()), problem.weighed(gradient.clone())
    lengths = torch.tensor([length], dtype=torch.float64, device=weights.device)
    return weights[None], gradient[None], lengths, start.support[None]


def _keeps_support(start: Start) -> bool:
    return start.gradient is None or bool(stays_on_top(*_step(start, start.length)))


def _stepped_along_gradients(starts: Sequence[Start]) -> list[Start]:
    """A step of exact length on the support along the gradient c A'1 of F at v; one sweep.

    A part holds all rows of its columns, so that the gradient is known when the length needs it.
    """
    unlike = {start.problem.alike: start for start in starts}  # lambda plays no part in the sweep
    problems = [start.problem for start in unlike.values()]
    gradients = {id(p.rows): torch.zeros_like(p.weights) for p in problems}
    reached = {p.alike: p.weights.new_zeros(p.rows.n, dtype=torch.float64) for p in problems}
    for i, first, part in swept(problems):
        problem, columns = problems[i], slice(first, first + part.shape[1])
        gradient = gradients[id(problem.rows)][columns]
        on_support = unlike[problem.alike].support[columns]
        for left in range(0, part.shape[1], _BAND):  # the second reading is from cache
            band = slice(left, left + _BAND)
            piece = widened(part[:, band])
            gradient[band] = piece.new_full((len(piece),), problem.first_order) @ piece
            inside = gradient[band].masked_fill(~on_support[band], 0)
            reached[problem.alike] += weighted_sum(piece, inside)
    for problem in problems:
        problem.rows.add_up(reached[problem.alike])
    for rows in {id(p.rows): p.rows for p in problems}.values():
        rows.fill(gradients[id(rows)])
    found = []
    for start in starts:
        problem, gradient, length = start.problem, gradients[id(start.problem.rows)], 0.0
        if problem.keep not in (0, problem.rows.p) and float(gradient.norm()) > FLAT:
            ridge = problem.rows.n * problem.ridge
            length = exact_length(reached[problem.alike], gradient[start.support], ridge)
        found.append(replace(start, gradient=gradient, length=length) if length else start)
    return found


def _searched(starts: Sequence[Start]) -> list[Start]:
    """The line search of the published step: doubling while F falls; one sweep for all."""
    members, lengths = [], []
    for start in starts:
        problem = start.problem
        step = _step(start, start.length / 2)
        length = float(shortened(*step, torch.ones_like(step[2], dtype=torch.bool)))
        lengths.append([0.0, *(length * 2**trial for trial in range(TRIALS))])
        members.append(start.support.to(torch.int16))  # bit i: candidate i; bit 0 is the start
        for trial, longer in enumerate(lengths[-1][1:]):
            tried = replace(start, length=longer)

            def size(entries: slice, tried: Start = tried) -> torch.Tensor:
                return tried.problem.weighed(tried.values(entries).abs(), entries)

            chosen = top_by(size, problem.rows.p, problem.keep, problem.weights.device)
            members[-1] |= chosen.to(torch.int16) << (trial + 1)
    found = []
    for start, own, steps, values in zip(
        starts, members, lengths, _objectives(starts, members, lengths), strict=True
    ):
        best = 0
        while best < TRIALS and values[best + 1] < values[best]:
            best += 1
        found.append(replace(start, support=(own >> best & 1).bool(), length=steps[best]))
    return found


def _objectives(
    starts: Sequence[Start], members: Sequence[torch.Tensor], lengths: Sequence[Sequence[float]]
) -> list[list[float]]:
    """F of the candidates `v - length g` on their supports; one sweep for all of them."""
    if not starts:
        return []
    device = starts[0].problem.weights.device
    steps = torch.tensor(lengths, dtype=torch.float32, device=device)
    count = steps.shape[1]
    bits = torch.arange(count, dtype=torch.int16, device=device)
    moved = torch.zeros(len(starts), starts[0].problem.rows.n, count).to(device, torch.float64)
    others = torch.zeros(len(starts), 2, count).to(device, torch.float64)
    for i, first, part in swept([start.problem for start in starts]):
        columns = slice(first, first + part.shape[1])
        weights, gradient = starts[i].problem.weights[columns, None], starts[i].gradient
        assert gradient is not None
        gradient = gradient[columns, None]
        candidates = weights - gradient * steps[i]
        candidates *= members[i][columns, None] >> bits & 1
        others[i, 0] += (candidates * gradient).sum(0, dtype=torch.float64)
        candidates -= weights
        others[i, 1] += candidates.square().sum(0, dtype=torch.float64)
        moved[i] += weighted_sum(part, candidates)
    rows = starts[0].problem.rows
    moved, others = rows.add_up(moved), rows.add_up(others)
    # The gradient at v is the first-order term itself.
    ridges = steps.new_tensor([start.problem.ridge for start in starts], dtype=torch.float64)
    ridges = rows.n * ridges[:, None]
    return (moved.square().sum(1) / 2 + others[:, 0] + ridges / 2 * others[:, 1]).tolist()


def solve_published(problem: Problem) -> Solution:
    """The support and weights of the published solver, with exactly `keep` weights kept.

    Sweeps over the rows: one with blocks, two without. A first-order term adds one for its gradient
    step, and one more if that step would leave the start support.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
    """
    start = starting_points([problem])[0]
    if problem.bounds is not None:
        return by_blocks([stepped(start)])[0].solution()
    dual = Dual.of(problem, start.support)
    return Solution(dual.values(problem, start.support), start.support, dual.objective)


def stepped(start: Start) -> Task:
    """A step of its own for every block, then the exact weights on what was found."""

    def step_and_fit(part: Part) -> torch.Tensor:
        if start.gradient is not None:  # else no block has a step either
            step_blocks(part, start.values(part.columns), start.gradient[part.columns])
        return fit(part)

    return Task(start.problem, start.support, step_and_fit)


def step_blocks(part: Part, start: torch.Tensor, uphill: torch.Tensor) -> None:
    """Sets the support of every block to that after one step.

    As many weights stay as before in every block. F is that of the block alone.

    Args:
        part: whole blocks.
        start: where steps begin, float32 `[m]`.
        uphill: the first-order term, float32 `[m]`.
    """
    start, blocks = start.masked_fill(~part.support, 0), part.blocks
    edges = torch.tensor(part.edges, device=start.device)
    counts = torch.nn.functional.pad(part.support.cumsum(0), (1, 0))[edges].diff()
    widths = edges.diff()

    def step(batch: list[int]) -> torch.Tensor:
        spans, those = [blocks[i] for i in batch], torch.tensor(batch).to(edges.device)
        weights, beta = together(part.weights, spans), together(start, spans)
        slope = together(uphill, spans)
        inside = together(part.support, spans)
        columns = widened(together(part.matrix, spans))
        found = _stepped_supports(
            part.problem, columns, weights, beta, slope, inside, counts[those], widths[those]
        )
        put_apart(found, part.support, spans)
        return start.new_zeros(1)

    part.over_blocks([span.stop - span.start for span in blocks], step)


def _stepped_supports(
    problem: Problem,
    columns: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    uphill: torch.Tensor,
    inside: torch.Tensor,
    keeps: torch.Tensor,
    widths: torch.Tensor,
) -> torch.Tensor:
    """The supports of blocks after one step, bool `[b, m]`.

    Args:
        problem: what the blocks belong to, with a first-order term.
        columns: `[b, n, m]`, float32, 0 beyond the end of a block, as everything.
        weights: v, float32 `[b, m]`.
        start: beta, float32 `[b, m]`, zero outside its support.
        uphill: c A'1, float32 `[b, m]`.
        inside: bool `[b, m]`, the support of `start`.
        keeps: int64 `[b]`, how many are inside.
        widths: int64 `[b]`, columns of every block.
    """
    ridge, c = problem.rows.n * problem.ridge, problem.first_order
    beyond = torch.arange(columns.shape[2], device=widths.device) >= widths[:, None]
    change = start - weights
    moved = _reached(columns, change)
    along_rows = (moved + c).to(columns.dtype)[:, None]
    gradient = (along_rows @ columns)[:, 0].float() + ridge * change
    on_support = gradient.masked_fill(~inside, 0)
    squared = on_support.double().square().sum(1)
    along = _reached(columns, on_support).square().sum(1) + ridge * squared
    length = squared / along.masked_fill(squared == 0, 1)
    moving = (
        (length > 0) & (uphill.norm(dim=1) > FLAT) & ~stays_on_top(start, gradient, length, inside)
    )
    if not bool(moving.any()):
        return inside
    length = shortened(start, gradient, length / 2, inside, moving)

    def value(candidate: torch.Tensor, shift: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        linear = (uphill.double() * candidate.double()).sum(1)
        distance = shift.double().square().sum(1)
        return moved.square().sum(1) / 2 + ridge / 2 * distance + linear

    best, support = value(start, change, moved), inside
    for _ in range(TRIALS):
        if not bool(moving.any()):
            break
        candidate = start - length.float()[:, None] * gradient
        chosen = _largest(candidate.abs().masked_fill_(beyond, -1), keeps)
        candidate = candidate.masked_fill_(~chosen, 0)
        shift = candidate - weights
        reached = value(candidate, shift, _reached(columns, shift))
        moving = moving & (reached < best)
        best = torch.where(moving, reached, best)
        support = torch.where(moving[:, None], chosen, support)
        length = 2 * length
    return support


def _reached(columns: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """A x of every block for x `[b, m]`; float64 `[b, n]`, summed in it over chunks of columns."""
    chunks = zip(columns.split(_WIDTH, dim=2), vectors.split(_WIDTH, dim=1), strict=True)
    return sum((a @ x[..., None].to(a.dtype)).double() for a, x in chunks)[..., 0]


def _largest(sizes: torch.Tensor, keeps: torch.Tensor) -> torch.Tensor:
    """The `keeps` `[b]` largest of sizes `[b, m]`, one at least; of equal ones the last."""
    places = (sizes.shape[1] - keeps).clamp_max(sizes.shape[1] - 1)
    threshold = sizes.sort(1).values.gather(1, places[:, None])
    above, equal = sizes > threshold, sizes == threshold
    later = equal.flip(1).cumsum(1).flip(1)
    return above | (equal & (later <= keeps[:, None] - above.sum(1, keepdim=True)))
