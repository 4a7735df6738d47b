"""Modes that a block runs in and that are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Training flags, of every single module, are as before afterwards.

    Yields:
        What makes them as before at any time in between.
    """
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    try:
        yield restore
    finally:
        restore()


def random_state_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Whatever draws numbers on the CPU or on this device does not disturb those of the caller."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to a dtype; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
