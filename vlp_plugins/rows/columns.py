"""Where every element of every weight lies in the columns of the rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class Columns:
    """The weights of a model one after the other, each flattened row by row.

    Attributes:
        names: canonical names, in the order of the adapter.
        shapes: of the weights.
        starts: first column of every weight, then p.
        bounds: boundaries of blocks that never cross a weight, the first 0, the last p; equal
            neighbours are empty blocks. None for no blocks.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    bounds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, weights: WeightMap, block_size: int | None) -> Columns:
        """The columns of all weights.

        Args:
            weights: of the model.
            block_size: columns of a block, about: see `block_bounds`; None for no blocks.

        Raises:
            UnsupportedError: if the block size is below 1.
        """
        starts = tuple(accumulate((weight.numel for weight in weights.values()), initial=0))
        bounds = None if block_size is None else block_bounds(starts, block_size)
        return cls(tuple(weights), tuple(w.shape for w in weights.values()), starts, bounds)

    @property
    def p(self) -> int:
        """Number of columns."""
        return self.starts[-1]

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One vector of all weights; beside it nothing of its size is made.

        Args:
            tensors: by canonical name, of the weights' shapes, all on one device.

        Returns:
            `[p]`, float32, or bool if the first tensor is.
        """
        first = tensors[self.names[0]]
        dtype = torch.bool if first.dtype == torch.bool else torch.float32
        joined = torch.empty(self.p, dtype=dtype, device=first.device)
        for name, view in self.split(joined).items():
            view.copy_(tensors[name])
        return joined

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a vector `[p]` by canonical name, in the weights' shapes."""
        ranges = zip(self.names, self.shapes, pairwise(self.starts), strict=True)
        return {name: vector[start:stop].view(shape) for name, shape, (start, stop) in ranges}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """The weights that columns `start` to `stop` are of.

        Yields:
            The name of a weight, of its elements the first and the one after the last that lie in
            these columns, and the column of the first.
        """
        index = bisect_right(self.starts, start) - 1
        while index < len(self.names) and self.starts[index] < stop:
            first, last = self.starts[index : index + 2]
            if first < last:
                here = max(start, first)
                yield self.names[index], here - first, min(stop, last) - first, here
            index += 1

    @property
    def widest(self) -> int:
        """Columns of the largest block, which are read together; 1 without blocks."""
        if self.bounds is None:
            return 1
        return max(stop - start for start, stop in pairwise(self.bounds))


def block_bounds(starts: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """The blocks of the published code.

    A weight of fewer than `block_size` elements is one block. One of n elements is cut into
    q = int(n / block_size) blocks of int(n / q), the last with the rest. The published list names
    the boundary between a weight that is cut and the one before twice, which makes an empty block.

    Args:
        starts: first column of every weight, then p.
        block_size: columns of a block.

    Raises:
        UnsupportedError: if the block size is below 1.
    """
    if block_size < 1:
        raise UnsupportedError(f"block_size={block_size}; a block has at least one column")
    bounds = [0]
    for start, stop in pairwise(starts):
        if count := (stop - start) // block_size:
            width = (stop - start) // count
            bounds += range(start, start + count * width, width)
        bounds.append(stop)
    return tuple(bounds)
