"""The pieces of a search for a better support; `fast` and `best` are made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.solvers.band import dual_and_band
from vlp_plugins.solvers.dual import Dual
from vlp_plugins.solvers.exchange import exchange, exchange_pairs
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.ranked import Ranked
from vlp_plugins.solvers.relaxed import Point, newton_direction, shifts

_WIDTH = 0.3


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
        pairs: go on with the best single pairs where exchanges of many help no more.
    """
    before, band = dual_and_band(problem, chosen)
    dual, inside = exchange(before, band, chosen.support[chosen.band])
    if pairs:
        dual, inside = exchange_pairs(dual, band, inside)
    support = chosen.support.clone()
    support[chosen.band] = inside
    return Candidate(dual, support, before.objective - dual.objective)
