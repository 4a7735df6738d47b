"""Exchanges of kept for pruned weights within a band of columns, in memory, until none helps."""

from __future__ import annotations

import torch

from vlp_plugins.solvers.band import Band
from vlp_plugins.solvers.dual import Dual, adding_gains, removal_costs

_ROUNDS = 100
_PAIRS = 256


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
    for _ in range(_ROUNDS):
        leaving, joining = _worthwhile(dual, band, inside, limit)
        count = len(leaving)
        while (
            count and not (tried := _moved(dual, band, leaving, joining)).objective < dual.objective
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
    for _ in range(_ROUNDS):
        leaving, joining, falls = _pair_falls(dual, band, inside)
        if falls.numel() == 0:
            break
        best = int(falls.argmax())
        out, into = leaving[best // len(joining)], joining[best % len(joining)]
        tried = _moved(dual, band, out[None], into[None])
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


def _moved(dual: Dual, band: Band, leaving: torch.Tensor, joining: torch.Tensor) -> Dual:
    columns, weights = band.columns, band.weights
    return dual.exchanged(
        columns[:, joining], weights[joining], columns[:, leaving], weights[leaving]
    )


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
