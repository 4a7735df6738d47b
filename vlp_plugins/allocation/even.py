"""Allocations in which every tensor loses the same fraction, whatever its scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlp_plugins.allocation.base import Allocation
from vlp_plugins.allocation.thresholds import modalities_of
from vlp_plugins.floors import check_floor, most_removed, under_floor
from vlp_plugins.intrinsic.factors import Factors
from vlp_plugins.models.request import Target, budget_of
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.selection import RowSelection, Scored, Selection
from vlp_plugins.shares import shares


class EvenAllocation(Allocation):
    """Every tensor loses the same fraction."""

    @abstractmethod
    def removed(self, weight: Weight, sparsity: float) -> int:
        """How many elements a tensor loses."""

    @abstractmethod
    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        """What chooses the elements of one tensor, one per count of removed ones.

        Raises:
            SparsityError: if the tensor would keep less than its floor.
        """

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        return self.selected(scored, [self.counts(scored, target) for target in targets], floor)

    def counts(self, scored: Scored, target: Target) -> dict[str, int]:
        """How many elements every tensor loses.

        Raises:
            SparsityError: if the target does not fit the modalities.
        """
        budget = budget_of(target, list(modalities_of(scored)))
        return {
            name: self.removed(weight, budget[weight.modality])
            for name, weight in scored.weights.items()
        }

    def selected(
        self, scored: Scored, counts: Sequence[Mapping[str, int]], floor: float
    ) -> list[dict[str, Selection]]:
        """Selections of every tensor with these counts.

        Raises:
            SparsityError: if a tensor would keep less than its floor.
        """
        results: list[dict[str, Selection]] = [{} for _ in counts]
        for name in scored.weights:
            removals = [count[name] for count in counts]
            found = self.selections(scored, name, removals, floor)
            for result, selection in zip(results, found, strict=True):
                result[name] = selection
        return results

    def with_factors(self, factors: Factors) -> Allocation:
        return ByFactor(self, factors)


class LayerAllocation(EvenAllocation):
    """Every tensor loses the same fraction: int(sparsity x n) of its n elements."""

    name: ClassVar[str] = "layer"

    def removed(self, weight: Weight, sparsity: float) -> int:
        return int(sparsity * weight.numel)

    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        return [found[name] for found in under_floor(scored.subset([name]), removals, floor)]


class RowAllocation(EvenAllocation):
    """Every output neuron loses int(sparsity x in_features) inputs: Wanda's comparison group."""

    name: ClassVar[str] = "row"

    def removed(self, weight: Weight, sparsity: float) -> int:
        rows, columns = weight.rows_and_columns
        return rows * int(sparsity * columns)

    def selections(
        self, scored: Scored, name: str, removals: Sequence[int], floor: float
    ) -> Sequence[Selection]:
        rows, _ = scored.weights[name].rows_and_columns
        found = [RowSelection(count // rows, rows, count % rows) for count in removals]
        for selection in found:
            check_floor(scored.subset([name]), {name: selection}, floor)
        return found


@dataclass(frozen=True)
class ByFactor(Allocation):
    """Even densities times a factor per tensor.

    An even allocation reads no scores, so that multiplying them would change nothing. Here what a
    tensor keeps of its elements is proportional to its factor, up to all of them; together the
    tensors (with budgets per modality, those of each modality) keep exactly as many as the even
    allocation leaves. Equal factors leave everything as it is.

    Attributes:
        even: the allocation without factors.
        factors: by canonical name.
    """

    even: EvenAllocation
    factors: Factors

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the even allocation; the name of the method says that there are factors."""
        return self.even.name

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        self.factors.check(scored.weights)
        counts = []
        for target in targets:
            even = self.even.counts(scored, target)
            whole = {"": list(scored.weights)}
            groups = modalities_of(scored) if isinstance(target, Mapping) else whole
            count: dict[str, int] = {}
            for names in groups.values():
                count |= self._removed(scored.subset(names), even, floor)
            counts.append(count)
        return self.even.selected(scored, counts, floor)

    def with_factors(self, factors: Factors) -> Allocation:
        raise UnsupportedError(f"allocation {self.name!r} has factors already")

    def _removed(self, scored: Scored, even: Mapping[str, int], floor: float) -> dict[str, int]:
        weights = scored.weights
        sizes = [weight.numel for weight in weights.values()]
        least = [0] * len(sizes)
        if floor:
            caps = most_removed(scored, floor)
            least = [weights[name].numel - caps[name] for name in weights]
        kept = [weights[name].numel - even[name] for name in weights]
        if sum(kept) < sum(least):
            raise SparsityError(
                f"{sum(kept)} of {sum(sizes)} elements shall stay, and a floor of {floor:g} keeps "
                f"at least {sum(least)}; lower the sparsity or the floor"
            )
        proportions = [
            count * self.factors[name] for name, count in zip(weights, kept, strict=True)
        ]
        found = shares(sum(kept), proportions, least, sizes)
        return {name: size - keep for name, size, keep in zip(weights, sizes, found, strict=True)}
