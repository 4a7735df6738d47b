"""Modes that a block runs in and that are as before afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock, RLock
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlp_plugins.wrapping import bare

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def exclusive(model: nn.Module) -> AbstractContextManager[Any]:
    """No other thread has hooks on a model, changes its modes or its weights in such a block.

    Threads take turns, as hooks, modes and `requires_grad` are of the model, not of a thread. A
    block in a block of the same thread does not wait.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(bare(model), RLock())


def takes_model(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that gets its argument `model` out of wrappers, and has it for itself meanwhile.

    Every function that users give a model to is one; see `bare` and `exclusive`.
    """
    place = list(inspect.signature(function).parameters).index("model")
    given: Callable[..., Result] = function

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        values, named = list[Any](args), dict[str, Any](options)
        by_position = place < len(values)
        model = values[place] if by_position else named.get("model")
        if not isinstance(model, nn.Module):
            return given(*values, **named)  # which says what is wrong
        model = bare(model)
        if by_position:
            values[place] = model
        else:
            named["model"] = model
        with exclusive(model):
            return given(*values, **named)

    return call


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Training flags, of every single module, are as before afterwards.

    Other threads wait for their turn; see `exclusive`.

    Yields:
        What makes them as before at any time in between.
    """
    with exclusive(model):
        flags = [(module, module.training) for module in model.modules()]

        def restore() -> None:
            for module, training in flags:
                module.training = training

        try:
            yield restore
        finally:
            restore()


@contextmanager
def fast_path_off() -> Iterator[None]:
    """`nn.TransformerEncoder` and `nn.MultiheadAttention` run their layers as they are written.

    Their fast path packs the real tokens into nested tensors, which nothing that looks at layers
    can read, or runs no layer at all. The switch is the process's: it is as before once the last
    of all blocks has ended, in whatever thread.
    """
    with _FAST_PATH.lock:
        if not _FAST_PATH.blocks:
            _FAST_PATH.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _FAST_PATH.blocks += 1
    try:
        yield
    finally:
        with _FAST_PATH.lock:
            _FAST_PATH.blocks -= 1
            if not _FAST_PATH.blocks:
                torch.backends.mha.set_fastpath_enabled(_FAST_PATH.before)


@dataclass
class _FastPath:
    """How many blocks want it off, and what it was before the first."""

    blocks: int = 0
    before: bool = True
    lock: AbstractContextManager[Any] = field(default_factory=Lock)


_FAST_PATH = _FastPath()


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
