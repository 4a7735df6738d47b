"""Captioned images: where pairs come from, how they become batches."""

from __future__ import annotations

from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.processors import Processor, load_processor, reads_text
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.data.sources import open_source

__all__ = [
    "CaptionSource",
    "CaptionedBatches",
    "Processor",
    "load_processor",
    "open_source",
    "reads_text",
]
