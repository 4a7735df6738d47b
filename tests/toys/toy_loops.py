"""Plain training loops on the toy model, as a user writes them, and two layers to wrap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from toy import toy_batches
from toy_loss import LosingAdapter, LosingToy

from vlp_plugins.models.weights import WeightMap

ADAPTER = LosingAdapter()


def towers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))


def weights_of(model: LosingToy) -> WeightMap:
    return WeightMap.of(model, ADAPTER)


def zeros_of(model: LosingToy) -> dict[str, torch.Tensor]:
    return {name: w.parameter.detach() == 0 for name, w in weights_of(model).items()}


def removed_of(masks: Any) -> dict[str, torch.Tensor]:
    return {name: ~masks[name] for name in masks}


def loss_of(model: LosingToy, batch: Any) -> torch.Tensor:
    return torch.stack(list(ADAPTER.losses(model, batch).values())).sum()


def train(
    model: LosingToy,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    first: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
    closure: bool = False,
    batches: Iterable[Any] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps `first` to `steps`, of `accumulate` batches each; `after` hears of every step.

    Without dropout, so that two runs are the same. With `closure` the optimizer computes the
    gradients in its step.
    """
    model.eval()
    found = toy_batches(steps * accumulate, seed=1) if batches is None else list(batches)
    for step in range(first, steps):

        def gradients(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.zeros(())
            for batch in found[step * accumulate : (step + 1) * accumulate]:
                loss = loss_of(model, batch)
                loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
        after(step + 1)
