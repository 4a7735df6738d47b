"""Several processes that share the work (`torchrun`), or one: joining and collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TypeVar

import torch
from torch import distributed

from vlp_plugins.runtime.errors import DataError, UnsupportedError, VlpError

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """Index of this process and number of processes; (0, 1) outside a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def batch_shard(*, sharded: bool) -> tuple[int, int]:
    """Rank and number of the processes that divide the batches; (0, 1): each runs all of them.

    Processes over which the parameters of the model are sharded run every batch together.
    """
    return (0, 1) if sharded else rank_and_size()


def check_same(value: str, what: str) -> None:
    """Raises `DataError` unless all processes have the same value.

    Args:
        value: fingerprint of the data that this process read.
        what: how much it read, for the message.
    """
    seen = all_gather((value, what))
    for rank, (other, much) in enumerate(seen):
        if other != seen[0][0]:
            raise DataError(
                f"process {rank} read other data ({much}, fingerprint {other}) than process 0 "
                f"({seen[0][1]}, {seen[0][0]}); give every process the same batches in the same "
                "order: no DistributedSampler, the same seed"
            )


def broadcast(value: Value) -> Value:
    """The value of process 0, in all of them. Objects travel pickled."""
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def all_reduce_min(amount: int) -> int:
    """The least amount of all processes."""
    return min(all_gather(amount))


def all_gather(value: Value) -> list[Value]:
    """The values of all processes, by rank. Objects travel pickled."""
    processes = rank_and_size()[1]
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
    errors = all_gather(None if mine is None else (type(mine), str(mine)))
    if mine is not None:
        raise mine
    for rank, theirs in enumerate(errors):
        if theirs is not None:
            kind, text = theirs
            raise kind(f"process {rank}: {text}")


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOLDERS = (
    "torch.distributed.nn",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.distributed.optim",
)


def before_joining() -> None:
    """Call it before a process group is made, so that the group can end before the interpreter.

    Some modules of torch have functions whose default argument is the group of the moment of their
    import. Imported later (models of transformers do it), they keep a destroyed group and its
    threads until the interpreter ends, and a thread that still frees a tensor then aborts the
    process ("terminate called without an active exception").
    """
    for module in _HOLDERS:
        import_module(module)


@contextmanager
def process_group(device: str | None = None) -> Iterator[None]:
    """Makes a process group of what `torchrun` started; does nothing in a process alone.

    The group is of gloo, on GPUs too: what processes exchange is a few megabytes of float64 sums
    that lie on the CPU anyway, once at the end of the data pass. Each process uses the GPU that
    its `LOCAL_RANK` names, unless another device is asked for.

    Args:
        device: that models will be loaded on; None and `cuda` take a GPU for each process.

    Raises:
        UnsupportedError: if the processes do not find each other, or are more than the GPUs.
    """
    alone = int(os.environ.get("WORLD_SIZE") or 1) < 2 or not all(map(os.environ.get, _VARIABLES))
    if alone or distributed.is_initialized():
        yield
        return
    if device in (None, "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UnsupportedError(
                f"process {local} of this machine has no GPU of its own (there are "
                f"{torch.cuda.device_count()}); start as many processes as GPUs, or add "
                "--device cpu"
            )
        torch.cuda.set_device(local)
    before_joining()
    try:
        distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"the processes of torchrun did not find each other: {error}"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """A barrier; nothing in a process alone."""
    if rank_and_size()[1] > 1:
        distributed.barrier()
