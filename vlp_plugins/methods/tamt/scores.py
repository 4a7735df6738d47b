"""The scores that mask training trains: signed by default, absolute in the published variant."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.parallel import on_host
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.lamp import lamp
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored
from vlp_plugins.scoring.threshold import find_cuts

_SCORE = "trained"


class Trained(Scorer):
    """The trained scores themselves, which the evidence holds."""

    name: ClassVar[str] = "tamt"
    elementwise: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return evidence.statistics[_SCORE].view(weight.shape)


@dataclass(frozen=True)
class MaskRule:
    """What stays, given scores.

    Attributes:
        weights: what the scores are of.
        allocation: how many elements each tensor keeps.
        target: sparsity.
        floor: least fraction that every tensor keeps.
        published: remove all elements that are equal to the threshold.
    """

    weights: WeightMap
    allocation: Allocation
    target: Target
    floor: float = 0.0
    published: bool = False

    def masks(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By canonical name a bool mask of the weight's shape, true where an element stays.

        Args:
            scores: float32, by canonical name, of the weight's shape.

        Raises:
            SparsityError: if the target cannot be met.
        """
        evidence = {
            name: Evidence(name, 0, {_SCORE: score.flatten()}) for name, score in scores.items()
        }
        scored = Scored(Trained(), self.weights, evidence, self.published)
        chosen = self.allocation.select(scored, [self.target], floor=self.floor)[0]
        return {
            name: chosen[name].mask(scores[name].flatten(1)).view(weight.shape)
            for name, weight in self.weights.items()
        }


class Scores(ABC):
    """What is trained: one number per weight.

    Attributes:
        values: by canonical name, float32, of the weight's shape.
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        rule: MaskRule,
        learning_rate: float,
        values: dict[str, torch.Tensor],
    ) -> None:
        self._dense, self._rule, self._rate = dense, rule, learning_rate
        self.values = values

    def scores(self) -> dict[str, torch.Tensor]:
        """By canonical name what tensors are compared by; the largest stay."""
        return self.values

    def masks(self) -> dict[str, torch.Tensor]:
        """What stays now; see `MaskRule.masks`."""
        return self._rule.masks(self.scores())

    @abstractmethod
    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step of the optimizer.

        Args:
            gradients: of the loss with respect to the masked weights, by canonical name; may be
                overwritten.
            factor: of the learning rate.
        """


PUBLISHED_LEARNING_RATE = 5e-5
ALPHA = 2.0
"""Masks start at this multiple of the threshold."""


class PublishedScores(Scores):
    """Real-valued masks M; |M| decides, and the straight-through gradient goes through |.|.

    With their defects: the first step runs with every weight removed (quirk tamt-T1), and what
    starts at 0 has no gradient and stays there (quirk tamt-T2).
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        rule: MaskRule,
        sparsity: float,
        learning_rate: float = PUBLISHED_LEARNING_RATE,
        factors: Factors | None = None,
    ) -> None:
        """Starts from the magnitudes.

        Args:
            dense: the weights by canonical name.
            rule: removes the smallest scores.
            sparsity: of the whole, and of every tensor's mask at the start.
            learning_rate: of the first step.
            factors: what multiplies |M| where tensors are compared; None: nothing.
        """
        super().__init__(dense, rule, learning_rate, initial_masks(dense, sparsity))
        self._factors = factors
        # PyTorch's defaults, as published: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
        self._optimizer = torch.optim.AdamW(self.values.values(), lr=learning_rate)

    def scores(self) -> dict[str, torch.Tensor]:
        """|M| by canonical name, times the factors."""
        sizes = {name: value.abs() for name, value in self.values.items()}
        if self._factors is not None:
            for name, size in sizes.items():
                size.mul_(self._factors.relative(name))
        return sizes

    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        for name, value in self.values.items():
            gradient = gradients.get(name)
            if gradient is None:
                value.grad = None
                continue
            value.grad = gradient * self._dense[name].float() * value.sign()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * factor
        self._optimizer.step()
        for value in self.values.values():
            value.grad = None


def initial_masks(dense: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """2 t where |w| is at least t_l, else 0; all alike where nothing is to go.

    t is the k-th smallest |w| of all, k = int(s N), and t_l that of the tensor, k_l = int(s n).

    Args:
        dense: weights by canonical name.
        sparsity: s.

    Returns:
        float32, of the weights' shapes.
    """
    total = sum(weight.numel() for weight in dense.values())
    device = next(iter(dense.values())).device
    sources = {name: lambda w=weight: w.float().abs() for name, weight in dense.items()}
    everywhere = find_cuts(sources, [int(sparsity * total)], device=device)[0]
    value = ALPHA * next(iter(everywhere.values())).threshold
    if math.isinf(value):  # nothing is to go
        value = 1.0
    masks = {}
    for name, weight in dense.items():
        own = find_cuts({name: sources[name]}, [int(sparsity * weight.numel())], device=device)
        reached = weight.float().abs() >= own[0][name].threshold
        masks[name] = reached.float().mul_(value)
    return masks


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


class SignedScores(Scores):
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
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        rule: MaskRule,
        learning_rate: float = LEARNING_RATE,
        factors: Factors | None = None,
        start: str = MAGNITUDE,
    ) -> None:
        """Starts from the magnitudes, or from LAMP's scores.

        Args:
            dense: the weights by canonical name.
            rule: removes the smallest scores.
            learning_rate: how far an element whose gradient is the root mean square moves in the
                first step.
            factors: by canonical name; None: 1.
            start: a key of `STARTS`.
        """
        values = {name: STARTS[start](weight) for name, weight in dense.items()}
        super().__init__(dense, rule, learning_rate, values)
        if factors is not None:
            for name, value in values.items():
                value.add_(math.log(factors.relative(name)))

    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        for name, gradient in gradients.items():
            gradient.mul_(self._dense[name])
        squares = sum(on_host([g.double().square().sum() for g in gradients.values()]).tolist())
        count = sum(value.numel() for value in self.values.values())
        if squares == 0:
            return
        scale = (squares / count) ** 0.5
        largest = LARGEST_STEP * scale
        for name, gradient in gradients.items():
            step = gradient.clamp_(-largest, largest)
            self.values[name].sub_(step, alpha=self._rate * factor / scale)
