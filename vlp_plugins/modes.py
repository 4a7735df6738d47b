"""Modes that a block runs in and that are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
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


_callers_defaults: ContextVar[tuple[torch.device, torch.dtype] | None] = ContextVar(
    "callers_defaults", default=None
)
"""Default device and dtype outside the outermost `neutral_state`; None if they are torch's own."""


@contextmanager
def neutral_state() -> Iterator[None]:
    """Torch as a new process has it: default dtype float32, default device CPU, no autocast.

    For every public function that computes, as a decorator: what the caller has set for the process
    (`torch.set_default_dtype`, `torch.set_default_device`) or around the call (`torch.autocast`)
    changes no result. `callers_defaults` brings back what a model may rely on.
    """
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in {"cpu", *_accelerators()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu" or dtype != torch.float32:
            token = _callers_defaults.set((device, dtype))
            stack.callback(_callers_defaults.reset, token)
            stack.enter_context(_defaults(torch.device("cpu"), torch.float32))
        yield


@contextmanager
def callers_defaults(model: nn.Module) -> Iterator[None]:
    """Inside `neutral_state`, the caller's default device and dtype where the model has the same.

    A model that was made under `torch.set_default_device("cuda")` may make tensors in its forward
    pass that belong there.
    """
    found = _callers_defaults.get()
    if found is None:
        yield
        return
    parameter = next(model.parameters())
    device = found[0] if found[0].type == parameter.device.type else torch.device("cpu")
    dtype = found[1] if found[1] == parameter.dtype else torch.float32
    with _defaults(device, dtype):
        yield


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device == torch.get_default_device() else device:
            yield
    finally:
        torch.set_default_dtype(before)


def _accelerators() -> list[str]:
    found = torch.accelerator.current_accelerator()
    return [] if found is None else [found.type]
