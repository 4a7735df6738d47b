"""Models and optimizers out of what training libraries wrap them in, and what these step with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vlp_plugins.errors import UnsupportedError

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    for module, name, inner in _WRAPPERS:
        # A wrapper whose module nobody has imported cannot be there.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(model, kind):
            return bare(getattr(model, inner))
    return model


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, out of wrappers such as that of `accelerate`."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, so its steps cannot be "
            "watched; give the torch optimizer, or call mask_gradients() before and apply() after "
            "every step"
        )
    return optimizer


def before_updates(
    optimizer: Optimizer, read: Callable[[Optimizer, bool], None]
) -> RemovableHandle:
    """Calls a function in every step when the gradients are there and nothing has moved yet.

    Without a closure that is before the step. A closure computes the gradients in the step, some
    optimizers (L-BFGS) call it several times: the function is called after each of its calls.

    Args:
        optimizer: not wrapped.
        read: called with the optimizer and whether these are the first gradients of the step, which
            are those of the weights before it; may change them in place.

    Returns:
        What ends it.
    """

    def hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The first argument is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            read(optimizer, True)
            return None
        first = True

        def closure_and_read() -> Any:
            nonlocal first
            loss = closure()
            read(optimizer, first)
            first = False
            return loss

        if len(args) > 1:
            return (args[0], closure_and_read, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_and_read}

    return optimizer.register_step_pre_hook(hook)
