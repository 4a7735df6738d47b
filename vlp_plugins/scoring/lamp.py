"""LAMP: each weight relative to the weights of its tensor that are at least as large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from vlp_plugins.runtime.parallel import over_tensors
from vlp_plugins.scoring.score import Evidence, MagnitudeRanked
from vlp_plugins.scoring.threshold import KEEP_ALL, Cut, cuts_at, order_keys, pick

_SHIFT = 16  # buckets of |w|: sign-free float32 bits without the lower 16, 0.8 % wide
_BUCKETS = 1 << 15
_LARGEST = torch.finfo(torch.float32).max
_BLOCK = 1 << 18  # elements that are counted at a time


def lamp(weight: torch.Tensor) -> torch.Tensor:
    """w^2 / (sum of v^2 over the entries v that sort at or after w).

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021). Equal
    entries sort by position. Sums run from the large end in float64: the published float32
    difference of sums cancels for the largest entries (`total - cumsum`).

    Args:
        weight: `[out, in]`, any floating dtype.

    Returns:
        float32, same shape, in [0, 1]; 0 for zeros.
    """
    values, places = _sorted(weight.abs().flatten())
    squares = values.double().square_()
    tails = squares.flip(0).cumsum(0).flip(0)
    ranked = torch.where(tails > 0, squares / tails, 0.0).float()
    return torch.empty_like(ranked).scatter_(0, places, ranked).view(weight.shape)


def _sorted(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and their places, `[n]` each, equal ones by position."""
    if magnitude.device.type != "cpu" or magnitude.dtype == torch.float64:
        found = torch.sort(magnitude, stable=True)
        return found.values, found.indices
    # Value and place in one integer: NumPy sorts those several times as fast as torch sorts floats.
    bits = magnitude.float().view(torch.int32).long()
    keys = np.sort(((bits << 32) | torch.arange(len(bits))).numpy())
    joined = torch.from_numpy(keys)
    return (joined >> 32).int().view(torch.float32), joined & 0xFFFFFFFF


class Lamp(MagnitudeRanked):
    """LAMP (Lee et al., ICLR 2021): magnitude over that of the larger weights of the layer."""

    # It grows with |w| within a tensor, so its global threshold needs no sort.

    name: ClassVar[str] = "lamp"

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return lamp(weight)

    def global_cuts(
        self,
        weights: Mapping[str, torch.Tensor],
        removals: Sequence[int],
        factors: Mapping[str, float] | None = None,
    ) -> list[dict[str, Cut]]:
        device = next(iter(weights.values())).device
        scales = dict.fromkeys(weights, 1.0) if factors is None else factors
        counted = over_tensors(lambda name: _Buckets(weights[name], scales[name]), weights, device)
        buckets = dict(zip(weights, counted, strict=True))
        return [_cuts(weights, buckets, removal) for removal in removals]


class _Buckets:
    """Counts and squared sums of |w| > 0 by bucket, and the scaled scores that one can hold."""

    def __init__(self, weight: torch.Tensor, scale: float) -> None:
        counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=weight.device)
        sums = torch.zeros(_BUCKETS, dtype=torch.float64, device=weight.device)
        zeros = torch.zeros((), dtype=torch.int64, device=weight.device)
        for part in weight.flatten().split(_BLOCK):  # temporaries stay small
            magnitude = part.float().abs()
            index = order_keys(magnitude) >> _SHIFT
            counts += torch.bincount(index, minlength=_BUCKETS)
            zeros += (magnitude == 0).sum()
            squares = magnitude.double().square_()
            sums += torch.bincount(index, weights=squares, minlength=_BUCKETS)
        # Their score is 0. On a pruned model they are most elements: not looked at one by one.
        counts[0] -= zeros
        self.zeros = int(zeros)
        self.scale = scale
        self.filled = torch.nonzero(counts)[:, 0]
        self.counts = counts[self.filled]
        tails = sums.flip(0).cumsum(0).flip(0)[self.filled]  # of the bucket and all above
        self.above = tails - sums[self.filled]
        edges = torch.stack((self.filled, self.filled + 1)).to(torch.int32) << _SHIFT
        self.edges = edges[0].view(torch.float32)
        low, high = edges.view(torch.float32).clamp_max(_LARGEST).double().square_()
        # A margin of 1e-12 absorbs the rounding of the bounds themselves.
        self.lower = torch.where(tails > 0, low / tails, 0.0) * (scale * (1 - 1e-12))
        self.upper = torch.where(high > 0, high / (self.above + high), 0.0) * (scale * (1 + 1e-12))


