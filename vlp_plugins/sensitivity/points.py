"""Points measured one by one: prune a group, look, put its weights back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlp_plugins.models.saving import restored
from vlp_plugins.runtime.distributed import rank_and_size
from vlp_plugins.runtime.sharding import zero_outside
from vlp_plugins.sensitivity.curves import Point
from vlp_plugins.sensitivity.groups import Group
from vlp_plugins.sensitivity.judging import Judge
from vlp_plugins.sensitivity.records import Key, PointsFile, key_of
from vlp_plugins.sensitivity.selecting import Selector


def missing_points(
    selector: Selector,
    judge: Judge,
    groups: Sequence[Group],
    sparsities: Sequence[float],
    known: Mapping[Key, Point],
    record: PointsFile,
    progress: Callable[[int, int | None], None] | None,
) -> dict[Key, Point]:
    """Prunes and measures the points that are not known yet; of several processes each its share.

    Args:
        selector: makes the masks.
        judge: measures the model.
        groups: in order.
        sparsities: rising.
        known: is not measured again.
        record: keeps every point.
        progress: called with (points done, points in all) of this process.
    """
    rank, world = rank_and_size()
    missing = [(g, s) for g in groups for s in sparsities if key_of(g, s) not in known]
    mine = missing[rank::world]
    found: dict[Key, Point] = {}
    for group in groups:
        wanted = [s for other, s in mine if other is group]
        if not wanted:
            continue
        part = selector.part(group)
        for target, masks in zip(wanted, selector.masks(group, wanted), strict=True):
            with restored(part):
                for name, mask in masks.items():
                    parameter = part[name].parameter
                    zero_outside(parameter, mask.to(parameter.device))
                point = judge.measure(target, masks.removed)
            found[key_of(group, target)] = point
            record.add(group, point)
            if progress is not None:
                progress(len(found), len(mine))
    return found
