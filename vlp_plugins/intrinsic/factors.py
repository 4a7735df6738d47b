"""Factors of importance, one per weight: what an intrinsic dimension does to a pruning method."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vlp_plugins.runtime.errors import StatisticsError, suggest

GUIDED = "id*"
"""What stands before the name of a method whose importance is multiplied by factors."""


class Factors(Mapping[str, float]):
    """By canonical name of a weight the factor that its importance is multiplied by.

    Example:
        method = make_method(registry(), "multiflow").with_factors({"vision.0.fc1": 2.0, ...})
    """

    def __init__(
        self, values: Mapping[str, float], source: Mapping[str, Any] | None = None
    ) -> None:
        """Checks the factors.

        Args:
            values: by canonical name; finite and above 0.
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
        self._unit = 2.0 ** math.ceil(math.log2(greatest))

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
        """What the manifest of masks says about them."""
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
