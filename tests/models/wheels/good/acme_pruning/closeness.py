"""A score: weights near the mean of their tensor matter least."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.extend import Evidence, Scorer


class ClosenessToMean(Scorer):
    """|w - mean(W)| ** power."""

    name: ClassVar[str] = "closeness_to_mean"

    def __init__(self, *, power: float = 1.0) -> None:
        """Sets the exponent, which matters only between tensors."""
        self.power = power

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        values = weight.detach().float()
        return (values - values.mean()).abs() ** self.power
