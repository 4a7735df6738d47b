"""What a method is: a composition of a score and an allocation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from vlp_plugins.allocation import Allocation, GlobalAllocation
from vlp_plugins.scorers.base import Scorer
from vlp_plugins.statistics.base import ActivationStatistic, distinct


@dataclass(frozen=True)
class Composition:
    """score x allocation.

    Attributes:
        name: the name that masks and reports carry.
        score: ranks the elements within a tensor.
        allocation: decides how many elements each tensor keeps.
        allocation_score: the score that the allocation reads; None: `score`. MULTIFLOW ranks by
            information flow and allocates by magnitude.
        parameters: what the user set, for the manifest.
    """

    name: str
    score: Scorer
    allocation: Allocation = field(default_factory=GlobalAllocation)
    allocation_score: Scorer | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[ActivationStatistic, ...]:
        """The statistics that the data pass must gather, each once.

        Raises:
            UnsupportedError: if the scores need different statistics of one name.
        """
        read = (*self.score.needs, *(self.allocation_score.needs if self.allocation_score else ()))
        return distinct(read)

    def with_allocation(self, allocation: Allocation | None) -> Composition:
        """The same method with another allocation; None keeps its own."""
        return self if allocation is None else replace(self, allocation=allocation)


Method = Composition
