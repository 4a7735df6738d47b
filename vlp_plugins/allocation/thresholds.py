"""Allocations that compare tensors by their scores: one threshold for all, or per modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vlp_plugins.allocation.base import Allocation, overall
from vlp_plugins.floors import under_floor
from vlp_plugins.models.request import Target, budget_of
from vlp_plugins.selection import Scored, Selection


class GlobalAllocation(Allocation):
    """One threshold for all tensors: removed = int(sparsity x N)."""

    name: ClassVar[str] = "global"
    takes_budgets: ClassVar[bool] = False

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        total = sum(weight.numel for weight in scored.weights.values())
        removals = [int(overall(target, self.name) * total) for target in targets]
        return under_floor(scored, removals, floor)


class ModalityAllocation(Allocation):
    """One threshold per modality, each removing int(sparsity x N_modality): MULTIFLOW's prior."""

    name: ClassVar[str] = "modality"

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        groups = modalities_of(scored)
        budgets = [budget_of(target, list(groups)) for target in targets]
        removals = {}
        for modality, names in groups.items():
            total = sum(scored.weights[name].numel for name in names)
            removals[modality] = [int(budget[modality] * total) for budget in budgets]
        return within_modalities(scored, removals, floor)


def modalities_of(scored: Scored) -> dict[str, list[str]]:
    """Names of the weights of every modality, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for weight in scored.weights.values():
        groups.setdefault(weight.modality, []).append(weight.name)
    return groups


def within_modalities(
    scored: Scored, removals: dict[str, list[int]], floor: float
) -> list[dict[str, Selection]]:
    """One threshold per modality and target.

    Args:
        scored: weights and their scores.
        removals: by modality how many elements go, one count per target.
        floor: least fraction that each tensor keeps.

    Raises:
        SparsityError: if both cannot be had.
    """
    results: list[dict[str, Selection]] = [{} for _ in next(iter(removals.values()))]
    for modality, names in modalities_of(scored).items():
        parts = under_floor(scored.subset(names), removals[modality], floor)
        for result, part in zip(results, parts, strict=True):
            result.update(part)
    return [{name: result[name] for name in scored.weights} for result in results]
