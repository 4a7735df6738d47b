"""What a score is that a training loop feeds, step after step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from vlp_plugins.scoring.score import Scorer

State = dict[str, torch.Tensor]
"""What a score remembers of one weight: float32 `[numel]` by name."""


class TrainingScore(Scorer):
    """A score of weights and their gradients at many steps of a training.

    Every step gives a sample per element; the mean over the steps of a window, from one choice of
    masks to the next, is folded into the state; `score` ranks by it, and finds the state among the
    statistics of its evidence.

    Attributes:
        reads_gradients: whether there are samples; False for a score of the weights alone.
        remembers: the names of what `fold` keeps.
    """

    elementwise: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    remembers: ClassVar[tuple[str, ...]] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """What was set, for the manifest of masks."""
        return {}

    def sample(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What one step says about every element: |w g|, unless a score says otherwise.

        Args:
            weight: before the step, any shape and floating dtype; not to be modified.
            gradient: of the loss by it, same shape, float32.

        Returns:
            float32, same shape, a new tensor.
        """
        return sensitivity(weight, gradient)

    @abstractmethod
    def fold(self, state: State, sample: torch.Tensor) -> None:
        """Takes the mean sample of a window into the state, in place.

        Args:
            state: of one weight; empty at first.
            sample: float32 `[numel]`; may be kept or overwritten.
        """


def sensitivity(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w g|: to first order how much the loss changes if the element is removed.

    Args:
        weight: any shape and floating dtype.
        gradient: same shape, float32.

    Returns:
        float32, same shape.
    """
    return torch.mul(weight.float(), gradient).abs_()
