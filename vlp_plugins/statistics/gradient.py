"""The gradient of the pre-training loss, averaged over batches: what SNIP knows about the data."""

from __future__ import annotations

import torch

from vlp_plugins.models.weights import Weight
from vlp_plugins.statistics.base import LossStatistic

MEAN_GRADIENT = "mean_gradient"


class MeanGradient(LossStatistic):
    """Sum over batches of dL_b/dW, L_b the loss of batch b; the mean divides by the batches.

    The losses are means over a batch, so batches count alike, whatever their size. A weight that
    several modules use has the sum of the gradients of all uses.
    """

    name = MEAN_GRADIENT

    def size(self, weight: Weight) -> int:
        return weight.numel

    def measure(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flatten()
