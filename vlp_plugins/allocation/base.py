"""What an allocation is: importance + target -> how many weights each tensor keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vlp_plugins.intrinsic.factors import Factors
from vlp_plugins.models.request import Target, check_sparsity
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.selection import Scored, Selection


class Allocation(ABC):
    """Decides how many elements each tensor keeps. A composition takes any instance.

    Attributes:
        name: what `allocation_by_name`, reports and mask files call it.
        takes_budgets: whether a target may be a budget per modality.
    """

    name: ClassVar[str]
    takes_budgets: ClassVar[bool] = True

    @abstractmethod
    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        """For every target, the selection of every tensor, on `scored.ranking()`'s scores.

        Args:
            scored: weights and the score that the allocation reads.
            targets: sparsities.
            floor: least fraction that each tensor keeps; prevents layer collapse.

        Raises:
            SparsityError: if a target is outside [0, 1), names an unknown modality or cannot be
                met under the floor.
        """

    def with_factors(self, factors: Factors) -> Allocation:
        """What shares sparsity out where every weight has a factor of its importance.

        The scores that `select` reads are multiplied by the factors already: an allocation that
        compares tensors by them stays as it is.

        Raises:
            UnsupportedError: if factors cannot change anything.
        """
        return self

    def record(self) -> dict[str, Any]:
        """What the manifest of masks says about it, and a run that is resumed must have alike."""
        return {"allocation": self.name}


def overall(target: Target, allocation: str) -> float:
    """A target that is one sparsity.

    Raises:
        SparsityError: if it is a budget per modality.
    """
    if isinstance(target, Mapping):
        raise SparsityError(
            f"{allocation} allocation takes one sparsity, not {dict(target)}; use "
            "allocation='modality' or 'layer'"
        )
    return check_sparsity(target)
