"""Budgets per modality from the intrinsic dimension of its representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlp_plugins.allocation.base import Allocation, overall
from vlp_plugins.allocation.thresholds import modalities_of, within_modalities
from vlp_plugins.floors import most_removed
from vlp_plugins.intrinsic.factors import Factors
from vlp_plugins.models.request import Target
from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError
from vlp_plugins.selection import Scored, Selection
from vlp_plugins.shares import shares


@dataclass(frozen=True)
class IdAllocation(Allocation):
    """Density of a modality proportional to its mean factor, up to 1; then one threshold each.

    The mean is over the elements of the modality, each with the factor of its weight: a modality
    gets what its layers would get together if the density of each were proportional to its own
    factor. In all exactly int(sparsity x N) elements go. Wang et al. ("Exploring Intrinsic
    Dimension for Vision-Language Model Pruning", ICML 2024) conclude that modalities of higher
    dimension should be pruned less, and give no formula; this one is ours.

    Example:
        profile = measure_id(model, batches)
        prune(model, batches, sparsity=0.75, allocation="id", id_profile=profile)

    Attributes:
        factors: the intrinsic dimension by canonical name; None until it is known.
    """

    factors: Factors | None = None

    name: ClassVar[str] = "id"
    takes_budgets: ClassVar[bool] = False

    def with_factors(self, factors: Factors) -> Allocation:
        return IdAllocation(factors)

    def record(self) -> dict[str, Any]:
        known = {} if self.factors is None else self.factors.record()
        return {**super().record(), **known}

    def select(
        self, scored: Scored, targets: Sequence[Target], *, floor: float = 0.0
    ) -> list[dict[str, Selection]]:
        total = sum(weight.numel for weight in scored.weights.values())
        keeps = [total - int(overall(target, self.name) * total) for target in targets]
        caps = most_removed(scored, floor) if floor else None
        found = [self.kept(scored.weights, keep, caps) for keep in keeps]
        removals = {}
        for modality, names in modalities_of(scored).items():
            size = sum(scored.weights[name].numel for name in names)
            removals[modality] = [size - kept[modality] for kept in found]
        return within_modalities(scored, removals, floor)

    def kept(
        self, weights: Mapping[str, Weight], keep: int, caps: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """How many elements each modality keeps.

        Args:
            weights: of the model, by canonical name.
            keep: how many of all elements stay.
            caps: by canonical name how many may go at most; None: all.

        Raises:
            UnsupportedError: if nothing was measured.
            StatisticsError: if a weight has no factor.
            SparsityError: if the caps let too few go.
        """
        if self.factors is None:
            raise UnsupportedError(
                "allocation 'id' needs the intrinsic dimensions of the model; give id_profile, or "
                "prune by name (allocation='id') with batches to measure them"
            )
        self.factors.check(weights)
        sizes: dict[str, int] = {}
        least: dict[str, int] = {}
        proportions: dict[str, float] = {}
        for name, weight in weights.items():
            floor = 0 if caps is None else weight.numel - caps[name]
            group = weight.modality
            sizes[group] = sizes.get(group, 0) + weight.numel
            least[group] = least.get(group, 0) + floor
            share = weight.numel * self.factors[name]
            proportions[group] = proportions.get(group, 0.0) + share
        if keep < sum(least.values()):
            raise SparsityError(
                f"{keep} of {sum(sizes.values())} elements shall stay, and the floor keeps at "
                f"least {sum(least.values())}; lower the sparsity or the floor"
            )
        found = shares(keep, *(list(d.values()) for d in (proportions, least, sizes)))  # type: ignore[arg-type]
        return dict(zip(sizes, found, strict=True))
