"""Importance + target -> how many weights each tensor keeps.

An allocation returns a `Selection` per tensor: something that turns the scores of that tensor into
its mask. Most are a `Cut`, a threshold with an exact count.
"""

from __future__ import annotations

from vlp_plugins.allocation.base import Allocation
from vlp_plugins.allocation.by_dimension import IdAllocation
from vlp_plugins.allocation.even import LayerAllocation, RowAllocation
from vlp_plugins.allocation.names import ALLOCATIONS, allocation_by_name
from vlp_plugins.allocation.pattern import Pattern
from vlp_plugins.allocation.thresholds import GlobalAllocation, ModalityAllocation

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "GlobalAllocation",
    "IdAllocation",
    "LayerAllocation",
    "ModalityAllocation",
    "Pattern",
    "RowAllocation",
    "allocation_by_name",
]
