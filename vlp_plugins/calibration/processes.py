"""Several processes that share a data pass (`torchrun`), or one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from vlp_plugins.errors import DataError, VlpError

Value = TypeVar("Value")


def place() -> tuple[int, int]:
    """Index of this process and number of processes; (0, 1) outside a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def turns(*, sharded: bool) -> tuple[int, int]:
    """Of how many batches each process runs one, and which; (0, 1): it runs them all.

    Args:
        sharded: whether the parameters of the model are shared out among the processes, which then
            run every batch together.
    """
    return (0, 1) if sharded else place()


def check_same(value: str, what: str) -> None:
    """Raises `DataError` unless all processes have the same value.

    Args:
        value: fingerprint of the data that this process read.
        what: how much it read, for the message.
    """
    if place()[1] == 1:
        return
    seen: list[tuple[str, str]] = [("", "")] * place()[1]
    distributed.all_gather_object(seen, (value, what))
    for rank, (other, much) in enumerate(seen):
        if other != seen[0][0]:
            raise DataError(
                f"process {rank} read other data ({much}, fingerprint {other}) than process 0 "
                f"({seen[0][1]}, {seen[0][0]}); give every process the same batches in the same "
                "order: no DistributedSampler, the same seed"
            )


def of_first(value: Value) -> Value:
    """The value of process 0, in all of them. Objects travel pickled."""
    if place()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


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
