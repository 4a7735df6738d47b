"""What threads that solve blocks work on: groups of them, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from vlp_plugins.solvers.columns import places, widened

GROUP = 1 << 20
"""Elements that stay in the cache until they are used again."""
TURNS = 4
"""The number of groups is a multiple of this: 2 and 4 cores get as much to do each."""


class Block(NamedTuple):
    """Views of what belongs to one block of m columns, k of them kept.

    Attributes:
        rows: `[n, m]`.
        pruned: v outside the support, else 0, `[m]`.
        places: of the support, int64 `[k]`.
        kept: v there `[k]`.
        found: float32 `[k]`, for the values there.
    """

    rows: torch.Tensor
    pruned: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor
    found: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Neighbouring blocks of a part that one thread solves together.

    Attributes:
        blocks: views of each.
        chosen: the support of all, counted from the first column of the first, int64 `[k]`.
        found: float32 `[k]`, for the values there.
    """

    blocks: list[Block]
    chosen: torch.Tensor
    found: torch.Tensor

    @classmethod
    def of(
        cls, part: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor, edges: list[int]
    ) -> Group:
        """The group of some columns, in few operations: threads take turns to start them.

        Args:
            part: the columns, `[n, m]`.
            weights: v `[m]`.
            inside: bool `[m]`, the support.
            edges: boundaries of the blocks, the first 0, the last m, ascending.
        """
        chosen = places(inside)
        pruned, kept = weights.index_fill(0, chosen, 0), weights.index_select(0, chosen)
        found = torch.empty_like(kept, dtype=torch.float32)
        bounds = torch.tensor(edges)
        counts = torch.searchsorted(chosen, bounds).diff()
        inner = chosen - bounds[:-1].repeat_interleave(counts)
        widths, sizes = bounds.diff().tolist(), counts.tolist()
        wide = (part.split(widths, dim=1), pruned.split(widths))
        narrow = (vector.split(sizes) for vector in (inner, kept, found))
        return cls([Block(*some) for some in zip(*wide, *narrow, strict=True)], chosen, found)


@dataclass(frozen=True)
class Room:
    """Memory for one group of blocks, used again: fresh memory costs as much time as filling it.

    Attributes:
        kept: for the kept columns of all blocks of a group, 1-D.
        products: for their Gram matrices `[b, n, n]`.
        grams: for the same in float64.
    """

    kept: torch.Tensor
    products: torch.Tensor
    grams: torch.Tensor

    @classmethod
    def of(cls, part: torch.Tensor, groups: list[list[int]]) -> Room:
        """Room for any of the groups, given by the kept columns of every block."""
        n, dtype = len(part), widened(part[:0]).dtype
        products = part.new_empty((max(map(len, groups)), n, n), dtype=dtype)
        exact = torch.empty_like(products, dtype=torch.float64)
        return cls(part.new_empty(n * max(map(sum, groups)), dtype=dtype), products, exact)


def groups_of(kept: list[int], n: int) -> list[slice]:
    """Neighbouring blocks that one thread solves together, about as many columns in each group.

    Their kept columns and Gram matrices fit into the cache. Groups do not depend on the number of
    threads, so that results do not.

    Args:
        kept: columns of every block.
        n: rows.
    """
    sizes = [n * (columns + 3 * n) for columns in kept]  # a Gram matrix in float32 and float64
    total = sum(sizes)
    count = -(-total // (GROUP * TURNS)) * TURNS
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    numbers = [int(count * middle / total) for middle in middles]
    starts = [i for i in range(len(kept)) if i == 0 or numbers[i] > numbers[i - 1]]
    return [slice(*ends) for ends in pairwise([*starts, len(kept)])]
