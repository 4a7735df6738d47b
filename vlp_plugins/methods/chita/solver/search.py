"""Searches for a better support: `fast` and `best`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from vlp_plugins.methods.chita.solver.dual import (
    Band,
    Dual,
    adding_gains,
    dual_and_band,
    removal_costs,
)
from vlp_plugins.methods.chita.solver.gram import pick_columns
from vlp_plugins.methods.chita.solver.problem import Problem, Ranked, Solution, ranked, with_band
from vlp_plugins.methods.chita.solver.relaxation import Point, ascend, newton_direction, shifts

logger = logging.getLogger(__name__)

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
