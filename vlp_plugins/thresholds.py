"""The k-th smallest of many scores without sorting or concatenating them.

float32 values are mapped to integers of the same order. One sweep counts the upper 16 bits, a
second one the lower 16 bits inside the bucket that holds the k-th value, so the threshold is exact
after two sweeps, whatever the number of tensors. Scores are recomputed in each sweep: nothing of
the model's size is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from vlp_plugins.brackets import Sampled, bracketed_cuts
from vlp_plugins.cuts import KEEP_ALL, Cut, ScoreSource, pick
from vlp_plugins.runtime.parallel import over_tensors

_BUCKETS = 1 << 16
SAMPLED_FROM = 1 << 17
"""Fewer elements than this are counted, not sampled: there is nothing to save."""


def order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers with the order of the scores.

    Args:
        scores: float32, any shape, no NaN.

    Returns:
        int32, 1-D; scores that are not negative keep their bits.
    """
    bits = scores.contiguous().view(torch.int32).flatten()
    if bits.numel() == 0 or int(bits.min()) >= 0:
        return bits
    bits = (scores + 0.0).contiguous().view(torch.int32).flatten()  # -0.0 becomes +0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _upper(keys: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits as int16: a view of every other half (little-endian), no arithmetic."""
    return keys.view(torch.int16)[1::2]


def _key_to_score(key: int) -> float:
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def find_cuts(
    sources: Mapping[str, ScoreSource],
    removals: Sequence[int],
    *,
    all_ties: bool = False,
    device: torch.device | None = None,
    samples: Mapping[str, Sampled] | None = None,
) -> list[dict[str, Cut]]:
    """Cuts that remove the smallest scores of several tensors taken together.

    Equal scores are broken by position: first tensor first, first element first.

    Args:
        sources: by name, in order.
        removals: for every cut how many elements to remove, each from 0 to the total number.
        all_ties: remove every element equal to the threshold, as published code does (quirk G1).
        device: where the scores are; on a CPU the tensors are shared out among its cores.
        samples: cheap samples of the scores of all tensors; they save one of the two sweeps.

    Returns:
        For every entry of `removals`, the cut of every tensor. The `remove` fields sum to the
        entry exactly (to more with `all_ties` and ties).
    """
    device = device or torch.device("cpu")
    found: dict[int, dict[str, Cut]] = {0: dict.fromkeys(sources, KEEP_ALL)}
    if samples is not None and (size := sum(s.numel for s in samples.values())) >= SAMPLED_FROM:
        inner = [removal for removal in dict.fromkeys(removals) if 0 < removal < size]
        found |= bracketed_cuts(sources, samples, inner, all_ties=all_ties, device=device)
    if missing := [removal for removal in removals if removal not in found]:
        found |= _cuts_by_histogram(sources, missing, all_ties, device)
    return [found[removal] for removal in removals]


def _cuts_by_histogram(
    sources: Mapping[str, ScoreSource],
    removals: Sequence[int],
    all_ties: bool,
    device: torch.device,
) -> dict[int, dict[str, Cut]]:
    names = list(sources)
    counted = over_tensors(lambda name: _coarse_counts(sources[name]()), names, device)
    coarse = dict(zip(names, counted, strict=True))
    total = sum(counts.to("cpu", torch.int64) for counts in coarse.values())
    cumulative = torch.as_tensor(total).cumsum(0)
    size = int(cumulative[-1])
    buckets: dict[int, int] = {}
    for removal in removals:
        if not 0 <= removal <= size:
            raise ValueError(f"cannot remove {removal} of {size} elements")
        if removal < size or all_ties:
            buckets[removal] = int(torch.searchsorted(cumulative, removal))
    fine = {b: _fine_counts(sources, coarse, b, device) for b in sorted(set(buckets.values()))}
    found = {}
    for removal in removals:
        if removal in buckets:
            bucket = buckets[removal]
            rank = removal - (int(cumulative[bucket - 1]) if bucket else 0)
            found[removal] = _split(rank, bucket, coarse, fine[bucket], all_ties=all_ties)
        else:
            sizes = {name: int(counts.sum()) for name, counts in coarse.items()}
            found[removal] = {name: Cut(n, math.inf) for name, n in sizes.items()}
    return found


def _coarse_counts(scores: torch.Tensor) -> torch.Tensor:
    """Counts of the upper 16 bits of the keys, the most negative bucket first."""
    upper = _upper(order_keys(scores)).contiguous()
    if upper.numel() and int(upper.min()) < 0:
        return _count(upper.int() + _BUCKETS // 2, _BUCKETS)
    return torch.nn.functional.pad(_count(upper, _BUCKETS // 2), (_BUCKETS // 2, 0))


def _count(values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(values, minlength=size).to(torch.int32)


def _fine_counts(
    sources: Mapping[str, ScoreSource],
    coarse: Mapping[str, torch.Tensor],
    bucket: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Counts of the lower 16 bits of the elements of one bucket, for tensors that have any."""

    def count(name: str) -> torch.Tensor:
        keys = order_keys(sources[name]())
        inside = pick(keys, _upper(keys) == bucket - _BUCKETS // 2)
        return _count(inside & 0xFFFF, _BUCKETS)

    names = [name for name in sources if int(coarse[name][bucket])]
    return dict(zip(names, over_tensors(count, names, device), strict=True))


def _split(
    rank: int,
    bucket: int,
    coarse: Mapping[str, torch.Tensor],
    fine: Mapping[str, torch.Tensor],
    *,
    all_ties: bool,
) -> dict[str, Cut]:
    """The cuts at the `rank`-th smallest (1-based) element of a bucket."""
    merged = torch.as_tensor(sum(counts.to("cpu", torch.int64) for counts in fine.values()))
    cumulative = merged.cumsum(0)
    low = int(torch.searchsorted(cumulative, rank))
    quota = rank - (int(cumulative[low - 1]) if low else 0)
    threshold = _key_to_score(((bucket - _BUCKETS // 2) << 16) | low)
    cuts = {}
    for name, counts in coarse.items():
        below = int(counts[:bucket].sum(dtype=torch.int64))
        equal = 0
        if name in fine:
            below += int(fine[name][:low].sum(dtype=torch.int64))
            equal = int(fine[name][low])
        ties = equal if all_ties else min(equal, quota)
        quota -= min(equal, quota)
        cuts[name] = Cut(below + ties, threshold, ties, equal)
    return cuts
