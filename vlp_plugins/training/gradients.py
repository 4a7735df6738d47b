"""What an optimizer is about to step with: gradients by weight, without the scale of a GradScaler.

`GradScaler.step` divides the gradients by its scale before it calls the optimizer, which it does
not call at all if one is infinite. Fused optimizers it calls always, with scaled gradients, and
tells them the scale and whether to skip by two attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer


def is_skipped(optimizer: Optimizer) -> bool:
    """Whether the optimizer will leave this step out, because a gradient is infinite."""
    found: torch.Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.sum())


def gradients_of(
    uses: Mapping[str, Sequence[nn.Parameter]], optimizer: Optimizer
) -> dict[str, torch.Tensor]:
    """The gradients of a step; for the time of one of its hooks.

    Args:
        uses: by canonical name every `Parameter` that is the weight.
        optimizer: about to step.

    Returns:
        By canonical name float32 of the weight's shape, summed over the uses, perhaps `.grad`
        itself; a weight without any is absent.
    """
    scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    found: dict[str, torch.Tensor] = {}
    for name, parameters in uses.items():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().float()
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            found[name] = found[name] + gradient if name in found else gradient
    return found
