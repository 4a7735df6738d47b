"""How far the new values of two mask sets are apart."""

from __future__ import annotations

import math

from vlp_plugins.masks.fitting import check_comparable
from vlp_plugins.masks.packed import PackedMasks
from vlp_plugins.runtime.errors import MaskError


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
