"""The optimizer of a fine-tuning, and which parameters it decays."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from vlp_plugins.finetuning.rates import factor
from vlp_plugins.finetuning.settings import FinetuneSettings
from vlp_plugins.runtime.errors import UnsupportedError


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that want gradients, tied ones once.

    Raises:
        UnsupportedError: if there is none, or they are in a precision that loses small steps.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no parameter that wants gradients")
    low = [name for name, p in found.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if low:
        raise UnsupportedError(
            f"{low[0]} is {found[low[0]].dtype}, in which small steps are lost; fine-tune in "
            "float32, with autocast='bfloat16' for speed"
        )
    return found


def build_optimizer(model: nn.Module, settings: FinetuneSettings) -> Optimizer:
    """AdamW in two groups: matrices and larger tensors are decayed, vectors and numbers are not.

    X-VLM's original keeps decay from biases and normalisation; BLIP's decays everything, in one
    group.
    """
    parameters = list(trained(model).values())
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
    )


def set_rate(optimizer: Optimizer, settings: FinetuneSettings, step: int, steps: int) -> float:
    """Sets the learning rate of a step, counted from 0, and returns it."""
    share = factor(step, steps, schedule=settings.schedule, warmup=settings.warmup)
    rate = settings.learning_rate * share
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
