"""Models and optimizers out of what training libraries wrap them in."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

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
