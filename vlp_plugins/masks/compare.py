"""How alike two mask sets are, and how far their new values are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.numbers import count, percent

if TYPE_CHECKING:
    from vlp_plugins.masks.masks import Masks


@dataclass(frozen=True, slots=True, repr=False)
class Overlap:
    """How alike two masks are: elements that both, or either of them, keep, of how many."""

    both: int = 0
    either: int = 0
    total: int = 0

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

    def __repr__(self) -> str:
        return (
            f"Overlap({percent(self.agreement)} of {count(self.total)} elements agree, "
            f"IoU of what is kept {percent(self.iou)})"
        )

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.both + other.both, self.either + other.either, self.total + other.total)


def distances(one: Masks, two: Masks) -> dict[str, float]:
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
        release((one.new_values[name], two.new_values[name]))
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


def check_comparable(one: Manifest, two: Manifest) -> None:
    """Raises `MaskError` with the first difference in family or structure."""
    if one.adapter != two.adapter:
        raise MaskError(
            f"the first masks are of a model of adapter {one.adapter!r}, the second of one of "
            f"adapter {two.adapter!r}, whose names mean other weights; compare masks of one family"
        )
    if found := difference(one, two):
        raise MaskError(f"masks of different structures cannot be compared: {found}")


def difference(one: Manifest, two: Manifest) -> str | None:
    """The first name or shape in which two manifests differ; the order does not matter."""
    for name in (*one.weights, *two.weights):
        if name not in one.weights or name not in two.weights:
            return f"only the {'second' if name in two.weights else 'first'} has {name!r}"
        if one.shape(name) != two.shape(name):
            return (
                f"{name!r} is {list(one.shape(name))} in the first and "
                f"{list(two.shape(name))} in the second"
            )
    return None
