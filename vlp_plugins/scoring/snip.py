"""SNIP: how much the loss would change, to first order, if a weight were removed."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.calibration.moments import MEAN_GRADIENT, MeanGradient, Statistic
from vlp_plugins.scoring.score import Evidence, Scorer


def snip(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|g * w| with g the mean gradient.

    Args:
        weight: `[out, in]`, any floating dtype.
        gradient: as many elements, in the order of the weight's, in any unit common to the model.

    Returns:
        float32, `[out, in]`.
    """
    gradient = gradient.to(weight.device, torch.float32).reshape(weight.shape)
    return torch.mul(weight.float(), gradient).abs_()


class Snip(Scorer):
    """SNIP (Lee et al., ICLR 2019): how much the loss would change without a weight.

    Equation 6 without its division by the sum over the model, which changes no mask. The published
    MULTIFLOW code takes it with the pre-training losses and compares over the whole model.
    """

    name: ClassVar[str] = "snip"
    elementwise: ClassVar[bool] = True
    needs: ClassVar[tuple[Statistic, ...]] = (MeanGradient(),)

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return snip(weight, evidence.statistics[MEAN_GRADIENT])
