"""What a method is: a composition of a score and an allocation, or a procedure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.context import Context, Cost
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation


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
