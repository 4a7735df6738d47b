"""A composition: a score and an allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlp_plugins.calibration.statistic import Statistic, distinct
from vlp_plugins.methods.base import Method
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.scoring.score import Scorer


@dataclass(frozen=True)
class Composition(Method):
    """score x allocation.

    Attributes:
        name: the name that masks and reports carry.
        score: ranks the elements within a tensor.
        allocation: decides how many elements each tensor keeps.
        allocation_score: the score that the allocation reads; None: `score`. MULTIFLOW ranks by
            information flow and allocates by magnitude.
        parameters: what the user set, for the manifest.
        factors: what multiplies the score that the allocation reads; None: nothing. See
            `with_factors`.
    """

    name: str
    score: Scorer
    allocation: Allocation = field(default_factory=GlobalAllocation)
    allocation_score: Scorer | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    factors: Factors | None = None

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the data pass must gather, each once.

        Raises:
            UnsupportedError: if the scores need different statistics of one name.
        """
        read = (*self.score.needs, *(self.allocation_score.needs if self.allocation_score else ()))
        return distinct(read)

    @property
    def reads_data(self) -> bool:
        return bool(self.needs)

    def with_allocation(self, allocation: Allocation | None) -> Composition:
        if allocation is None:
            return self
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> Composition:
        if self.factors is not None:
            raise UnsupportedError(f"method {self.name!r} has factors already")
        factors = Factors.of(factors)
        return replace(
            self,
            name=guided_name(self.name),
            allocation=self.allocation.with_factors(factors),
            parameters={**self.parameters, **factors.record()},
            factors=factors,
        )


def composed(method: Method) -> Composition:
    """The method, if it is a composition: masks from statistics of one pass over the data.

    Raises:
        UnsupportedError: if it is a procedure.
    """
    if isinstance(method, Composition):
        return method
    raise UnsupportedError(
        f"method {method.name!r} runs the model as it goes: there are no statistics that one pass "
        "over the data could gather for it, or that two masks could be made from; prune with it "
        "directly"
    )
