"""What the points of a layer take of the memory budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp_plugins.intrinsic.neighbours import working_bytes
from vlp_plugins.intrinsic.packing import Need
from vlp_plugins.intrinsic.points import bytes_of_points
from vlp_plugins.intrinsic.sites import Met

_GUESS = 8
"""Batches of a process, if nobody knows; memory grows where there are more."""


@dataclass(frozen=True)
class Room:
    """The budget of one process, and how many rows are expected.

    Attributes:
        budget: bytes for points and the search for neighbours.
        rows: samples of this process.
        samples: of all processes.
        scattered: whether the samples are shared out, so that whoever computes a dimension must be
            sent all points of a layer.
        dtype: of the points; None: that of the outputs.
    """

    budget: int
    rows: int
    samples: int
    scattered: bool = False
    dtype: torch.dtype | None = None

    def need(self, met: Met, rows: int | None = None) -> Need:
        """Bytes of one use of a weight, with memory for so many rows; None: `rows`."""
        rows = self.rows if rows is None else rows
        samples = max(self.samples, rows)
        work = working_bytes(samples, met.ambient)
        if self.scattered:
            work += bytes_of_points(samples, met.widths, met.itemsize)
        held = bytes_of_points(rows, met.widths, met.itemsize)
        return Need(str(met), met.site.stream, held, work)


def expected(
    sizes: tuple[int, ...], total: int | None, size: int, processes: int
) -> tuple[int, int]:
    """Samples of one process, the one that has most, and of all.

    Args:
        sizes: of all batches; empty if they were not read yet.
        total: number of batches at most; None if nobody knows.
        size: of the first batch.
        processes: that share the batches.
    """
    if sizes:
        return max(sum(sizes[rank::processes]) for rank in range(processes)), sum(sizes)
    if total is None:
        return _GUESS * size, _GUESS * size * processes
    return -(-total // processes) * size, total * size
