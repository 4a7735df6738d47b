"""Factors of importance, one per weight, and a score multiplied by them."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from vlp_plugins.runtime.errors import StatisticsError, suggest
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Evidence, Scorer, scores_of
from vlp_plugins.scoring.threshold import Cut

GUIDED = "id*"
"""Before the name of a method whose importance is multiplied by factors."""


class Factors(Mapping[str, float]):
    """By canonical name of a weight the factor that its importance is multiplied by.

    Example:
        method = make_method(registry(), "multiflow").with_factors({"vision.0.fc1": 2.0, ...})
    """

    def __init__(
        self, values: Mapping[str, float], source: Mapping[str, Any] | None = None
    ) -> None:
        """Checks that the factors are finite and above 0.

        Args:
            values: by canonical name.
            source: where they come from, as JSON can keep it; None: unknown.

        Raises:
            StatisticsError: naming the first that is no such number.
        """
        self._values = {name: float(value) for name, value in values.items()}
        self._source = dict(source or {})
        for name, value in self._values.items():
            if not 0 < value < math.inf:
                raise StatisticsError(
                    f"the factor of {name!r} is {value:g}; factors are finite and above 0"
                )
        greatest = max(self._values.values(), default=1.0)
        self._unit = 2.0 ** min(math.ceil(math.log2(greatest)), sys.float_info.max_exp - 1)

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Factors:
        """The same factors as they are, or made of a plain mapping."""
        return values if isinstance(values, cls) else cls(values)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def relative(self, name: str) -> float:
        """The factor in (0, 1], rounded to float32, in a unit that all factors share.

        The unit is a power of two, so products with float32 scores are rounded as those of the
        factors themselves: no comparison changes, and no finite score becomes infinite.
        """
        return float(np.float32(self._values[name] / self._unit))

    @property
    def fingerprint(self) -> str:
        """Hash of names and values, whatever their order."""
        text = json.dumps(sorted((name, value.hex()) for name, value in self.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """For the manifest of masks."""
        known = {"id_profile": self._source} if self._source else {}
        return {"id_factors": self.fingerprint, **known}

    def check(self, names: Iterable[str]) -> None:
        """Makes sure that every weight has a factor.

        Raises:
            StatisticsError: naming the first that has none.
        """
        for name in names:
            if name not in self._values:
                raise StatisticsError(
                    f"there is no factor for weight {name!r}{suggest(name, list(self._values))}"
                )


def guided_name(name: str) -> str:
    """`id*omp` of `omp`."""
    return f"{GUIDED}{name}"


_INFINITY = 0x7F800000


class Scaled(Scorer):
    """Another score, multiplied by the factor of the weight.

    A constant per tensor cannot change a ranking inside the tensor. It changes how many elements
    each tensor loses where tensors are compared with each other: allocations read this score. The
    scores themselves are taken not to be negative: a greater factor means more importance.
    """

    name = "scaled"

    def __init__(self, scorer: Scorer, factors: Factors) -> None:
        self.name = scorer.name  # type: ignore[misc]
        self.needs = scorer.needs  # type: ignore[misc]
        self.elementwise = scorer.elementwise  # type: ignore[misc]
        self.scorer = scorer
        self.factors = factors

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        scores = scores_of(self.scorer, weight, evidence)
        factor = self.factors.relative(evidence.name)
        # A second tensor of this size costs more time than the product; other scorers may return
        # a tensor that is kept elsewhere.
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
