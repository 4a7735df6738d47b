"""Searches over all weights for a better support: `fast` and `best`.

Both climb the Lagrangian dual of the whole problem. For any u `[n]`, with z = v + A'u and
r = n lambda,

    D(u) = - r/2 (sum of the k largest z_j^2) + r u'(A v - c 1) - r^2/2 |u|^2
           + r/2 |v|^2 + c 1'A v - n c^2/2

is at most F of every vector with k non-zeros. D is concave, and by the Shapley-Folkman theorem at
most n + 1 weights make the difference between its maximum and the least F: the k largest |z_j| at
the maximum are a near-optimal support. What remains to be decided lies near their threshold, in
the band: exchanges of kept and pruned weights decide it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from vlp_plugins.methods.chita.solver.dual import (
    Band,
    Dual,
    adding_gains,
    check_finite,
    dual_and_band,
    factor,
    gram,
    pick_columns,
    removal_costs,
    weighted_sum,
)
from vlp_plugins.methods.chita.solver.problem import Problem, Ranked, Solution, ranked, with_band

logger = logging.getLogger(__name__)

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


_EXCHANGE_ROUNDS = 100
_PAIRS = 256
_WIDTH = 0.3
NEAR_PER_ROW = 8
"""Columns on each side of the line that `fast` exchanges."""
_NEAR_PER_ROW, _LEAST_NEAR = 32, 1024
"""The same of `best`."""
_ROUNDS = 3
_SMALL = 1e-9


def exchange(dual: Dual, band: Band, inside: torch.Tensor) -> tuple[Dual, torch.Tensor]:
    """Exchanges many weights at a time, halving their number until F falls.

    The cheapest removals are paired with the greatest gains. Both are exact for one weight alone;
    because they do not add up, as many as look worth it are tried first, then half of them, a
    quarter, ... The next round starts from twice the number that was good in the last one.

    Args:
        dual: of the whole support, inside and outside the band.
        band: `[n, m]` columns, see `Band`.
        inside: bool `[m]`, which columns of the band are in the support.

    Returns:
        The dual and the support within the band after the exchanges; as many are kept as before.
    """
    inside = inside.clone()
    limit = len(inside)
    for _ in range(_EXCHANGE_ROUNDS):
        leaving, joining = _worthwhile(dual, band, inside, limit)
        count = len(leaving)
        while (
            count
            and not (tried := dual.exchanged(band, leaving, joining)).objective < dual.objective
        ):
            count //= 2
            leaving, joining = leaving[:count], joining[:count]
        if not count:
            break
        dual, limit = tried, 2 * count
        inside[leaving], inside[joining] = False, True
    return dual, inside


def exchange_pairs(dual: Dual, band: Band, inside: torch.Tensor) -> tuple[Dual, torch.Tensor]:
    """Exchanges the best pair, one at a time, by the exact change of F; see `exchange`.

    With s = 1 for a column that joins and -1 for one that leaves, D both of them and M the matrix
    of the dual, F falls by r/2 z_D' (diag(s) + A_D' M^-1 A_D)^-1 z_D. The pairs are among the
    cheapest removals and the greatest gains.
    """
    inside = inside.clone()
    for _ in range(_EXCHANGE_ROUNDS):
        leaving, joining, falls = _pair_falls(dual, band, inside)
        if falls.numel() == 0:
            break
        best = int(falls.argmax())
        out, into = leaving[best // len(joining)], joining[best % len(joining)]
        tried = dual.exchanged(band, out[None], into[None])
        if not tried.objective < dual.objective:
            break
        dual = tried
        inside[out], inside[into] = False, True
    return dual, inside


def _ranked(
    dual: Dual, band: Band, kept: torch.Tensor, pruned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept columns, cheapest first, pruned ones, greatest gain first, and the values of both."""
    costs, order = removal_costs(*_state(dual, band, kept), dual.ridge).sort(stable=True)
    gains, reverse = adding_gains(*_state(dual, band, pruned), dual.ridge).sort(
        stable=True, descending=True
    )
    return kept[order], pruned[reverse], costs, gains


