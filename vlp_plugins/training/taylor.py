"""First-order Taylor expansion while training: |w g|, averaged since masks were last chosen."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.scoring.score import Evidence
from vlp_plugins.training.base import State, TrainingScore

IMPORTANCE = "importance"


class Taylor(TrainingScore):
    """Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019).

    The mean of |w g| over the steps since masks were last chosen, as they average over the
    mini-batches between two prunings; of single elements, with the absolute value instead of its
    square, as PLATON's comparison has it. With `every=1` it is |w g| of one step alone. Nothing
    older counts: what is smoothed over all steps is PLATON.

    The one-shot score of this name, |w g| of the mean gradient of a model that is not trained, is
    the method `snip`.
    """

    name: ClassVar[str] = "taylor"
    remembers: ClassVar[tuple[str, ...]] = (IMPORTANCE,)

    def fold(self, state: State, sample: torch.Tensor) -> None:
        state[IMPORTANCE] = sample

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return evidence.statistics[IMPORTANCE].reshape(weight.shape)
