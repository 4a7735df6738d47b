"""Joins the processes that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import distributed

from vlp_plugins.calibration.processes import place
from vlp_plugins.errors import UnsupportedError

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
    """Returns when every process of the group has come here."""
    if place()[1] > 1:
        distributed.barrier()
