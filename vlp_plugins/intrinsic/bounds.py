"""What is known of the distance of every pair of points: an interval, or the distance itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Pairs that are looked at together: 4 MiB of float64.
_TILE = 1 << 19
# Squared norms below this are no longer accurate to float32's relative precision.
_TINY = 1e-34


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The two nearest other points of every point of some blocks of equal size.

    Attributes:
        r1: distance to the nearest, float64 `[b, m]`.
        r2: to the second, at least `r1`; float64 `[b, m]`.
        first: position of the nearest in the block, int64 `[b, m]`.
        second: of the second.
    """

    r1: torch.Tensor
    r2: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    def cpu(self) -> Neighbours:
        """The same, on the CPU."""
        return Neighbours(self.r1.cpu(), self.r2.cpu(), self.first.cpu(), self.second.cpu())


class DistanceBounds:
    """Lower and upper bounds of all squared distances, which measured pairs tighten to a value.

    Attributes:
        lower: float64 `[n, n]`, symmetric, infinite on the diagonal.
        upper: as `lower`; equal to it where the distance was measured.
    """

    def __init__(self, gram: torch.Tensor, error: float) -> None:
        """Bounds from products of centred points.

        Args:
            gram: float64 `[n, n]`; overwritten.
            error: bound of the error of a product, relative to the norms of its points.
        """
        squares = gram.diagonal().clamp_min(0)
        # |d2 - its estimate| <= error (|x|^2 + |y|^2 + 2 |x| |y|); 1.1: the norms err themselves.
        margin = (1.1 * error * (squares + _TINY)).sqrt()
        slack = torch.add(margin[:, None], margin).square_()
        self.upper = gram.mul_(-2).add_(squares[:, None]).add_(squares)
        self.lower = (self.upper - slack).clamp_min_(0)
        self.upper.add_(slack)
        for bound in (self.lower, self.upper):
            bound.fill_diagonal_(torch.inf)

    def missing(self, blocks: Sequence[torch.Tensor], most: int) -> torch.Tensor:
        """The pairs to measure before the two nearest neighbours within blocks are certain.

        A point's second neighbour is at most as far as its second smallest upper bound; every pair
        that may be nearer is a candidate.

        Args:
            blocks: each int64 `[b, m]`: positions of the points of b blocks of m points.
            most: candidates per point; where there are more the nearest come first, and a later
                call, which knows more, tells what is still missing.

        Returns:
            int64 `[p, 2]`, every pair once, the smaller position first.
        """
        wanted = torch.zeros_like(self.lower, dtype=torch.bool)
        for block in blocks:
            for rows in _tiles(block):
                upper = _between(self.upper, rows, block)
                limit = _two_smallest(upper)[1].unsqueeze(-1)
                lower = _between(self.lower, rows, block)
                candidate = (lower < upper) & (lower < limit)
                if int(candidate.sum(-1).max()) > most:
                    nearest = upper.masked_fill_(~candidate, torch.inf).topk(most, largest=False)
                    candidate &= torch.zeros_like(candidate).scatter_(-1, nearest.indices, True)
                which, row, column = candidate.nonzero(as_tuple=True)
                wanted[rows[which, row], block[which, column]] = True
        return (wanted | wanted.T).triu_().nonzero()

    def record(self, pairs: torch.Tensor, squared: torch.Tensor) -> None:
        """Keeps the measured squared distances, float64 `[p]`, of pairs `[p, 2]`."""
        for one, other in (pairs.unbind(1), pairs.flip(1).unbind(1)):
            self.lower[one, other] = squared
            self.upper[one, other] = squared

    def nearest_two(self, block: torch.Tensor) -> Neighbours:
        """The two nearest neighbours within blocks of which no pair is missing.

        Args:
            block: int64 `[b, m]`: positions of the points of b blocks of m points.
        """
        found = [_two_smallest(_between(self.upper, rows, block)) for rows in _tiles(block)]
        r1, r2, first, second = (torch.cat(tiles, 1) for tiles in zip(*found, strict=True))
        return Neighbours(r1.sqrt_(), r2.sqrt_(), first, second)


def bounds_bytes(n: int) -> int:
    """The most memory that `DistanceBounds` of n points takes, its Gram matrix included."""
    return 8 * n * n * 3 + 3 * n * n + 6 * 8 * min(max(_TILE, n), n * n)


def _tiles(block: torch.Tensor) -> Sequence[torch.Tensor]:
    """Blocks in pieces `[b, s]`, whose pairs with all points are few enough for one step."""
    return block.split(max(1, _TILE // block.numel()), dim=1)


def _between(bound: torch.Tensor, rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Of the pairs of some points of blocks `[b, s]` with all points `[b, m]`: `[b, s, m]`."""
    places = rows.unsqueeze(2) * len(bound) + block.unsqueeze(1)
    # Four times as fast as indexing with rows and columns on a CPU.
    return bound.view(-1).index_select(0, places.view(-1)).view(places.shape)


def _two_smallest(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Smallest and second smallest values along the last dimension, and where each of them is."""
    # Four times as fast as topk(2) on a CPU.
    first, at = values.min(-1, keepdim=True)
    values.scatter_(-1, at, torch.inf)
    second, there = values.min(-1)
    values.scatter_(-1, at, first)
    return first.squeeze(-1), second, at.squeeze(-1), there
