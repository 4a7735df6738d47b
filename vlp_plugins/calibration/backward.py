"""Gradients of a loss by some parameters; nothing is left in any `.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

Gradients = tuple[torch.Tensor | None, ...]


def grad(loss: torch.Tensor, leaves: Sequence[nn.Parameter], *, retain_graph: bool) -> Gradients:
    """The gradients by `leaves`; None where the loss does not reach."""
    return torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)


def backward(
    loss: torch.Tensor, leaves: Sequence[nn.Parameter], *, retain_graph: bool
) -> Gradients:
    """`grad` for sharded parameters; all processes must call it with the same loss.

    The graph ends in parameters that `fully_shard` has gathered, so only `.grad` receives the
    gradients of its own: the mean over the processes, whose batch is the same.

    Args:
        loss: scalar.
        leaves: nothing else requires a gradient.
        retain_graph: for another call.
    """
    before = [parameter.grad for parameter in leaves]
    try:
        for parameter in leaves:
            parameter.grad = None  # what is there would be added to
        loss.backward(retain_graph=retain_graph)
        return tuple(parameter.grad for parameter in leaves)
    finally:
        for parameter, gradient in zip(leaves, before, strict=True):
            parameter.grad = gradient
