"""How rows lie in memory or in a file: part after part, so that a sweep reads from end to end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Layout:
    """Parts `[n, width]` one after the other. A row is written in pieces, a part is read whole.

    Attributes:
        n: number of rows that there is room for.
        cuts: first column of every part, then the end of the last; strictly ascending.
    """

    n: int
    cuts: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of all parts."""
        return self.n * (self.cuts[-1] - self.cuts[0])

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """First column of every part, its width, and where it lies (in elements)."""
        for start, stop in pairwise(self.cuts):
            yield start, stop - start, self.n * (start - self.cuts[0])

    def places(
        self, row: int, start: int, values: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Where the entries of a row go.

        Args:
            row: index of the row.
            start: column of the first value.
            values: `[m]`.

        Yields:
            A position in elements, and the values that belong there.
        """
        stop = start + len(values)
        index = bisect_right(self.cuts, start) - 1
        first = start
        while first < stop:
            left, right = self.cuts[index : index + 2]
            last = min(stop, right)
            offset = self.n * (left - self.cuts[0]) + row * (right - left) + first - left
            yield offset, values[first - start : last - start]
            first, index = last, index + 1
