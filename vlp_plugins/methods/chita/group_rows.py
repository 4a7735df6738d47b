"""The rows of some weights of a model, as a problem of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from vlp_plugins.solvers.rows import Rows


class GroupRows(Rows):
    """Some column ranges of other rows, pushed together. A sweep over them is one of all columns.

    Attributes:
        ranges: (start, stop) of the columns in the other rows, ascending, none of them empty.
    """

    def __init__(self, rows: Rows, ranges: Sequence[tuple[int, int]]) -> None:
        self._rows = rows
        self.ranges = tuple(ranges)
        widths = [stop - start for start, stop in ranges]
        self._starts = [0, *accumulate(widths)]
        self.n, self.p = rows.n, self._starts[-1]

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for first, part in self._rows.parts():
            last = first + part.shape[1]
            for (start, stop), new in zip(self.ranges, self._starts, strict=False):
                left, right = max(start, first), min(stop, last)
                if left < right:
                    yield new + left - start, part[:, left - first : right - first]

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._rows.add_up(tensor)

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        whole = vector.new_zeros(self._rows.p)
        spread(vector, whole, self.ranges)
        whole = self._rows.fill(whole)
        return vector.copy_(gather(whole, self.ranges))

    def bounds(self, bounds: Sequence[int] | None) -> tuple[int, ...] | None:
        """Those of the blocks that lie in the ranges; a block never crosses the end of a range."""
        if bounds is None:
            return None
        found = [0]
        for (start, stop), new in zip(self.ranges, self._starts, strict=False):
            inside = [new + b - start for b in bounds if start < b <= stop]
            found += inside if found[-1] == new else [new, *inside]
        return tuple(found)


def gather(whole: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The entries of some ranges of a vector, pushed together."""
    return torch.cat([whole[start:stop] for start, stop in ranges])


def spread(vector: torch.Tensor, whole: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    """Inverse of `gather`: writes to these ranges of `whole`."""
    done = 0
    for start, stop in ranges:
        whole[start:stop] = vector[done : done + stop - start]
        done += stop - start
