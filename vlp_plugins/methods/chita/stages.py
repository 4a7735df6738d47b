"""CHITA++: round after round with fresh gradients, on a schedule of rising sparsity."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.base import Procedure
from vlp_plugins.methods.chita.batches import Calibration
from vlp_plugins.methods.chita.costs import cost_of
from vlp_plugins.methods.chita.factors import check_factors, with_factors
from vlp_plugins.methods.chita.groups import check_allocation, check_floor, groups_of
from vlp_plugins.methods.chita.rounds import RunInStages
from vlp_plugins.methods.chita.settings import DEFAULT_ROUNDS, DEFAULT_SCHEDULE, Settings
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.methods.context import Context, Cost
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.allocation import Allocation, GlobalAllocation
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.scoring.schedules import schedule_by_name

logger = logging.getLogger("vlp_plugins.methods")


@dataclass(frozen=True)
class ChitaInStages(Procedure):
    """CHITA++ (Benbaki et al., ICML 2023): CHITA in rounds.

    Each round takes gradients at the weights that the round before left, from batches of its own,
    and prunes a little more. What was removed stays removed.

    Attributes:
        settings: of the solver and of what it reads; `rows` is of one round.
        rounds: number of rounds.
        schedule: name of what leads from 0 to the target.
        allocation: global, or by modality: one problem per modality.
        factors: what multiplies the magnitudes that share out the weights among blocks.
    """

    settings: Settings = field(default_factory=Settings)
    rounds: int = DEFAULT_ROUNDS
    schedule: str = DEFAULT_SCHEDULE
    allocation: Allocation = field(default_factory=GlobalAllocation)
    name: str = "chita++"
    factors: Factors | None = None

    def __post_init__(self) -> None:
        schedule_by_name(self.schedule)
        if type(self.rounds) is not int or self.rounds < 1:
            raise UnsupportedError(f"rounds={self.rounds!r}; give a whole number from 1 on")

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        of_rounds = {"rounds": self.rounds, "schedule": self.schedule}
        factors = self.factors.record() if self.factors else {}
        return {**self.settings.parameters(), **of_rounds, **factors}

    def with_allocation(self, allocation: Allocation | None) -> ChitaInStages:
        if allocation is None:
            return self
        check_allocation(allocation, self.name)
        if self.factors is not None:
            allocation = allocation.with_factors(self.factors)
        return replace(self, allocation=allocation)

    def with_factors(self, factors: Mapping[str, float]) -> ChitaInStages:
        return replace(self, **with_factors(self, factors))

    def run(self, context: Context) -> list[Masks]:
        check_floor(context, self.name)
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        for target in context.targets:  # an error now is better than one after hours
            groups_of(context.weights, target, self.allocation, published=context.published)
        setup = Setup.of(
            context, settings, self.allocation, rounds=self.rounds, factors=self.factors
        )
        rows = rows_of_a_round(setup.calibration, settings, self.rounds)
        run = RunInStages(self, setup, rows)
        return [run.prune(number, target) for number, target in enumerate(context.targets)]

    def cost(self, context: Context) -> Cost:
        settings = self.settings.for_variant(published=context.published)
        check_factors(self.factors, settings, context.weights)
        return cost_of(
            context, settings, self.allocation, rounds=self.rounds, schedule=self.schedule
        )


def rows_of_a_round(calibration: Calibration, settings: Settings, rounds: int) -> int:
    """How many fresh batches a round takes; warns once if there are too few for all rounds."""
    rows = settings.rows or max(1, calibration.available // rounds)
    if rows * rounds > calibration.available:
        logger.warning(
            "%d rounds of %d batches are more than the %d there are: after the last batch comes "
            "the first again",
            rounds,
            rows,
            calibration.available,
        )
    return rows
