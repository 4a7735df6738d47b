"""Factors of the columns of a problem: how much more a weight of the same size is worth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from vlp_plugins.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class Importance:
    """Factors that are constant on ranges of columns; nothing of length p is kept.

    Attributes:
        bounds: where the ranges begin and end, the first 0, the last p, ascending.
        factors: of every range, above 0.
    """

    bounds: tuple[int, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(start <= stop for start, stop in pairwise(self.bounds))
        if self.bounds[:1] != (0,) or not ascending:
            raise UnsupportedError("ranges of columns go from 0 to p in ascending order")
        if len(self.factors) != len(self.bounds) - 1 or min(self.factors, default=1.0) <= 0:
            raise UnsupportedError(
                f"{len(self.bounds) - 1} ranges of columns have as many factors above 0, not "
                f"{list(self.factors)}"
            )

    def times(self, values: torch.Tensor, entries: slice = slice(None)) -> torch.Tensor:
        """Values times the factors of their columns, in place.

        Args:
            values: of the columns in `entries`, one each.
            entries: a slice of all columns, of any step above 0.
        """
        first, last, step = entries.indices(self.bounds[-1])
        for (start, stop), factor in zip(pairwise(self.bounds), self.factors, strict=True):
            low, high = max(start, first), min(stop, last)
            if low < high:  # positions of the first column from `low` and from `high` on
                values[-((first - low) // step) : -((first - high) // step)].mul_(factor)
        return values
