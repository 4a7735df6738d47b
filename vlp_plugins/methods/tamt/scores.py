"""What mask training trains by default: signed scores that start from the magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from vlp_plugins.methods.tamt.cutting import Cutting
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.lamp import lamp
from vlp_plugins.scoring.selection import Selection

LEARNING_RATE = 0.04
LARGEST_STEP = 2.0
"""In root mean squares: a step is at most that many times the learning rate."""
_LEAST = torch.finfo(torch.float32).tiny
MAGNITUDE = "magnitude"


def _log_magnitude(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().abs().clamp_min_(_LEAST).log_()


def _half_log_lamp(weight: torch.Tensor) -> torch.Tensor:
    return lamp(weight).clamp_min_(_LEAST).log_().div_(2)


STARTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    MAGNITUDE: _log_magnitude,
    "lamp": _half_log_lamp,
}
"""First scores of a weight, by the score of which they are the logarithm."""


class SignedScores:
    """Scores S, one per weight; the largest stay.

    They start at log |w|, so the first mask is that of the magnitudes, at the target sparsity
    already, and a step of 0.7 crosses a factor of two in magnitude; or at half the logarithm of
    LAMP's score, which is a square: the ranking within a tensor is the same then, and tensors of
    small weights start higher. The straight-through gradient
    dL/dS = dL/dW * w reaches the removed weights too: one whose return would lower the loss rises
    until it is back.

    The step is plain gradient descent, with the gradient divided by its root mean square over the
    model and its few largest elements cut off: a model that pruning has broken has gradients that
    point no more than roughly, and a few enormous ones would swap whole neurons at the first step.
    A step of the same size for every element, as Adam makes it, needs more steps than there are:
    it moves the many elements without influence as far as those that matter.

    A factor of a tensor multiplies its magnitudes: its scores start higher by the logarithm.

    Attributes:
        values: S by canonical name, float32, of the weight's shape.
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        cutting: Cutting,
        learning_rate: float = LEARNING_RATE,
        factors: Factors | None = None,
        start: str = MAGNITUDE,
    ) -> None:
        """Starts from the magnitudes, or from LAMP's scores.

        Args:
            dense: the weights by canonical name.
            cutting: what removes the smallest scores.
            learning_rate: how far an element whose gradient is the root mean square moves in the
                first step.
            factors: by canonical name; None: 1.
            start: a key of `STARTS`.
        """
        self._dense = dense
        self._cutting = cutting
        self._rate = learning_rate
        self.values = {name: STARTS[start](weight) for name, weight in dense.items()}
        if factors is not None:
            for name, values in self.values.items():
                values.add_(math.log(factors.relative(name)))

    def chosen(self) -> tuple[Mapping[str, Selection], Mapping[str, torch.Tensor]]:
        """What stays now, and the scores that say so."""
        return self._cutting.select(self.values), self.values

    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step of gradient descent.

        Args:
            gradients: of the loss by the weights as they were under the mask, by canonical name;
                overwritten.
            factor: of the learning rate.
        """
        squares = 0.0
        for name, gradient in gradients.items():
            gradient.mul_(self._dense[name])
            squares += float(gradient.double().square().sum())
        count = sum(value.numel() for value in self.values.values())
        if squares == 0:
            return
        scale = (squares / count) ** 0.5
        largest = LARGEST_STEP * scale
        for name, gradient in gradients.items():
            step = gradient.clamp_(-largest, largest)
            self.values[name].sub_(step, alpha=self._rate * factor / scale)
