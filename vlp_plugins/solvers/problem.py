"""The problem of CHITA as a value: a quadratic model of the loss, and how many weights may stay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.solvers.importance import Importance
from vlp_plugins.solvers.ranking import top_by
from vlp_plugins.solvers.rows import Rows


@dataclass(frozen=True)
class Problem:
    """Minimise F over vectors with at most `keep` non-zeros (Benbaki et al., ICML 2023, eq. 5).

        F(w) = 1/2 |A (w - v)|^2 + n ridge / 2 |w - v|^2 + first_order 1'A w

    with the dense weights v `[p]` and the rows A `[n, p]`, gradients of n batches. F is n times the
    usual second-order model of the loss, the empirical Fisher matrix A'A / n for its Hessian.

    Attributes:
        weights: v, float32 `[p]`.
        rows: A.
        ridge: lambda > 0.
        keep: number of weights that stay, 0 to p.
        first_order: weight c >= 0 of the first-order term; 0 leaves it out. The published code of
            MULTIFLOW has 1 / (samples in a batch).
        bounds: boundaries of the blocks of the block-diagonal approximation, the first 0, the last
            p, ascending (equal neighbours are empty blocks); None for the full problem.
        importance: factors of the columns. They say nothing about F: they multiply |v| where one
            threshold over the whole vector decides how many weights each block keeps, and in the
            full problem where it is the whole search (`published`). None: 1.
    """

    weights: torch.Tensor
    rows: Rows
    ridge: float
    keep: int
    first_order: float = 0.0
    bounds: tuple[int, ...] | None = None
    importance: Importance | None = None

    def __post_init__(self) -> None:
        p = self.rows.p
        if self.weights.shape != (p,):
            raise UnsupportedError(
                f"{list(self.weights.shape)} weights do not fit rows of {p} columns"
            )
        if not self.ridge > 0 or self.ridge == float("inf"):
            raise UnsupportedError(
                f"the ridge penalty lambda must be above 0, not {self.ridge:g}; 0.1 is a good start"
            )
        if not self.first_order >= 0:
            raise UnsupportedError(f"first_order is a weight >= 0, not {self.first_order:g}")
        if not 0 <= self.keep <= p:
            raise UnsupportedError(f"{self.keep} of {p} weights cannot be kept")
        if not bool(torch.isfinite(self.weights.sum())):
            raise NonFiniteError("the weights of the problem hold NaN or infinity")
        if self.bounds is not None:
            ascending = all(start <= stop for start, stop in pairwise(self.bounds))
            if self.bounds[:1] != (0,) or self.bounds[-1:] != (p,) or not ascending:
                raise UnsupportedError(f"block bounds go from 0 to {p} in ascending order")
        if self.importance is not None and self.importance.bounds[-1] != p:
            raise UnsupportedError(
                f"factors of {self.importance.bounds[-1]} columns do not fit rows of {p}"
            )

    def weighed(self, values: torch.Tensor, entries: slice = slice(None)) -> torch.Tensor:
        """Values times the importance of their columns, in place.

        Args:
            values: of the columns in `entries`.
            entries: of any step above 0.
        """
        return values if self.importance is None else self.importance.times(values, entries)

    def largest(self) -> torch.Tensor:
        """Bool `[p]`: the `keep` weights of the largest |v|, times their importance."""
        return top_by(
            lambda entries: self.weighed(self.weights[entries].abs(), entries),
            self.rows.p,
            self.keep,
            self.weights.device,
        )


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        values: float32 `[p]`, exactly 0 outside the support.
        support: bool `[p]`, `keep` of them true; values inside may be 0.
        objective: F of `values`, in float64, full problem or not.
    """

    values: torch.Tensor
    support: torch.Tensor
    objective: float
