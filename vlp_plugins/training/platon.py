"""PLATON: the upper confidence bound of importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.training.base import State, TrainingScore

BETA1 = 0.85
BETA2 = 0.95
"""The published defaults; some published runs at higher sparsity take a lower one, down to 0.65."""
MEAN = "sensitivity"
SPREAD = "uncertainty"


def smooth(
    mean: torch.Tensor, spread: torch.Tensor, sample: torch.Tensor, beta1: float, beta2: float
) -> None:
    """One step of both moving averages, in place.

    I' = b1 I' + (1 - b1) I, then U' = b2 U' + (1 - b2) |I - I'|.

    Args:
        mean: I', smoothed sensitivity.
        spread: U', smoothed uncertainty, same shape.
        sample: I, the sensitivity now; overwritten.
        beta1: b1.
        beta2: b2.
    """
    mean.mul_(beta1).add_(sample, alpha=1 - beta1)
    spread.mul_(beta2).add_(sample.sub_(mean).abs_(), alpha=1 - beta2)


@dataclass(frozen=True)
class Platon(TrainingScore):
    """Zhang et al., "PLATON" (ICML 2022): I' U'.

    I = |w g| of the weight and gradient of a step; I' and U' are `smooth`ed. A weight of little
    importance stays if little is known about it. Samples are averaged over the steps of a window
    first, as the published code does, so that `every` steps are one step of the averages. That
    code multiplies the gradient with the weight after the step; here it is the weight that the
    gradient was taken at, as in the paper.

    The averages start at 0 and are not corrected for it: that is a factor common to all elements.

    Attributes:
        beta1: of the sensitivity, in [0, 1).
        beta2: of the uncertainty, in [0, 1).
    """

    beta1: float = BETA1
    beta2: float = BETA2

    name: ClassVar[str] = "platon"
    remembers: ClassVar[tuple[str, ...]] = (MEAN, SPREAD)

    def __post_init__(self) -> None:
        for key, beta in self.parameters.items():
            if not 0 <= beta < 1:
                raise UnsupportedError(f"{key}={beta}; a smoothing factor lies in [0, 1)")

    @property
    def parameters(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2}

    def fold(self, state: State, sample: torch.Tensor) -> None:
        for key in self.remembers:
            if key not in state:
                state[key] = torch.zeros_like(sample)
        smooth(state[MEAN], state[SPREAD], sample, self.beta1, self.beta2)

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        known = evidence.statistics
        return torch.mul(known[MEAN], known[SPREAD]).reshape(weight.shape)
