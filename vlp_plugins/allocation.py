"""Importance + target -> how many weights each tensor keeps.

An allocation returns a `Selection` per tensor: something that turns the scores of that tensor into
its mask. Most are a `Cut`, a threshold with an exact count.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlp_plugins.errors import SparsityError, suggest
from vlp_plugins.selection import PatternSelection, RowSelection, Scored, Selection

Target = float | Mapping[str, float]
"""Sparsity: the fraction removed in [0, 1), overall or by modality (`{"vision": 0.5, ...}`)."""


class Allocation(ABC):
    """Decides how many elements each tensor keeps."""

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

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        for target in targets:
            if isinstance(target, Mapping):
                raise SparsityError(
                    "global allocation has one threshold and takes one sparsity, not "
                    f"{dict(target)}; use allocation='modality' or 'layer'"
                )
        return _within(scored, [check_sparsity(float(t)) for t in targets], floor)  # type: ignore[arg-type]


class ModalityAllocation(Allocation):
    """One threshold per modality, each removing int(sparsity x N_modality): MULTIFLOW's prior."""

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        groups: dict[str, list[str]] = {}
        for weight in scored.weights.values():
            groups.setdefault(weight.modality, []).append(weight.name)
        results: list[dict[str, Selection]] = [{} for _ in targets]
        budgets = [budget_of(target, list(groups)) for target in targets]
        for modality, names in groups.items():
            parts = _within(scored.subset(names), [b[modality] for b in budgets], floor)
            for result, part in zip(results, parts, strict=True):
                result.update(part)
        return [{name: result[name] for name in scored.weights} for result in results]


class LayerAllocation(Allocation):
    """Every tensor loses the same fraction: int(sparsity x n) of its n elements."""

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        modalities = list(dict.fromkeys(w.modality for w in scored.weights.values()))
        budgets = [budget_of(target, modalities) for target in targets]
        results: list[dict[str, Selection]] = [{} for _ in targets]
        for name, weight in scored.weights.items():
            fractions = [budget[weight.modality] for budget in budgets]
            for result, part in zip(
                results, _within(scored.subset([name]), fractions, floor), strict=True
            ):
                result.update(part)
        return results


class RowAllocation(Allocation):
    """Every output neuron loses int(sparsity x in_features) inputs: Wanda's comparison group."""

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        modalities = list(dict.fromkeys(w.modality for w in scored.weights.values()))
        results: list[dict[str, Selection]] = []
        for target in targets:
            budget = budget_of(target, modalities)
            result: dict[str, Selection] = {}
            for name, weight in scored.weights.items():
                rows, columns = weight.matrix.shape
                sparsity = budget[weight.modality]
                if 1 - sparsity < floor:
                    raise SparsityError(_floor_message(floor, sparsity))
                result[name] = RowSelection(int(sparsity * columns), rows)
            results.append(result)
        return results


@dataclass(frozen=True)
class Pattern(Allocation):
    """`keep` of every `of` consecutive elements of a row stay, e.g. Pattern(keep=2, of=4)."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise SparsityError(f"a pattern keeps 1 to {self.of} of {self.of}, not {self.keep}")

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern makes, whatever the scores."""
        return 1 - self.keep / self.of

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        selections: dict[str, Selection] = {}
        for name, weight in scored.weights.items():
            columns = weight.matrix.shape[1]
            if columns % self.of:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} does not divide the {columns} inputs of "
                    f"{name!r}; exclude that layer or choose another pattern"
                )
            selections[name] = PatternSelection(self.keep, self.of, weight.numel)
        for target in targets:
            if isinstance(target, Mapping) or abs(float(target) - self.sparsity) > 1e-9:
                raise SparsityError(
                    f"pattern {self.keep} of {self.of} makes sparsity {self.sparsity:g}, "
                    f"not {target}; leave the sparsity out"
                )
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


def check_sparsity(value: float) -> float:
    """The value if it lies in [0, 1), else a `SparsityError`."""
    if not 0 <= value < 1:
        raise SparsityError(
            f"sparsity is the fraction removed and lies in [0, 1), not {value:g}"
            + (f"; did you mean {value / 100:g}?" if 1 <= value < 100 else "")
        )
    return value


def budget_of(target: Target, modalities: Sequence[str]) -> dict[str, float]:
    """The sparsity of every modality.

    Raises:
        SparsityError: if a budget names a modality that the model lacks, or leaves one out.
    """
    if not isinstance(target, Mapping):
        return dict.fromkeys(modalities, check_sparsity(float(target)))
    for name in target:
        if name not in modalities:
            raise SparsityError(
                f"budget for modality {name!r}, which this model has not"
                f"{suggest(name, list(modalities))}"
            )
    for modality in modalities:
        if modality not in target:
            raise SparsityError(
                f"no budget for modality {modality!r}; give each of "
                f"{', '.join(modalities)} one ({modality}=0 keeps all of it)"
            )
    return {modality: check_sparsity(target[modality]) for modality in modalities}


def _within(
    scored: Scored, sparsities: Sequence[float], floor: float
) -> list[dict[str, Selection]]:
    """Global cuts over the given weights; with a floor, capped tensors leave the competition."""
    total = sum(weight.numel for weight in scored.weights.values())
    removals = [int(sparsity * total) for sparsity in sparsities]
    if floor == 0:
        return [dict(cut) for cut in scored.cuts(removals)]
    if not 0 <= floor < 1:
        raise SparsityError(
            f"the floor is the least fraction kept and lies in [0, 1), not {floor:g}"
        )
    caps = {name: int((1 - floor) * weight.numel) for name, weight in scored.weights.items()}
    return [
        _under_caps(scored, removal, caps, floor, sparsity)
        for removal, sparsity in zip(removals, sparsities, strict=True)
    ]


def _under_caps(
    scored: Scored, removal: int, caps: Mapping[str, int], floor: float, sparsity: float
) -> dict[str, Selection]:
    """Global cuts in which no tensor loses more than its cap; the others make up for it."""
    if sum(caps.values()) < removal:
        raise SparsityError(_floor_message(floor, sparsity))
    capped: dict[str, int] = {}
    while True:
        free = [name for name in scored.weights if name not in capped]
        remaining = removal - sum(capped.values())
        cuts = scored.subset(free).cuts([remaining])[0] if free else {}
        over = [name for name in free if cuts[name].remove > caps[name]]
        if not over:
            break
        capped.update({name: caps[name] for name in over})
    ranked = scored.ranking()
    fixed = {
        name: ranked.cuts_of(ranked.scores(name), [count])[0] for name, count in capped.items()
    }
    return {name: fixed.get(name) or cuts[name] for name in scored.weights}


def _floor_message(floor: float, sparsity: float) -> str:
    return (
        f"a floor of {floor:g} and sparsity {sparsity:g} exclude each other: at most "
        f"{1 - floor:g} can be removed; lower one of them"
    )
