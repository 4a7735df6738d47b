"""Importance + target -> how many weights each tensor keeps.

An allocation returns a `Selection` per tensor: something that turns the scores of that tensor into
its mask. Most are a `Cut`, a threshold with an exact count.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlp_plugins.errors import SparsityError, suggest
from vlp_plugins.floors import check_floor, under_floor
from vlp_plugins.selection import PatternSelection, RowSelection, Scored, Selection
from vlp_plugins.targets import Target, budget_of, check_sparsity


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


class GlobalAllocation(Allocation):
    """One threshold for all tensors: removed = int(sparsity x N)."""

    name: ClassVar[str] = "global"
    takes_budgets: ClassVar[bool] = False

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        return under_floor(scored, [_overall(target, self.name) for target in targets], floor)


class ModalityAllocation(Allocation):
    """One threshold per modality, each removing int(sparsity x N_modality): MULTIFLOW's prior."""

    name: ClassVar[str] = "modality"

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        groups: dict[str, list[str]] = {}
        for weight in scored.weights.values():
            groups.setdefault(weight.modality, []).append(weight.name)
        results: list[dict[str, Selection]] = [{} for _ in targets]
        budgets = [budget_of(target, list(groups)) for target in targets]
        for modality, names in groups.items():
            parts = under_floor(scored.subset(names), [b[modality] for b in budgets], floor)
            for result, part in zip(results, parts, strict=True):
                result.update(part)
        return [{name: result[name] for name in scored.weights} for result in results]


class LayerAllocation(Allocation):
    """Every tensor loses the same fraction: int(sparsity x n) of its n elements."""

    name: ClassVar[str] = "layer"

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        budgets = [budget_of(target, _modalities(scored)) for target in targets]
        results: list[dict[str, Selection]] = [{} for _ in targets]
        for name, weight in scored.weights.items():
            fractions = [budget[weight.modality] for budget in budgets]
            parts = under_floor(scored.subset([name]), fractions, floor)
            for result, part in zip(results, parts, strict=True):
                result.update(part)
        return results


class RowAllocation(Allocation):
    """Every output neuron loses int(sparsity x in_features) inputs: Wanda's comparison group."""

    name: ClassVar[str] = "row"

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        results: list[dict[str, Selection]] = []
        for target in targets:
            budget = budget_of(target, _modalities(scored))
            result: dict[str, Selection] = {}
            for name, weight in scored.weights.items():
                rows, columns = weight.rows_and_columns
                selection = RowSelection(int(budget[weight.modality] * columns), rows)
                result[name] = selection
            check_floor(scored, result, floor)
            results.append(result)
        return results


@dataclass(frozen=True)
class Pattern(Allocation):
    """`keep` of every `of` consecutive elements of a row stay, e.g. Pattern(keep=2, of=4)."""

    keep: int
    of: int
    takes_budgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise SparsityError(f"a pattern keeps 1 to {self.of} of {self.of}, not {self.keep}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """`keep=2,of=4`, as `allocation_by_name` reads it."""
        return f"keep={self.keep},of={self.of}"

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern makes, whatever the scores."""
        return 1 - self.keep / self.of

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        for target in targets:
            if abs(_overall(target, self.name) - self.sparsity) > 1e-9:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} makes sparsity {self.sparsity:g}, "
                    f"not {target}; leave the sparsity out"
                )
        selections: dict[str, Selection] = {}
        for name, weight in scored.weights.items():
            _, columns = weight.rows_and_columns
            if columns % self.of:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} does not divide the {columns} inputs of "
                    f"{name!r}; exclude that layer or choose another pattern"
                )
            selections[name] = PatternSelection(self.keep, self.of, weight.numel)
        check_floor(scored, selections, floor)
        return [selections for _ in targets]


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "global": GlobalAllocation,
    "modality": ModalityAllocation,
    "layer": LayerAllocation,
    "row": RowAllocation,
}


def allocation_by_name(name: str) -> Allocation:
    """`global`, `modality`, `layer`, `row` or a pattern such as `keep=2,of=4`.

    Raises:
        SparsityError: for anything else.
    """
    if match := re.fullmatch(r"keep=(\d+),\s*of=(\d+)", name):
        return Pattern(int(match[1]), int(match[2]))
    if name not in ALLOCATIONS:
        raise SparsityError(f"unknown allocation {name!r}{suggest(name, list(ALLOCATIONS))}")
    return ALLOCATIONS[name]()


def _overall(target: Target, allocation: str) -> float:
    if isinstance(target, Mapping):
        raise SparsityError(
            f"{allocation} allocation takes one sparsity, not {dict(target)}; use "
            "allocation='modality' or 'layer'"
        )
    return check_sparsity(target)


def _modalities(scored: Scored) -> list[str]:
    return list(dict.fromkeys(weight.modality for weight in scored.weights.values()))
