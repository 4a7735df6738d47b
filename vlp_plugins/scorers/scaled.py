"""A score times a factor of the weight that it is of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from vlp_plugins.cuts import Cut
from vlp_plugins.intrinsic.factors import Factors
from vlp_plugins.scorers.base import Evidence, Scorer
from vlp_plugins.scorers.magnitude import Magnitude

_INFINITY = 0x7F800000


class Scaled(Scorer):
    """Another score, multiplied by the factor of the weight.

    A constant per tensor cannot change a ranking inside the tensor. It changes how many elements
    each tensor loses where tensors are compared with each other: allocations read this score. The
    scores themselves are taken not to be negative: a greater factor means more importance.
    """

    name = "scaled"

    def __init__(self, scorer: Scorer, factors: Factors) -> None:
        """Wraps a scorer.

        Args:
            scorer: ranks the elements of a tensor.
            factors: of all weights that it will be asked about.
        """
        self.name = scorer.name  # type: ignore[misc]
        self.needs = scorer.needs  # type: ignore[misc]
        self.elementwise = scorer.elementwise  # type: ignore[misc]
        self.scorer = scorer
        self.factors = factors

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        scores = self.scorer.score(weight, evidence)
        factor = self.factors.relative(evidence.name)
        # A second tensor of this size costs more time than the product; those of other scorers may
        # be somebody's.
        return scores.mul_(factor) if type(self.scorer) is Magnitude else scores * factor


def before_scaling(cuts: Mapping[str, Cut], factors: Factors) -> dict[str, Cut | None]:
    """Cuts of scaled scores as cuts of the scores before they were multiplied.

    Rounding can make a product of two scores that differ equal. A cut that takes all of the
    elements at its threshold, or none, is one of the scores themselves; one that takes a part of
    them would have to choose among them by their scores.

    Args:
        cuts: by canonical name, of `Scaled` scores.
        factors: that they were multiplied by.

    Returns:
        By name the cut that removes as many elements; None for one that takes a part.
    """
    names = [name for name, cut in cuts.items() if np.isfinite(cut.threshold)]
    scales = np.array([factors.relative(name) for name in names], dtype=np.float32)
    limits = np.array([cuts[name].threshold for name in names], dtype=np.float32)
    whole = np.array([cuts[name].ties == cuts[name].equal for name in names], dtype=bool)
    found: dict[str, Cut | None] = dict(cuts)
    for name, threshold in zip(names, _last_below(scales, limits, whole).tolist(), strict=True):
        cut = cuts[name]
        parted = 0 < cut.ties < cut.equal
        found[name] = None if parted else Cut(cut.remove, threshold)
    return found


def _last_below(scales: np.ndarray, limits: np.ndarray, inclusive: np.ndarray) -> np.ndarray:
    """For each limit the greatest float32 whose product with the scale is below (or at) it."""
    low = np.full(len(limits), -_INFINITY - 1, dtype=np.int64)  # keys: the order of float32 values
    high = np.full(len(limits), _INFINITY, dtype=np.int64)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        with np.errstate(over="ignore", under="ignore"):
            products = _value(middle) * scales
        below = np.where(inclusive, products <= limits, products < limits)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return _value(low)


def _value(keys: np.ndarray) -> np.ndarray:
    keys = keys.astype(np.int32)
    return np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).astype(np.int32).view(np.float32)
