"""Which blocks a forward calls, in which order, and which weights they use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vlp_plugins.calibration.moments import ActivationStatistic
from vlp_plugins.calibration.paused import Visit
from vlp_plugins.models.weights import WeightMap


@dataclass
class Rehearsal:
    """What the first batches show.

    Attributes:
        orders: of the visits, one for each batch.
        uses: which weight a visit uses.
    """

    orders: list[list[Visit]] = field(default_factory=list)
    uses: set[tuple[Visit, str]] = field(default_factory=set)

    def is_enough(self, weights: WeightMap) -> bool:
        """Whether every weight was used; how often a block is called twice may depend on data."""
        once = not any(visit.turn for order in self.orders for visit in order)
        return once and {name for _, name in self.uses} == weights.keys()

    @property
    def order(self) -> list[Visit]:
        """One order of all visits: the longest; others where they are called before it."""
        merged: list[Visit] = []
        for order in sorted(self.orders, key=len, reverse=True):
            place = len(merged)
            for visit in reversed(order):
                if visit in merged:
                    place = merged.index(visit)
                else:
                    merged.insert(place, visit)
        return merged


def weights_by_block(blocks: Iterable[str], weights: WeightMap) -> dict[str, tuple[str, ...]]:
    """Canonical names of the weights that each block uses."""
    return {
        block: tuple(
            name
            for name, weight in weights.items()
            if any(is_in(owner.module, block) for owner in weight.owners)
        )
        for block in blocks
    }


def largest_block_bytes(
    blocks: Iterable[str], weights: WeightMap, statistics: Iterable[ActivationStatistic]
) -> int:
    """What the block that needs most does: sums of its statistics, and a copy of its weights.

    Args:
        blocks: of `Adapter.blocks`.
        weights: of the model.
        statistics: what is gathered.
    """

    def needed(name: str) -> int:
        weight = weights[name]
        sums = sum(each.block_dtype.itemsize * each.size(weight) for each in statistics)
        copy = weight.numel * weight.parameter.element_size()
        return sums * len(weight.owners) + copy

    return max(sum(map(needed, names)) for names in weights_by_block(blocks, weights).values())


def is_in(path: str, block: str) -> bool:
    """Whether a module is a block, or in it."""
    return path == block or path.startswith(f"{block}.")
