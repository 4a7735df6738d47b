"""Allocations by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from vlp_plugins.allocation.base import Allocation
from vlp_plugins.allocation.by_dimension import IdAllocation
from vlp_plugins.allocation.even import LayerAllocation, RowAllocation
from vlp_plugins.allocation.pattern import Pattern
from vlp_plugins.allocation.thresholds import GlobalAllocation, ModalityAllocation
from vlp_plugins.runtime.errors import SparsityError, suggest

ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "global": GlobalAllocation,
    "modality": ModalityAllocation,
    "layer": LayerAllocation,
    "row": RowAllocation,
    "id": IdAllocation,
}


def allocation_by_name(name: str) -> Allocation:
    """`global`, `modality`, `layer`, `row`, `id` or a pattern such as `keep=2,of=4`.

    Raises:
        SparsityError: for anything else.
    """
    if match := re.fullmatch(r"keep=(\d+),\s*of=(\d+)", name):
        return Pattern(int(match[1]), int(match[2]))
    if name not in ALLOCATIONS:
        raise SparsityError(f"unknown allocation {name!r}{suggest(name, list(ALLOCATIONS))}")
    return ALLOCATIONS[name]()
