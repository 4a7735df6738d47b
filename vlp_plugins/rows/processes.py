"""Several processes (`torchrun`) that hold some of the columns each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import distributed

from vlp_plugins.runtime.distributed import rank_and_size

_CHUNK = 1 << 20
"""Columns that travel at a time: 4 MiB of float32 from every process."""


def exchange(
    entries: Callable[[int, int], torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    receive: Callable[[int, int, torch.Tensor], None],
) -> None:
    """Every process sends its row to those that hold the columns, a chunk at a time.

    Args:
        entries: computes entries `[stop - start]` of the row of this process, float32.
        ranges: by process, first column that it holds and the one after the last.
        receive: called with (process, first column, its entries from there on).
    """
    rank, processes = rank_and_size()
    for owner, (start, stop) in enumerate(ranges):
        for first in range(start, stop, _CHUNK):
            sent = entries(first, min(first + _CHUNK, stop))
            got = [torch.empty_like(sent) for _ in range(processes)] if rank == owner else None
            distributed.gather(sent, got, dst=owner)
            for sender, row in enumerate(got or ()):
                receive(sender, first, row)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if rank_and_size()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def fill(vector: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Gives a vector `[p]` the entries that other processes hold, in place.

    Args:
        vector: contiguous, of any dtype.
        edges: first column of every process, then p.
    """
    if rank_and_size()[1] > 1:
        whole = vector.view(torch.uint8) if vector.dtype == torch.bool else vector
        for owner, (start, stop) in enumerate(pairwise(edges)):
            if start < stop:
                distributed.broadcast(whole[start:stop], src=owner)
    return vector