def _state(dual: Dual, band: Band, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Current values z and leverages h of some columns of the band."""
    columns = band.columns[:, chosen]
    z = band.weights[chosen] + columns.T @ dual.solution
    return z, (dual.whitener @ columns).square_().sum(0)


def _worthwhile(
    dual: Dual, band: Band, inside: torch.Tensor, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns leave and which join, at most `limit` of each, the most promising first."""
    sizes = (band.weights + band.columns.T @ dual.solution).abs()
    kept, pruned = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    if min(len(kept), len(pruned)) == 0:
        return kept[:0], pruned[:0]
    # A cost is at least, a gain at most r/2 z^2: most columns are out of the question by z alone.
    most, least = sizes[pruned].max(), sizes[kept].min()
    kept, pruned = kept[sizes[kept] < most], pruned[sizes[pruned] > least]
    kept, pruned, costs, gains = _ranked(dual, band, kept, pruned)
    both = min(len(kept), len(pruned))
    count = min(limit, int((gains[:both] > costs[:both]).sum()))
    return kept[:count], pruned[:count]


def _pair_falls(
    dual: Dual, band: Band, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By how much F falls for every pair of a leaving and a joining column `[leaving, joining]`."""
    sizes = (band.weights + band.columns.T @ dual.solution).abs()
    kept, pruned = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    kept = kept[sizes[kept].argsort(stable=True)[: 2 * _PAIRS]]
    pruned = pruned[sizes[pruned].argsort(stable=True, descending=True)[: 2 * _PAIRS]]
    kept, pruned, _, _ = _ranked(dual, band, kept, pruned)
    kept, pruned = kept[:_PAIRS], pruned[:_PAIRS]
    both = torch.cat((kept, pruned))
    white = dual.whitener @ band.columns[:, both]
    z = band.weights[both] + band.columns[:, both].T @ dual.solution
    h = white.square().sum(0)
    a, b = h[: len(kept), None] - 1, h[None, len(kept) :] + 1
    mixed = white[:, : len(kept)].T @ white[:, len(kept) :]
    out, into = z[: len(kept), None], z[None, len(kept) :]
    fall = into.square() * a - 2 * out * into * mixed + out.square() * b
    return kept, pruned, fall * (dual.ridge / 2) / (a * b - mixed.square())


@dataclass(frozen=True)
class Candidate:
    """A support and its dual.

    Attributes:
        dual: of the support.
        support: bool `[p]`.
        better: by how much F is below that of the support that the exchanges started from.
    """

    dual: Dual
    support: torch.Tensor
    better: float


def first_point(problem: Problem, magnitude: Ranked) -> Point:
    """A Newton step of the Lagrangian dual from u = 0; two sweeps over the rows.

    Args:
        problem: see `Problem`; its blocks play no part.
        magnitude: the dense weights, ranked.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
    """
    weights = problem.weights.float()
    origin = torch.zeros(problem.rows.n, dtype=torch.float64, device=weights.device)
    direction = newton_direction(problem, Point(origin, weights), magnitude, _WIDTH)
    return Point(direction.step, weights + shifts(problem, direction.step))


def polished(problem: Problem, chosen: Ranked, *, pairs: bool = False) -> Candidate:
    """The support after exchanges within its band, in memory; one sweep over the rows.

    Args:
        problem: see `Problem`; its blocks play no part.
        chosen: a support and its band.
        pairs: then the best single pairs, where exchanges of many help no more.
    """
    before, band = dual_and_band(problem, chosen)
    dual, inside = exchange(before, band, chosen.support[chosen.band])
    if pairs:
        dual, inside = exchange_pairs(dual, band, inside)
    support = chosen.support.clone()
    support[chosen.band] = inside
    return Candidate(dual, support, before.objective - dual.objective)


def finish(
    problem: Problem, dual: Dual, support: torch.Tensor, magnitude: torch.Tensor
) -> Solution:
    """The minimiser on a support, or on that of the largest weights if that could be better.

    One sweep over the rows gives the weights and the proof: with z = v + A'u of the dual of S, F of
    any other support T is at least F_S + r/2 (sum of z_j^2 over S - sum of z_j^2 over T). Two more
    sweeps follow where this does not decide.

    Args:
        problem: see `Problem`; its blocks play no part.
        dual: of `support`.
        support: bool `[p]`.
        magnitude: bool `[p]`, the `keep` largest dense weights.
    """
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    ahead = torch.zeros((), dtype=torch.float64, device=values.device)
    for start, part in problem.rows.parts():
        columns = slice(start, start + part.shape[1])
        weights, found = problem.weights[columns], values[columns]
        inside, usual = support[columns], magnitude[columns]
        chosen = inside.nonzero()[:, 0]
        found[chosen] = dual.refit(pick_columns(part, chosen), weights[chosen])
        ahead += found.masked_fill(usual, 0).double().square().sum()
        others = (usual & ~inside).nonzero()[:, 0]
        refused = dual.refit(pick_columns(part, others), weights[others])
        ahead -= refused.double().square().sum()
    values, ahead = problem.rows.fill(values), problem.rows.add_up(ahead)
    if float(ahead) < 0:
        usual_dual = Dual.of(problem, magnitude)
        if usual_dual.objective < dual.objective:
            return Solution(usual_dual.values(problem, magnitude), magnitude, usual_dual.objective)
    return Solution(values, support, dual.objective)


def solve_fast(problem: Problem) -> Solution:
    """A support and its weights in four sweeps over the rows, however many weights there are.

    1. a Newton step of the Lagrangian dual from u = 0, where z = v (`newton_direction`);
    2. z = v + A'u: its k largest entries are the support;
    3. the dual of the support, and the 16 n columns next to the line, which stay in memory: kept
       and pruned ones are exchanged by exact costs and gains until none helps;
    4. the weights. Two more sweeps follow if magnitude might do better, which is rare (`finish`).

    Keeping everything or nothing takes two sweeps. Apart from vectors of the length of the weights,
    the columns next to the line are all that is held: 34 MB at n = 512 in float64.

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


def solve_best(problem: Problem) -> Solution:
    """The best support we can find; a bound that is logged says how far from the optimum at most.

    Two supports are tried: that of `fast` (3 sweeps over the rows), and the k largest entries of z
    at the maximum of the Lagrangian dual (`ascend`, 14 sweeps, and one more); exchanges of
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
    chosen = ranked(first.z, problem.keep, NEAR_PER_ROW * problem.rows.n)
    found = polished(problem, chosen, pairs=True)
    top = ascend(problem, first)
    other = polished(problem, ranked(top.z, problem.keep, near), pairs=True)
    found = min(found, other, key=lambda candidate: candidate.dual.objective)
    for _ in range(_ROUNDS):  # each next to the line of what was found
        z = problem.weights + shifts(problem, found.dual.solution)
        found = polished(problem, with_band(z, found.support, near), pairs=True)
        if found.better <= _SMALL * abs(found.dual.objective):
            break
    logger.info("F is %.9g, and at least %.9g for any support", found.dual.objective, top.bound)
    return finish(problem, found.dual, found.support, magnitude.support)
