"""How alike two mask sets are, from their bits, without unpacking them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vlp_plugins.masks.bits import count_ones
from vlp_plugins.masks.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Overlap:
    """How alike two masks are.

    Attributes:
        both: number of elements that both keep.
        either: number of elements that at least one keeps.
        total: number of elements.
    """

    both: int
    either: int
    total: int

    @property
    def differing(self) -> int:
        """Number of elements that only one of them keeps."""
        return self.either - self.both

    @property
    def agreement(self) -> float:
        """Share of elements on which they agree; 1 of nothing."""
        return 1 - self.differing / self.total if self.total else 1.0

    @property
    def iou(self) -> float:
        """Intersection over union of the kept elements; 1 if neither keeps any."""
        return self.both / self.either if self.either else 1.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.both + other.both, self.either + other.either, self.total + other.total)


def overlaps(
    one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], manifest: Manifest
) -> dict[str, Overlap]:
    """Overlaps by modality and, last, under `"all"`.

    Args:
        one: packed bits by canonical name.
        two: packed bits of the same names and shapes.
        manifest: describes `one`.
    """
    groups: dict[str, Overlap] = {}
    whole = Overlap(0, 0, 0)
    for name, record in manifest.weights.items():
        both = count_ones(one[name] & two[name])
        found = Overlap(both, count_ones(one[name] | two[name]), manifest.numel(name))
        groups[record["modality"]] = groups.get(record["modality"], Overlap(0, 0, 0)) + found
        whole += found
    return {**groups, "all": whole}
