"""Methods that measure the model before they prune it: its dimensions, or an allocation's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vlp_plugins.calibration.batches import check_batches
from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost, Method, Procedure, Walk
from vlp_plugins.models.request import Owners, Target
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.allocation import (
    Allocation,
    GlobalAllocation,
    IdAllocation,
    ModalityAllocation,
)
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import Scored, Selection


class BeforeMeasuring(GlobalAllocation):
    """In place of an allocation that has to run the model first: the same counts in all."""

    takes_budgets: ClassVar[bool] = True
    score: ClassVar[Scorer | None] = Magnitude()  # nothing is read for it

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        budgets = any(isinstance(target, Mapping) for target in targets)
        allocation = ModalityAllocation() if budgets else GlobalAllocation()
        return allocation.select(scored, targets, floor=floor)


@dataclass(frozen=True)
class Guided(Procedure):
    """Another method, once something that it needs was measured in the model.

    Attributes:
        method: what is guided.
    """

    method: Method
    _instead: ClassVar[str] = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the method."""
        return self.method.name

    @property
    def allocation(self) -> Allocation:  # type: ignore[override]
        """That of the method; before anything is measured, one with the same count in all."""
        allocation = self.method.allocation
        if allocation.measured:
            return allocation
        return BeforeMeasuring() if allocation.takes_budgets else GlobalAllocation()

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return self.method.parameters

    @property
    def takes_gradients(self) -> bool:
        return self.method.takes_gradients

    def walk_of(self, context: Context) -> Walk:
        return self.method.walk_of(context)

    def with_allocation(self, allocation: Allocation | None) -> Self:
        return replace(self, method=self.method.with_allocation(allocation))

    @abstractmethod
    def ready(self, context: Context) -> Method:
        """The method itself, with what it takes to measure the model for.

        Raises:
            VlpError: if that cannot be measured.
        """

    def run(self, context: Context) -> list[Masks]:
        if self.method.reads_data and isinstance(context.batches, Iterator):
            raise DataError(
                f"the batches are an iterator (a generator?), which can be read once, but "
                f"{self.name!r} measures the model with them and reads them again; give a list "
                f"of batches or a loader{self._instead}"
            )
        method = self.ready(context)
        walks = method.walk_of(context) == "blocks"
        if isinstance(method, Composition) and context.checkpoint is None and not walks:
            context = replace(context, resume=False)  # what was measured is kept, its pass is not
        return method.run(context)

    def cost(self, context: Context) -> Cost:
        """That of the method, and one more pass over the data."""
        cost = Cost(passes=int(self.method.reads_data))
        if isinstance(self.method, Procedure):
            cost = self.method.with_allocation(self.allocation).cost(context)
        elif isinstance(self.method, Composition) and self.walk_of(context) == "blocks":
            cost = self.method.cost(context)
        elif isinstance(self.method, Composition):
            cost = replace(cost, ram_bytes=self.method.statistics_bytes(context.weights))
        return replace(cost, passes=cost.passes + 1)


@dataclass(frozen=True)
class Measuring(Guided):
    """Another method, once its allocation has measured the model (DAS, ECoFLaP)."""

    def note(self, forwards: int) -> str:
        """How it goes about it, for a plan."""
        return (
            f"allocation {self.method.allocation.name} measures the model first: {forwards:,} "
            "forward passes of a batch"
        )

    def ready(self, context: Context) -> Method:
        return self.method.with_allocation(self.method.allocation.measure(context))

    def check(self, context: Context) -> None:
        if not context.has_batches:
            raise StatisticsError(
                f"method {self.name!r} needs data: its allocation "
                f"{self.method.allocation.name!r} runs the model before it allocates; give batches"
            )
        check_batches(context.batches, context.limit)
        self.method.check(context)

    def cost(self, context: Context) -> Cost:
        cost = super().cost(context)
        allocation = self.method.allocation
        batches = context.number_of_batches() or 1
        forwards = allocation.forwards(context.weights, batches)
        note = self.note(forwards)
        if isinstance(self.method, Composition) and not cost.forward_batches:
            forwards += batches * self.method.reads_data
        return replace(
            cost, forward_batches=cost.forward_batches + forwards, notes=(*cost.notes, note)
        )


@dataclass(frozen=True)
class IdGuided(Guided):
    """Another method, once the intrinsic dimensions of the model are known.

    `id*NAME` is NAME with the dimension of each layer for a factor of its importance (Wang et al.,
    "Exploring Intrinsic Dimension for Vision-Language Model Pruning", ICML 2024); `allocation="id"`
    makes budgets per modality of them. With an `IdProfile` it becomes the method itself (`guided`);
    as a procedure it measures one first, from the same batches.

    Attributes:
        method: what is guided.
        scaled: whether its importance gets factors; False where its allocation alone reads the
            dimensions.
    """

    scaled: bool = True
    _instead: ClassVar[str] = ", or the id_profile that measure_id returns"

    def __post_init__(self) -> None:
        if isinstance(self.method, IdGuided):
            raise UnsupportedError(f"method {self.method.name!r} is guided already")
        if not self.scaled:
            return
        if type(self.method).with_factors is Method.with_factors:
            self.method.with_factors({})  # says why not
        self.method.allocation.with_factors(Factors({}))

    @property
    def name(self) -> str:  # type: ignore[override]
        """`id*` and the name of the method; its name alone if its importance gets no factors."""
        return guided_name(self.method.name) if self.scaled else self.method.name

    def guided(self, profile: IdProfile, weights: WeightMap, owners: Owners) -> Method:
        """The method itself, with the dimensions that it needs.

        Args:
            profile: of the model, or of another one of its family.
            weights: of the model.
            owners: whose dimension counts for a weight that several modules share.

        Raises:
            StatisticsError: if the profile lacks a weight.
        """
        factors = profile.factors(weights, owners)
        method = self.method
        if isinstance(method.allocation, IdAllocation):
            method = method.with_allocation(method.allocation.with_factors(factors))
        method = method.with_factors(factors) if self.scaled else method
        return method if method.allocation.measured else Measuring(method)

    def measured(self, context: Context) -> IdProfile:
        """The dimensions of the model; see `vlp_plugins.dimension.measure.measure`."""
        return measure(
            context.model,
            context.adapter,
            context.weights,
            context.batches,
            memory_budget=context.memory_budget,
            published=context.published,
            limit=context.limit,
            workplace=context.workplace,
            resume=context.resume,
            progress=context.progress,
        )

    def check(self, context: Context) -> None:
        if context.statistics is not None:
            raise StatisticsError(
                f"{self.name!r} measures the model's intrinsic dimensions from batches, and cannot "
                "use statistics of an earlier pass; measure them by measure_id and give id_profile"
            )
        super().check(replace(context, limit=None))  # measuring says if there are fewer

    def ready(self, context: Context) -> Method:
        return self.guided(self.measured(context), context.weights, context.resolved_owners)
