"""What a method is: a composition of a score and an allocation, or a procedure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlp_plugins.allocation import Allocation, GlobalAllocation
from vlp_plugins.errors import UnsupportedError
from vlp_plugins.intrinsic.factors import Factors, guided_name
from vlp_plugins.masks import Masks
from vlp_plugins.methods.context import Context, Cost
from vlp_plugins.scorers.base import Scorer
from vlp_plugins.statistics.base import Statistic, distinct


class Method(ABC):
    """A `Composition` or a `Procedure`.

    Attributes:
        name: the name that masks and reports carry.
        allocation: where sparsity is shared out.
        parameters: what the user set, for the manifest.
    """

    name: str
    allocation: Allocation
    parameters: dict[str, Any]

    @property
    @abstractmethod
    def reads_data(self) -> bool:
        """Whether masks cannot be made from the weights alone."""

    @abstractmethod
    def with_allocation(self, allocation: Allocation | None) -> Method:
        """The same method with another allocation; None keeps its own.

        Raises:
            UnsupportedError: if it has no other.
        """

    def with_factors(self, factors: Mapping[str, float]) -> Method:
        """The same method with the importance of every weight multiplied by a factor.

        A constant per tensor cannot change the ranking within a tensor: the factor multiplies the
        score that decides how many elements each tensor keeps. `id*NAME` is the method NAME with
        intrinsic dimensions for factors; what is returned carries that name (`guided_name`), and
        among its parameters what `Factors.record` says.

        Args:
            factors: above 0, by canonical name of every weight.

        Raises:
            UnsupportedError: if the method has no such score.
        """
        raise UnsupportedError(
            f"method {self.name!r} takes no factors: it does not say which of its scores decides "
            "how many elements a tensor keeps (its class would implement with_factors)"
        )


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


class Procedure(Method):
    """A method that is more than a score and an allocation: it runs the model as it goes."""

    allocation: Allocation = GlobalAllocation()

    @property
    def reads_data(self) -> bool:
        return True

    @abstractmethod
    def run(self, context: Context) -> list[Masks]:
        """Masks for every target, with new values of the kept weights if it changes them.

        Raises:
            VlpError: if something in the context does not fit; the model is as before then.
        """

    @abstractmethod
    def cost(self, context: Context) -> Cost:
        """What `run` will need; `context.limit` says how many batches there will be."""

    def with_allocation(self, allocation: Allocation | None) -> Procedure:
        if allocation is None or allocation == self.allocation:
            return self
        raise UnsupportedError(
            f"method {self.name!r} shares out sparsity in its own way and takes no other "
            f"allocation than {self.allocation.name!r}; leave --allocation out"
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
