"""The rows of a problem: gradients of single batches, wherever they are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from vlp_plugins.runtime.errors import UnsupportedError

# Elements of a part that are in work at a time: 64 MiB of float32.
_PART = 1 << 24
# Rows that are in memory need no room for a part: enough blocks at a time for many cores.
_VIEW = 1 << 26


class Rows(ABC):
    """A matrix `[n, p]` that is read part by part, because it may be larger than the memory.

    With several processes each holds some of the columns. A solver is written once: it sweeps over
    `parts`, and calls `add_up` and `fill` where the columns of all processes meet.

    Attributes:
        n: number of rows.
        p: number of columns, of all processes.
        sweeps: how often `parts` was iterated so far; a sweep may cost reading a disk or running
            every batch again.
    """

    n: int
    p: int
    sweeps: int = 0

    @abstractmethod
    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """One sweep over the columns of this process, in ascending order.

        Yields:
            The first column, and `[n, width]` float32 (or the dtype of a smaller kind of rows),
            not to be modified and valid until the next part only. A part holds whole blocks
            wherever the rows were made with block bounds.
        """

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes; the tensor itself where there is one."""
        return tensor

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        """Gives a vector `[p]` the entries that other processes computed, in place."""
        return vector


class MemoryRows(Rows):
    """Rows that are one tensor."""

    def __init__(self, matrix: torch.Tensor, bounds: Sequence[int] | None = None) -> None:
        """Keeps the tensor itself.

        Args:
            matrix: `[n, p]`, floating.
            bounds: block boundaries, the first 0, the last p; None for no blocks.

        Raises:
            UnsupportedError: if the matrix is empty or not two-dimensional.
        """
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise UnsupportedError(
                f"rows are a matrix [n, p] with at least one of each, not {list(matrix.shape)}"
            )
        self.n, self.p = matrix.shape
        self.matrix = matrix
        self._cuts = part_bounds(self.n, self.p, bounds, _VIEW)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for start, stop in pairwise(self._cuts):
            yield start, self.matrix[:, start:stop]


def part_bounds(n: int, p: int, bounds: Sequence[int] | None, elements: int = _PART) -> list[int]:
    """Where to cut `p` columns into parts of about `elements` elements, at block bounds if any."""
    width = max(1, elements // max(1, n))
    if bounds is None:
        return [*range(0, p, width), p]
    cuts = [0]
    for start, stop in pairwise(bounds):
        if stop - cuts[-1] > width and start > cuts[-1]:
            cuts.append(start)
    return cuts if cuts[-1] == p else [*cuts, p]
