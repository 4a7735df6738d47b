"""Runs a model to look at what it says, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; every module gets its own training flag back.

    Args:
        model: any module.

    Yields:
        The device that its inputs belong on.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    first = next(model.parameters(), None)
    try:
        with torch.no_grad():
            yield first.device if first is not None else torch.device("cpu")
    finally:
        for module in training:
            module.training = True
