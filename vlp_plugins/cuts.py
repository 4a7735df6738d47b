"""A cut: the threshold of one tensor with an exact count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

ScoreSource = Callable[[], torch.Tensor]
"""Computes the float32 scores of one tensor, the same every time."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements of one tensor go: all below `threshold` and the first `ties` equal to it.

    Attributes:
        remove: how many elements go.
        threshold: score at which the cut lies; -inf removes none, +inf all.
        ties: how many of the elements equal to the threshold are among the removed; the first
            ones by position.
        equal: how many elements are equal to the threshold.
    """

    remove: int
    threshold: float
    ties: int = 0
    equal: int = 0

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """True where an element stays; bool, shape of `scores`."""
        if self.remove == 0:
            return torch.ones_like(scores, dtype=torch.bool)  # also those of -inf
        keep = _above(scores, self.threshold)
        if self.ties < self.equal:
            places = torch.nonzero((scores == self.threshold).flatten())[self.ties :, 0]
            keep.view(-1)[places] = True
        return keep


def _above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    if scores.device.type != "cpu":
        return scores > threshold
    # NumPy compares several times as fast as torch on a CPU; the threshold is a float32 exactly.
    return torch.from_numpy(np.asarray(scores.numpy() > np.float32(threshold)))


KEEP_ALL = Cut(0, -math.inf)


def pick(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`values[chosen]` of two 1-D tensors; on the CPU by NumPy, which is three times as fast."""
    if values.device.type != "cpu":
        return values[chosen]
    return torch.from_numpy(np.compress(chosen.numpy(), values.numpy()))
