"""Wanda: weight magnitude times the norm of the input feature."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.calibration.moments import (
    INPUT_SECOND_MOMENT,
    ActivationStatistic,
    InputSecondMoment,
)
from vlp_plugins.scoring.score import Evidence, Scorer, in_range


def wanda(weight: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """|W_ij| * a_j with a_j the root of the second moment of input j.

    Args:
        weight: `[out, in]`, any floating dtype.
        second_moment: `[in]`, non-negative, in any unit common to the layer.

    Returns:
        float32, `[out, in]`.
    """
    norm = in_range(second_moment.sqrt()).to(weight.device, torch.float32)
    return in_range(weight.float().abs()) * norm


class Wanda(Scorer):
    """Wanda (Sun et al., ICLR 2024): magnitude times the norm of the input.

    The paper compares the elements of one output neuron: use it with row-wise allocation, which
    the method `wanda` does.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[tuple[ActivationStatistic, ...]] = (InputSecondMoment(),)

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return wanda(weight, evidence.statistics[INPUT_SECOND_MOMENT])
