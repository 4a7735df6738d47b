"""Made-up batches, to measure what a real one takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from vlp_plugins.data.processors import Processor
from vlp_plugins.models.adapter import Adapter, Batch

BATCHES = 2
"""The first is slower; and there are masks of either half of the data."""
_CAPTION = "a photo of two people who sit at a table in front of a window "


@dataclass(frozen=True)
class MadeUp:
    """Batches of blank images and captions of usual length; no file is read.

    Attributes:
        adapter: collates them.
        processor: of the model.
        size: pairs in a batch.
        pixels: side of the images; the processor resizes them.
    """

    adapter: Adapter
    processor: Processor
    size: int
    pixels: int

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(BATCHES):
            shape = (self.pixels, self.pixels)
            images = [Image.new("RGB", shape, (i % 256, 127, 64)) for i in range(self.size)]
            yield self.adapter.collate(self.processor, images, [_CAPTION] * self.size)
