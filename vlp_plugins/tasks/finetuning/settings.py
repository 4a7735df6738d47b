"""Settings of a fine-tuning: learning rates, their schedules, the optimizer.

A step is counted from 0, and every step trains: the first of a warm-up of w steps has 1/w of the
rate, and the last one of all is not at zero. The originals differ in that: X-VLM's first step has
rate 0, and BLIP lowers its rate once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vlp_plugins.runtime.errors import RecipeError, UnsupportedError, suggest
from vlp_plugins.runtime.model_state import autocast_of

RATES: Mapping[str, Callable[[float], float]] = {
    # Half a period of a cosine (Loshchilov & Hutter, SGDR, ICLR 2017, eq. 5).
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _: 1.0,
}
"""By name: fraction of the steps after the warm-up that is done -> of the highest rate."""


def factor(step: int, steps: int, *, schedule: str, warmup: float = 0.0) -> float:
    """Fraction of the highest learning rate that a step, counted from 0, has.

    In the first int(`warmup` x `steps`) it rises on a straight line; the schedule, one of `RATES`,
    is of the rest.
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return RATES[schedule]((step - rise) / (steps - rise))


@dataclass(frozen=True)
class FinetuneSettings:
    """AdamW (Loshchilov & Hutter, ICLR 2019), and how its learning rate falls.

    Attributes:
        learning_rate: the highest.
        betas: of the averages of gradients and of their squares.
        epsilon: of AdamW.
        weight_decay: of matrices; vectors (biases, normalisation) are not decayed.
        schedule: `cosine`, `linear` or `constant`.
        warmup: fraction of the steps in which the rate rises.
        epochs: how often the data is read.
        steps: of the optimizer; None: as many as the epochs have.
        accumulate: batches of a process whose gradients make one step.
        clip: largest norm of the gradient of a step; None leaves it.
        autocast: `bfloat16` or `float16` for the forward pass; None for float32.
        seed: of dropout.
    """

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.0
    epochs: int = 1
    steps: int | None = None
    accumulate: int = 1
    clip: float | None = None
    autocast: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            RecipeError: if one is out of range.
            UnsupportedError: if the precision is unknown.
        """
        if self.schedule not in RATES:
            raise RecipeError(
                f"unknown schedule {self.schedule!r}{suggest(self.schedule, list(RATES))}"
            )
        autocast_of(self.autocast)
        for name, value, fine, wanted in (
            ("learning rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            ("weight decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("epsilon", self.epsilon, self.epsilon > 0, "above 0"),
            ("betas", self.betas, all(0 <= b < 1 for b in self.betas), "from 0 to below 1"),
            ("warm-up", self.warmup, 0 <= self.warmup < 1, "a fraction, from 0 to below 1"),
            ("number of epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("number of steps", self.steps, self.steps is None or self.steps >= 1, "1 or more"),
            ("accumulated batches", self.accumulate, self.accumulate >= 1, "1 or more"),
            ("norm to clip at", self.clip, self.clip is None or self.clip > 0, "above 0"),
        ):
            if not fine:
                raise RecipeError(f"the {name} must be {wanted}, not {value}")

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON keeps them."""
        return asdict(self) | {"betas": list(self.betas)}


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
