"""Entries of a vector ranked by absolute value: the largest ones, and those next to the line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.solvers.ranking import top


@dataclass(frozen=True)
class Ranked:
    """A support and what lies next to the line between it and the other entries.

    Attributes:
        support: bool `[p]`.
        threshold: the largest absolute value outside the support, -inf if nothing is.
        band: int64, ascending positions: the smallest of the support, the largest of the others.
    """

    support: torch.Tensor
    threshold: float
    band: torch.Tensor


def ranked(vector: torch.Tensor, keep: int, near: int = 0) -> Ranked:
    """The `keep` largest entries by absolute value; of equal ones the last stay.

    Args:
        vector: float32 `[p]`, finite.
        keep: 0 to p.
        near: entries of the band on each side of the line; fewer where a side has fewer.
    """
    return beside(vector, top(vector.abs(), keep), near)


def beside(vector: torch.Tensor, support: torch.Tensor, near: int) -> Ranked:
    """A given support, ranked by the absolute values of a vector.

    Args:
        vector: float32 `[p]`, finite.
        support: bool `[p]`.
        near: see `ranked`.
    """
    sizes, p, keep = vector.abs(), len(vector), int(support.count_nonzero())
    outside = sizes.masked_fill(support, -float("inf"))
    threshold = float(outside.max())
    if near == 0:
        return Ranked(support, threshold, support.new_zeros(0, dtype=torch.int64))
    band = top(outside, min(near, p - keep))
    band |= ~top(sizes.masked_fill_(~support, float("inf")), p - min(near, keep))
    return Ranked(support, threshold, band.nonzero()[:, 0])
