"""A floor: the least fraction that every tensor keeps, so that no layer collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from vlp_plugins.cuts import Cut
from vlp_plugins.runtime.errors import SparsityError
from vlp_plugins.selection import Scored, Selection


def under_floor(
    scored: Scored, removals: Sequence[int], floor: float
) -> list[dict[str, Selection]]:
    """Global cuts over the given weights in which every tensor keeps its floor.

    Args:
        scored: weights and their scores.
        removals: so many elements go, floor or not.
        floor: least fraction that each tensor keeps; 0 for none.

    Raises:
        SparsityError: if both cannot be had.
    """
    if floor == 0:
        return [dict(cuts) for cuts in scored.cuts(removals)]
    caps = most_removed(scored, floor)
    return [_under_caps(scored, removal, caps, floor) for removal in removals]


def check_floor(scored: Scored, selections: Mapping[str, Selection], floor: float) -> None:
    """Makes sure of a floor where the counts are fixed otherwise (rows, patterns).

    Raises:
        SparsityError: naming the first tensor that would keep less.
    """
    for name, cap in most_removed(scored, floor).items() if floor else ():
        if selections[name].remove > cap:
            numel = scored.weights[name].numel
            raise SparsityError(
                f"{name!r} would lose {selections[name].remove} of {numel} elements, and a floor "
                f"of {floor:g} lets it lose {cap}; lower the sparsity or the floor"
            )


def most_removed(scored: Scored, floor: float) -> dict[str, int]:
    """How many elements each tensor may lose.

    Raises:
        SparsityError: if the floor makes no sense, or in the published variant.
    """
    if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor < 1:
        raise SparsityError(f"a floor is the least fraction kept, in [0, 1), not {floor!r}")
    if scored.published:
        raise SparsityError(
            "the published methods have no floor; leave out the floor or variant='published'"
        )
    # The least count kept is rounded up; the margin absorbs the error of 1 - floor.
    return {
        name: weight.numel - math.ceil(floor * weight.numel - 1e-9)
        for name, weight in scored.weights.items()
    }


def _under_caps(
    scored: Scored, removal: int, caps: Mapping[str, int], floor: float
) -> dict[str, Selection]:
    """Global cuts in which no tensor loses more than its cap; the others make up for it."""
    if removal > sum(caps.values()):
        total = sum(weight.numel for weight in scored.weights.values())
        raise SparsityError(
            f"{removal} of {total} elements shall go, and a floor of {floor:g} lets at most "
            f"{sum(caps.values())} go; lower the sparsity or the floor"
        )
    capped: dict[str, int] = {}
    cuts: dict[str, Cut] = {}
    while True:
        free = [name for name in scored.weights if name not in capped]
        if free:
            cuts = scored.subset(free).cuts([removal - sum(capped.values())])[0]
        over = {name: caps[name] for name in free if cuts[name].remove > caps[name]}
        if not over:
            break
        capped.update(over)
    ranked = scored.ranking()
    for name, count in capped.items():
        cuts[name] = ranked.cuts_of(ranked.scores(name), [count])[0]
    return {name: cuts[name] for name in scored.weights}
