"""ECoFLaP: blocks on which the loss depends more keep more; no backward pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlp_plugins.calibration.loss import copy_of_state, write_state
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.distributed import failing_together
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.scoring.budgets import (
    BudgetAllocation,
    Group,
    batches_of_this_process,
    sum_in_order,
)
from vlp_plugins.scoring.selection import Scored

if TYPE_CHECKING:
    from vlp_plugins.methods.method import Context


@dataclass(frozen=True)
class Ecoflap(BudgetAllocation):
    """ECoFLaP (Sung et al., ICLR 2024): budgets of blocks by gradients of zeroth order.

    Every tensor is moved by eps times random normal numbers, forth and back; how much the loss
    differs, divided by 2 eps, is its importance, and that of a block is the sum of its tensors',
    over a few batches. It takes two forward passes for each tensor and batch, and no backward.

    Example:
        masks = vlp.prune(model, data, method="alps", allocation="ecoflap", sparsity=0.6)

    Attributes:
        eps: how far a weight is moved, in standard deviations.
        batches: how many batches are read; the paper has 4 of 8 samples.
        found: by canonical name the sum over batches of |L(W + eps z) - L(W - eps z)| / (2 eps).
    """

    eps: float = 1e-3
    batches: int = 4

    name: ClassVar[str] = "ecoflap"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.eps, int | float) and not isinstance(self.eps, bool)
        if not number or not 0 < self.eps < math.inf:
            raise UnsupportedError(
                f"allocation 'ecoflap': eps={self.eps!r}; give a number above 0 (the paper: 0.001)"
            )
        if type(self.batches) is not int or self.batches < 1:
            raise UnsupportedError(
                f"allocation 'ecoflap': batches={self.batches!r}; give a whole number from 1 on"
            )

    def forwards(self, weights: Mapping[str, Weight], batches: int) -> int:
        return 0 if self.measured else 2 * len(weights) * min(batches, self.batches)

    def measure(self, context: Context) -> Ecoflap:
        limit = self.batches if context.limit is None else min(self.batches, context.limit)
        found = projected_gradients(context, self.eps, limit)
        return replace(self, found=found, factors=None)

    def importances(self, scored: Scored) -> dict[Group, float]:
        found = self.known(scored.weights)
        sums: dict[Group, float] = {}
        for name, weight in scored.weights.items():
            group = self.group_of(weight)
            sums[group] = sums.get(group, 0.0) + found[name]
        return sums

    def record(self) -> dict[str, Any]:
        return {**super().record(), "eps": self.eps, "batches": self.batches}


def projected_gradients(context: Context, eps: float, limit: int | None) -> dict[str, float]:
    """Of every weight the sum over batches of |L(W + eps z) - L(W - eps z)| / (2 eps).

    z is drawn from the standard normal distribution for each weight and batch, from the seed of the
    run, the name of the weight and the index of the batch. Weights are put back bit by bit, from a
    copy of the one that is moved (quirk ecoflap-E2).

    Args:
        context: of the run.
        eps: how far weights are moved.
        limit: number of batches to read; None reads all.

    Returns:
        By canonical name.

    Raises:
        UnsupportedError: if the weights are sharded, or cannot be written.
        NonFiniteError: if a loss is NaN or infinite and such batches are not skipped, or all are.
    """
    weights = context.weights
    if weights.sharded:
        raise UnsupportedError(
            "allocation 'ecoflap' moves one weight at a time in every process, and this model's "
            "weights are sharded over processes; give the whole model, or take allocation='das'"
        )
    if name := next((n for n, w in weights.items() if w.parameter.is_inference()), None):
        raise UnsupportedError(
            f"allocation 'ecoflap' moves the weights, and {name!r} was made in inference mode; "
            "load the model outside torch.inference_mode()"
        )
    probe = context.loss_probe()
    found: dict[int, list[float]] = {}
    with failing_together(), probe.attached(()):
        state = copy_of_state(context.model, context.adapter)
        for index, batch in batches_of_this_process(context, limit):

            def loss(index: int = index, batch: object = batch) -> float:
                value = probe.loss(batch, index)  # type: ignore[arg-type]
                write_state(context.model, context.adapter, state)
                return value

            values = [
                _difference(weight, loss, eps, _seed(context.seed, name, index)) / (2 * eps)
                for name, weight in weights.items()
            ]
            if all(map(math.isfinite, values)):
                found[index] = values
            elif not context.skip_nonfinite:
                name = next(n for n, v in zip(weights, values, strict=True) if not math.isfinite(v))
                raise NonFiniteError(
                    f"the loss of batch {index} is NaN or infinite when {name!r} is moved; look at "
                    "that batch and at the checkpoint, or leave such batches out with "
                    "skip_nonfinite (--skip-nonfinite)"
                )
    sums = sum_in_order(found)
    if not sums:
        raise NonFiniteError(
            "the loss of all batches is NaN or infinite; look at the checkpoint (weights after a "
            "diverged training), or run in float32"
        )
    return dict(zip(weights, sums, strict=True))


def _difference(weight: Weight, loss: Callable[[], float], eps: float, seed: int) -> float:
    """|L(W + eps z) - L(W - eps z)|; the weight is as it was afterwards."""
    with moved(weight) as move:
        noise = normal_noise(weight.values, seed)
        move(noise, eps)
        above = loss()
        move(noise, -eps)
        return abs(above - loss())


@contextmanager
def moved(weight: Weight) -> Iterator[Callable[[torch.Tensor, float], None]]:
    """A function that sets a weight to what it was plus a multiple of a direction."""
    restore = weight.kept()
    before = weight.values.clone()

    def move(direction: torch.Tensor, by: float) -> None:
        with torch.inference_mode(False), torch.no_grad(), weight.changing() as parameter:
            parameter.copy_(before + by * direction)

    try:
        yield move
    finally:
        with torch.inference_mode(False):
            restore()


def normal_noise(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal numbers of a parameter's shape, dtype and device, the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.normal(0.0, 1.0, parameter.shape, generator=generator)
    return noise.to(parameter.device, parameter.dtype)


def _seed(seed: int, name: str, batch: int) -> int:
    digest = hashlib.sha256(f"{seed}|{name}|{batch}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