def _cuts(
    weights: Mapping[str, torch.Tensor], buckets: Mapping[str, _Buckets], removal: int
) -> dict[str, Cut]:
    """Cuts of |w| where the LAMP scores have their `removal`-th smallest."""
    # The bounds of the buckets enclose the threshold; only the elements of buckets that reach into
    # the enclosure are looked at one by one.
    if removal == 0:
        return dict.fromkeys(weights, KEEP_ALL)
    zeros = {name: b.zeros for name, b in buckets.items()}
    if removal <= sum(zeros.values()):
        return cuts_at(0.0, removal, {name: (0, equal) for name, equal in zeros.items()})
    counts = _joined([b.counts for b in buckets.values()])
    rank = removal - sum(zeros.values())
    at_least = _quantile(_joined([b.lower for b in buckets.values()]), counts, rank)
    at_most = _quantile(_joined([b.upper for b in buckets.values()]), counts, rank)
    certain: dict[str, int] = {}
    open_values: dict[str, torch.Tensor] = {}
    open_scores: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        b = buckets[name]
        gone = b.upper < at_least
        unsure = ~gone & (b.lower <= at_most)
        certain[name] = b.zeros + int(b.counts[gone].sum())
        open_values[name], open_scores[name] = _scores_of(weight, b, unsure)
    scores = _joined(list(open_scores.values()))
    # At least one uncertain element goes: what is certain to go lies below the threshold.
    rank = removal - sum(certain.values())
    threshold = float(torch.kthvalue(scores, rank).values)
    quota = rank - int((scores < threshold).sum())
    cuts = {}
    for name, weight in weights.items():
        ties = min(int((open_scores[name] == threshold).sum()), quota)
        quota -= ties
        count = int((open_scores[name] < threshold).sum()) + ties
        below = int((buckets[name].upper < at_least).sum())
        edge = torch.nn.functional.pad(buckets[name].edges, (0, 1), value=torch.inf)[below]
        cuts[name] = _magnitude_cut(weight, open_values[name], count, certain[name], edge)
    return cuts


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """1-D tensors, where the first of them is."""
    return torch.cat([value.to(values[0].device) for value in values])


def _quantile(values: torch.Tensor, counts: torch.Tensor, rank: int) -> float:
    order = torch.sort(values)
    position = torch.searchsorted(counts[order.indices].cumsum(0), rank)
    return float(order.values[position])


def _scores_of(
    weight: torch.Tensor, buckets: _Buckets, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted |w| and scaled LAMP scores (float64) of the elements in a run of buckets."""
    places = torch.nonzero(chosen)[:, 0]
    if len(places) == 0:
        empty = torch.empty(0, dtype=torch.float64, device=weight.device)
        return empty.float(), empty
    magnitude = weight.float().abs()
    first, last = int(buckets.filled[places[0]]), int(buckets.filled[places[-1]])
    index = order_keys(magnitude) >> _SHIFT
    chosen = (index >= first) & (index <= last)
    if first == 0:
        chosen &= magnitude.flatten() > 0
    values = pick(magnitude.flatten(), chosen).sort().values
    squares = values.double().square()
    tails = squares.flip(0).cumsum(0).flip(0) + buckets.above[places[-1]]
    return values, torch.where(tails > 0, squares / tails, 0.0) * buckets.scale


def _magnitude_cut(
    weight: torch.Tensor, values: torch.Tensor, count: int, certain: int, edge: torch.Tensor
) -> Cut:
    """The cut of |w| that takes the first `count` of the sorted open values, and all < `edge`."""
    remove = certain + count
    if remove == 0:
        return KEEP_ALL
    if count == 0:  # between two buckets: the open values start above the threshold
        values = weight.float().abs().flatten()
        threshold = float(values.where(values < edge, 0.0).amax())
        ties = remove - int((values < threshold).sum())
    else:
        threshold = float(values[count - 1])
        ties = count - int((values < threshold).sum())
    return Cut(remove, threshold, ties, int((values == threshold).sum()))
