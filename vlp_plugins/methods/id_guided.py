"""Methods that look at the intrinsic dimension of a model's layers first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context, Cost, Method, Procedure, Walk
from vlp_plugins.models.request import Owners
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation, IdAllocation
from vlp_plugins.scoring.factors import Factors, guided_name


@dataclass(frozen=True)
class IdGuided(Procedure):
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

    method: Method
    scaled: bool = True

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

    @property
    def allocation(self) -> Allocation:  # type: ignore[override]
        """That of the method; before anything is measured, one with the same count in all."""
        allocation = self.method.allocation
        return GlobalAllocation() if isinstance(allocation, IdAllocation) else allocation

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return self.method.parameters

    @property
    def takes_gradients(self) -> bool:
        return self.method.takes_gradients

    def walk_of(self, context: Context) -> Walk:
        return self.method.walk_of(context)

    def with_allocation(self, allocation: Allocation | None) -> IdGuided:
        return replace(self, method=self.method.with_allocation(allocation))

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
        return method.with_factors(factors) if self.scaled else method

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

    def run(self, context: Context) -> list[Masks]:
        if self.method.reads_data and isinstance(context.batches, Iterator):
            raise DataError(
                f"the batches are an iterator (a generator?), which can be read once, but "
                f"{self.name!r} measures dimensions from them and reads them again; give a list "
                "of batches or a loader, or the id_profile that measure_id returns"
            )
        profile = self.measured(context)
        method = self.guided(profile, context.weights, context.resolved_owners)
        if isinstance(method, Composition) and context.checkpoint is None:
            context = replace(context, resume=False)  # what was measured is kept, its pass is not
        return method.run(context)

    def cost(self, context: Context) -> Cost:
        """That of the method, and one more pass: how many it takes to measure needs a batch.

        `vlp plan` has one, made up: see `vlp_plugins.jobs.plan`.
        """
        cost = Cost(passes=int(self.method.reads_data))
        if isinstance(self.method, Procedure):
            cost = self.method.with_allocation(self.allocation).cost(context)
        elif isinstance(self.method, Composition):
            cost = replace(cost, ram_bytes=self.method.statistics_bytes(context.weights))
        return replace(cost, passes=cost.passes + 1)
