"""CHITA in one shot: one set of rows serves every target and every lambda."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.base import Procedure
from vlp_plugins.methods.chita.batches import Seen
from vlp_plugins.methods.chita.costs import cost_of
from vlp_plugins.methods.chita.factors import check_factors, with_factors
from vlp_plugins.methods.chita.finding import find
from vlp_plugins.methods.chita.groups import check_allocation, check_floor, groups_of
from vlp_plugins.methods.chita.results import calibration_record, masks_of
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.methods.context import Context, Cost
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors


@dataclass(frozen=True)
class Chita(Procedure):
    """CHITA (Benbaki et al., ICML 2023): prunes by a quadratic model of the loss, updates the rest.

    Attributes:
        settings: of the solver and of what it reads.
        allocation: global, or by modality: one problem per modality.
        factors: what multiplies the magnitudes that share out the weights among blocks.
    """

    settings: Settings = field(default_factory=Settings)
    allocation: Allocation = field(default_factory=GlobalAllocation)
    name: str = "chita"
    factors: Factors | None = None

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        return {**self.settings.parameters(), **(self.factors.record() if self.factors else {})}

    def with_allocation(self, allocation: Allocation | None) -> Chita:
        if allocation is None:
            return self
        check_allocation(allocation, self.name)
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> Chita:
        return replace(self, **with_factors(self, factors))

    def run(self, context: Context) -> list[Masks]:
        check_floor(context, self.name)
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        groups = [
            groups_of(context.weights, target, self.allocation, published=context.published)
            for target in context.targets
        ]
        setup = Setup.of(context, settings, self.allocation, factors=self.factors)
        count = settings.rows or setup.calibration.available
        batches = Seen(setup.calibration.from_(0, count))
        masks = []
        with setup.pruner(batches, count, progress=context.progress) as pruner:
            for target, each in zip(context.targets, groups, strict=True):
                found = find(setup, pruner, each, str(target))
                record = calibration_record([batches.digest.hex()], [batches.sizes])
                masks.append(masks_of(setup, found, target, self.name, record))
        return masks

    def cost(self, context: Context) -> Cost:
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        return cost_of(context, settings, self.allocation)
