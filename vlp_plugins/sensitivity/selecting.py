"""Masks of one group of weights, while all others stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.composition import Composition, make_masks
from vlp_plugins.models.request import Owners
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.sensitivity.groups import Group


@dataclass(frozen=True)
class Selector:
    """Prunes groups by a method, whose allocation sees the group as if it were the whole model.

    A global allocation therefore puts one threshold through a modality or block, a layer-wise one
    removes the same fraction of each of its weights.

    Attributes:
        weights: of the whole model.
        method: a score and an allocation.
        statistics: of the whole model; None for a method that needs none.
        owners: see `prune`.
        published: see `prune`.
        seed: see `prune`.
    """

    weights: WeightMap
    method: Composition
    statistics: Statistics | None = None
    owners: Owners | None = None
    published: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.statistics is not None:
            self.statistics.check(self.weights, published=self.published)

    def part(self, group: Group) -> WeightMap:
        """The weights of a group alone."""
        weights = self.weights
        chosen = {name: weights[name] for name in group.weights}
        return WeightMap(chosen, weights.adapter_name, weights.adapter_settings)

    def masks(self, group: Group, sparsities: Sequence[float]) -> list[Masks]:
        """Masks of the group's weights at every sparsity.

        Raises:
            SparsityError: if the allocation cannot meet a sparsity.
            NonFiniteError: if scores hold NaN or infinity.
        """
        part = self.part(group)
        return make_masks(
            part,
            self.method,
            list(sparsities),
            _of_part(self.statistics, part),
            owners=self.owners,
            published=self.published,
            seed=self.seed,
        )


def _of_part(statistics: Statistics | None, part: WeightMap) -> Statistics | None:
    """The same sums, passed off as those of a model that has these weights only."""
    if statistics is None:
        return None
    shapes = {name: weight.shape for name, weight in part.items()}
    return replace(statistics, structure=part.structure, shapes=shapes, weights_hash="")
