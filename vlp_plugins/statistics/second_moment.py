"""Second moments of a layer's input: what MULTIFLOW and Wanda know about the data."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.statistics.base import ActivationStatistic
from vlp_plugins.weights import Weight

INPUT_SECOND_MOMENT = "input_second_moment"


def sum_of_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared inputs.

    Args:
        inputs: `[tokens, in_features]`, any floating dtype.

    Returns:
        `[in_features]`, float32.
    """
    values = inputs.float()
    return torch.linalg.vecdot(values, values, dim=0)


class InputSecondMoment(ActivationStatistic):
    """Sum over samples and real tokens of x_j^2, per input feature j.

    Divided by the number of samples it is a_j^2 of MULTIFLOW (Farina et al., CVPR 2024): the
    published code divides by samples, not tokens (quirk M1); within a tensor only ratios matter.
    """

    name: ClassVar[str] = INPUT_SECOND_MOMENT

    def size(self, weight: Weight) -> int:
        return weight.matrix.shape[1]

    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum_of_squares(inputs)
