"""Second moments of a layer's input: what MULTIFLOW and Wanda know about the data."""

from __future__ import annotations

import torch

from vlp_plugins.models.weights import Weight
from vlp_plugins.statistics.base import ActivationStatistic

INPUT_SECOND_MOMENT = "input_second_moment"

# Elements of the block that squares are added into: 256 KiB of float32, so that the block and the
# rows that it reads stay in a core's cache. A reduction over dimension 0 of the whole tensor
# (vecdot, (x * x).sum(0)) writes its squares to memory first and took up to 25 times as long on
# [4616, 3072]; einsum and vector_norm walk down columns and took still longer.
_BLOCK = 1 << 16


def sum_of_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the squared inputs.

    On CPU row r of a small block sums the tokens r, r + rows, r + 2 * rows, ..., then the rows are
    added: short sums in float32 lose less than one long one, and no temporary has the size of the
    input.

    Args:
        inputs: `[tokens, in_features]`, any floating dtype.

    Returns:
        `[in_features]`, float32.
    """
    if inputs.device.type != "cpu":
        values = inputs.float()
        return torch.linalg.vecdot(values, values, dim=0)
    tokens, features = inputs.shape
    rows = max(1, min(tokens, max(8, _BLOCK // max(1, features))))
    block = inputs.new_zeros((rows, features), dtype=torch.float32)
    for part in inputs.split(rows):
        values = part.float()
        block[: len(part)].addcmul_(values, values)
    return block.sum(0)


class InputSecondMoment(ActivationStatistic):
    """Sum over samples and real tokens of x_j^2, per input feature j.

    Divided by the number of samples it is a_j^2 of MULTIFLOW (Farina et al., CVPR 2024): the
    published code divides by samples, not tokens (quirk M1); within a tensor only ratios matter.
    """

    name = INPUT_SECOND_MOMENT

    def size(self, weight: Weight) -> int:
        return weight.rows_and_columns[1]

    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        return sum_of_squares(inputs)
