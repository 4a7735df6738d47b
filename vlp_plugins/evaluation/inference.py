"""Runs a model to look at what it says, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlp_plugins.modes import flags_kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; every module gets its own training flag back.

    Args:
        model: any module.

    Yields:
        The device that its inputs belong on.
    """
    first = next(model.parameters(), None)
    with flags_kept(model), torch.no_grad():
        model.eval()
        yield first.device if first is not None else torch.device("cpu")
