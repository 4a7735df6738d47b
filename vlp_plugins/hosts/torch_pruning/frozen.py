"""Parameters that want no gradient, when Torch-Pruning makes new ones in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen_stay_frozen(model: nn.Module) -> Iterator[None]:
    """What replaces a frozen Parameter inside the block is frozen, too.

    Torch-Pruning makes a new Parameter of what it leaves of one, and every new one wants gradients.
    """
    frozen = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]
    try:
        yield
    finally:
        for module, name in frozen:
            parameter = module._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(False)
