"""Several processes (`torchrun`) that hold some of the columns each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import distributed

from vlp_plugins.calibration.processes import place
from vlp_plugins.errors import VlpError

Value = TypeVar("Value")

_CHUNK = 1 << 20
"""Columns that travel at a time: 4 MiB of float32 from every process."""


def agreed(amount: int) -> int:
    """The least of the amounts of all processes, so that all make the same plan."""
    return min(told(amount))


def told(value: Value) -> list[Value]:
    """The values of all processes, in their order."""
    processes = place()[1]
    if processes == 1:
        return [value]
    values: list[Value] = [value] * processes
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """An error of one process is raised in all of them, so that none waits for ever."""
    mine: VlpError | None = None
    try:
        yield
    except VlpError as error:
        mine = error
    errors = told(None if mine is None else (type(mine), str(mine)))
    if mine is not None:
        raise mine
    for rank, theirs in enumerate(errors):
        if theirs is not None:
            kind, text = theirs
            raise kind(f"process {rank}: {text}")


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
    rank, processes = place()
    for owner, (start, stop) in enumerate(ranges):
        for first in range(start, stop, _CHUNK):
            sent = entries(first, min(first + _CHUNK, stop))
            got = [torch.empty_like(sent) for _ in range(processes)] if rank == owner else None
            distributed.gather(sent, got, dst=owner)
            for sender, row in enumerate(got or ()):
                receive(sender, first, row)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if place()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def fill(vector: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Gives a vector `[p]` the entries that other processes hold, in place.

    Args:
        vector: contiguous, of any dtype.
        edges: first column of every process, then p.
    """
    if place()[1] > 1:
        whole = vector.view(torch.uint8) if vector.dtype == torch.bool else vector
        for owner, (start, stop) in enumerate(pairwise(edges)):
            if start < stop:
                distributed.broadcast(whole[start:stop], src=owner)
    return vector
