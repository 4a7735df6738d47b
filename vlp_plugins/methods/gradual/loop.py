"""A training loop for pruning alone: the pre-training loss, AdamW, rising masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.gradual.rising_masks import RisingMasks
from vlp_plugins.models.adapter import Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.sharding import write, zero_outside


class Masters:
    """Parameters in float32; a model in bfloat16 would lose most small steps.

    Those of float32 weights are the weights themselves, with gradients of their own.

    Attributes:
        weights: as those of the model, with the masters for parameters.
    """

    def __init__(self, weights: WeightMap) -> None:
        """Copies what is not float32."""
        self._model = weights
        self.weights = WeightMap(
            {
                name: replace(weight, parameter=nn.Parameter(weight.parameter.detach().float()))
                for name, weight in weights.items()
            },
            weights.adapter_name,
            weights.adapter_settings,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters by canonical name."""
        masters: dict[str, Any] = {name: each.parameter for name, each in self.weights.items()}
        return masters

    def write(self) -> None:
        """Gives the model the masters' values, in its dtype."""
        for name, weight in self._model.items():
            if weight.parameter.dtype != torch.float32:
                write(weight.parameter, self.weights[name].parameter)


class Training:
    """Weights, their optimizer and their masks.

    Attributes:
        masters: what is trained.
        rising: their masks, which count the steps.
        optimizer: AdamW, of the prunable weights alone: masks hold nothing else.
    """

    def __init__(self, masters: Masters, rising: RisingMasks, lr: float) -> None:
        """Starts with fresh moments; the learning rate falls linearly from `lr` to zero."""
        self.masters = masters
        self.rising = rising
        self._lr = lr
        # PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
        self.optimizer = torch.optim.AdamW(masters.parameters.values(), lr=lr)

    def run(
        self,
        probe: LossProbe,
        batches: Iterable[Batch],
        stepped: Callable[[int], None],
    ) -> None:
        """A step with every batch.

        Args:
            probe: attached to the model.
            batches: those from the next step on.
            stepped: called after every step with the number of steps done.
        """
        for batch in batches:
            gradients = probe.measure(batch, self.rising.step)
            if gradients is not None:  # else the batch was left out, which costs a step
                self._step(gradients)
            chosen = self.rising.advance()
            if chosen or self.rising.held:
                self._zero()
            self.masters.write()
            stepped(self.rising.step)

    def _step(self, gradients: dict[str, torch.Tensor]) -> None:
        self.rising.observe(gradients)
        for name, master in self.masters.parameters.items():
            master.grad = gradients.get(name)
            if master.grad is not None and self.rising.held:
                zero_outside(master.grad, self.rising.keep[name])
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * (1 - self.rising.step / self.rising.rise.timetable.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _zero(self) -> None:
        for name, master in self.masters.parameters.items():
            zero_outside(master, self.rising.keep[name])
