"""Masks of scores that are trained: exact counts under any allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.scoring.allocation import Allocation
from vlp_plugins.scoring.score import Evidence, Scorer
from vlp_plugins.scoring.selection import Scored, Selection

_SCORE = "trained"


class Trained(Scorer):
    """The scores themselves, handed over as what is known about the weights."""

    name: ClassVar[str] = "tamt"
    elementwise: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return evidence.statistics[_SCORE].view(weight.shape)


@dataclass(frozen=True)
class Cutting:
    """What stays, given scores.

    Attributes:
        weights: what the scores are of.
        allocation: how the target is shared out among tensors.
        target: sparsity.
        floor: least fraction that every tensor keeps.
        published: remove all elements that are equal to the threshold.
    """

    weights: WeightMap
    allocation: Allocation
    target: Target
    floor: float = 0.0
    published: bool = False

    def select(self, scores: Mapping[str, torch.Tensor]) -> Mapping[str, Selection]:
        """For every weight what chooses among its scores.

        Args:
            scores: float32, by canonical name, of the weight's shape.

        Raises:
            SparsityError: if the target cannot be met.
        """
        evidence = {
            name: Evidence(name, 0, {_SCORE: score.flatten()}) for name, score in scores.items()
        }
        scored = Scored(Trained(), self.weights, evidence, self.published)
        return self.allocation.select(scored, [self.target], floor=self.floor)[0]
