"""How alike two mask sets are, and how far their new values are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vlp_plugins.masks.apply import check_comparable
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.packed import PackedMasks, count_ones
from vlp_plugins.runtime.errors import MaskError


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


def distances(one: PackedMasks, two: PackedMasks) -> dict[str, float]:
    """The relative distance of the new values where both sets keep an element.

    Returns:
        By modality and, last, under `"all"`: the norm of the difference over the norm of `one`'s
        values there; 0 if they are equal.

    Raises:
        MaskError: if they are of different adapters or structures, or one has no new values.
    """
    check_comparable(one.manifest, two.manifest)
    if one.new_values is None or two.new_values is None:
        raise MaskError("only masks that both bring new weights can be compared by them")
    squares: dict[str, tuple[float, float]] = {}
    for name, record in one.manifest.weights.items():
        kept, kept_too = one[name].flatten(), two[name].flatten()
        # Of the elements that each keeps, in their order, those that the other keeps too.
        first = one.new_values[name][kept_too[kept]].double()
        second = two.new_values[name][kept[kept_too]].double()
        apart, size = squares.get(record["modality"], (0.0, 0.0))
        squares[record["modality"]] = (
            apart + float((first - second).square().sum()),
            size + float(first.square().sum()),
        )
    whole = tuple(map(sum, zip(*squares.values(), strict=True)))
    return {name: _ratio(apart, size) for name, (apart, size) in (squares | {"all": whole}).items()}


def _ratio(apart: float, size: float) -> float:
    if not apart:
        return 0.0
    return math.sqrt(apart / size) if size else math.inf
