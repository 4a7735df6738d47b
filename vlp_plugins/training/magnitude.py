"""Magnitude while training: |w| at the moment."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.scoring.score import Evidence
from vlp_plugins.training.base import State, TrainingScore


class CurrentMagnitude(TrainingScore):
    """Zhu & Gupta, "To prune, or not to prune" (ICLR 2018 workshop): |w| whenever masks are chosen.

    It remembers nothing and reads no gradients.
    """

    name: ClassVar[str] = "magnitude"
    reads_gradients: ClassVar[bool] = False

    def fold(self, state: State, sample: torch.Tensor) -> None:
        """There is nothing to remember."""

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return weight.float().abs()
