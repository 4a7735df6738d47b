"""Masks: the value, its bits, its provenance, its files, and how it fits a model."""

from __future__ import annotations

from vlp_plugins.masks.bits import pack, unpack
from vlp_plugins.masks.counts import Count, Counts
from vlp_plugins.masks.fitting import Violation
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.overlap import Overlap
from vlp_plugins.masks.value import Masks

__all__ = ["Count", "Counts", "Manifest", "Masks", "Overlap", "Violation", "pack", "unpack"]
