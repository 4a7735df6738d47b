"""What the published code of MULTIFLOW trains: absolute values of masks, by AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vlp_plugins.methods.tamt.cutting import Cutting
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.selection import Selection
from vlp_plugins.scoring.threshold import find_cuts

LEARNING_RATE = 5e-5
BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
ALPHA = 2.0
"""Masks start at this multiple of the threshold."""


class PublishedScores:
    """Real-valued masks M; |M| decides, and the straight-through gradient goes through |.|.

    With their defects: the first step runs with every weight removed (quirk T1), and what starts at
    0 has no gradient and stays there (T2).

    Attributes:
        values: M by canonical name, float32, of the weight's shape.
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        cutting: Cutting,
        sparsity: float,
        learning_rate: float = LEARNING_RATE,
        factors: Factors | None = None,
    ) -> None:
        """Starts from the magnitudes.

        Args:
            dense: the weights by canonical name.
            cutting: what removes the smallest scores.
            sparsity: of the whole, and of every tensor's mask at the start.
            learning_rate: of the first step.
            factors: what multiplies |M| where tensors are compared; None: nothing.
        """
        self._dense = dense
        self._factors = factors
        self._cutting = cutting
        self._rate = learning_rate
        self.values = initial_masks(dense, sparsity)
        self._optimizer = torch.optim.AdamW(
            self.values.values(),
            lr=learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )

    def scores(self) -> dict[str, torch.Tensor]:
        """|M| by canonical name, times the factors."""
        sizes = {name: value.abs() for name, value in self.values.items()}
        if self._factors is not None:
            for name, size in sizes.items():
                size.mul_(self._factors.relative(name))
        return sizes

    def chosen(self) -> tuple[Mapping[str, Selection], Mapping[str, torch.Tensor]]:
        """What stays now, and the scores that say so."""
        scores = self.scores()
        return self._cutting.select(scores), scores

    def step(self, gradients: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step of AdamW.

        Args:
            gradients: of the loss by the weights as they were under the mask, by canonical name.
            factor: of the learning rate.
        """
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
