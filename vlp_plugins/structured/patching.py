"""Sets a model's attributes right after somebody else has cut its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.saving import REBUILT
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.attributes import heads_of, set_heads
from vlp_plugins.structured.cutting import rescale_queries
from vlp_plugins.structured.finding import Group, survey


@dataclass(frozen=True, slots=True)
class _Change:
    """What the modules at `holders` should say; `queries` are their query layers."""

    holders: list[str]
    queries: list[str]
    heads: int
    old: int
    new: int


@takes_model
def patch(model: nn.Module, adapter: Adapter, heads: Mapping[str, int] | None = None) -> None:
    """Makes number and size of heads agree with the layers as they are now.

    Where a module computes the factor of its scores from the size of its heads, its query is
    rescaled, so that the factor stays that of the uncut heads. What agrees already is left alone.

    Args:
        model: whose layers were cut.
        adapter: of the model.
        heads: number of heads by block name, as it is now. Without it, as many dimensions per head
            as before or as many heads as before are assumed; if both fit, it must be given.

    Raises:
        StructureError: if the layers' sizes cannot be explained; nothing was changed then.
    """
    groups = [g for g in survey(model, adapter).groups if g.sites[0].kind == "attention"]
    known = heads or {}
    changes = [_change(model, group, known.get(group.name)) for group in groups]
    for change in changes:
        if change is None:
            continue
        if change.old != change.new:
            rescale_queries(model, change.holders, change.queries, change.old, change.new)
        setattr(model, REBUILT, True)
        for holder in change.holders:
            set_heads(model.get_submodule(holder), change.heads, change.new)


def _change(model: nn.Module, group: Group, given: int | None) -> _Change | None:
    """What must be set; None if layers and attributes agree."""
    places = (*group.sites, *group.followers)
    width = _width(model, places[0].output)
    before = heads_of(model.get_submodule(places[0].holder), width)
    if before is None or (before[0] * before[1] == width and given in (None, before[0])):
        return None
    count, size = before
    heads = given or _guessed(group.name, count, size, width)
    if width % heads:
        raise StructureError(f"{group.name!r} is {width} wide now, which is not {heads} heads")
    changed = [place for place in places if _width(model, place.output) == width]
    return _Change(
        [place.holder for place in changed],
        [place.inner[0] for place in changed],
        heads,
        size,
        width // heads,
    )


def _guessed(name: str, count: int, size: int, width: int) -> int:
    """The number of heads, if the new width tells whether heads or dimensions went."""
    whole, narrower = width % size == 0, width % count == 0
    if whole == narrower:
        why = "both fit" if whole else "neither fits"
        raise StructureError(
            f"{name!r} had {count} heads of {size} and is {width} wide now: fewer heads, or fewer "
            f"dimensions of each? {why}; give patch(..., heads={{{name!r}: number of heads now}})"
        )
    return width // size if whole else count


def _width(model: nn.Module, path: str) -> int:
    linear = model.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise StructureError(f"{path} is a {type(linear).__name__} and no Linear layer any more")
    return linear.in_features
