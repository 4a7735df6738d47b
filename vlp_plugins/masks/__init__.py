"""Masks: the value, its bits, its provenance, its files, and how it fits a model."""

from __future__ import annotations

from vlp_plugins.masks.apply import Violation
from vlp_plugins.masks.compare import Overlap
from vlp_plugins.masks.manifest import Count, Counts, Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import pack, unpack

__all__ = ["Count", "Counts", "Manifest", "Masks", "Overlap", "Violation", "pack", "unpack"]
