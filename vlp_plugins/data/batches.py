"""Pairs -> batches that a model takes, as often as they are iterated."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from PIL import Image

from vlp_plugins.data.processors import Processor
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import DataError

logger = logging.getLogger(__name__)


class CaptionedBatches:
    """Batches of a source, the same ones in every iteration.

    A last batch that is smaller is kept, except a single pair where more were asked for: a pair
    alone has no negatives, and the published padding filter fails on it.
    """

    def __init__(
        self,
        source: CaptionSource,
        processor: Processor,
        adapter: Adapter,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        """Nothing is read until somebody iterates.

        Args:
            source: pairs of image and caption.
            processor: of the model; its tokenizer says how long a caption may be.
            adapter: its `collate` makes the batches.
            batch_size: pairs in a batch.
            limit: number of batches; None takes all.
            shuffle_seed: mixes the pairs, always the same way; None keeps their order.

        Raises:
            DataError: if `batch_size` or `limit` is below 1.
        """
        for name, value in (("batch size", batch_size), ("number of batches", limit)):
            if value is not None and value < 1:
                raise DataError(f"the {name} must be at least 1, not {value}")
        self.source = source
        self.processor = processor
        self.adapter = adapter
        self.batch_size = batch_size
        self.limit = limit
        self.shuffle_seed = shuffle_seed
        self.shortfalls: tuple[str, ...] = ()
        """What the last iteration gave less than was asked for, in sentences."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches; tensors on the CPU.

        Raises:
            DataError: if the source fails, or has no whole batch.
        """
        images: list[Image.Image] = []
        texts: list[str] = []
        made = 0
        for image, text in self.source.pairs(self.shuffle_seed):
            images.append(image)
            texts.append(text)
            if len(images) == self.batch_size:
                yield self.adapter.collate(self.processor, images, texts)
                made += 1
                images, texts = [], []
                if made == self.limit:
                    self.source.check()  # the source itself judges only at its end
                    return
        if len(images) > 1:
            yield self.adapter.collate(self.processor, images, texts)
            made += 1
        if made:
            self._say(made, alone=len(images) == 1)
        else:
            raise DataError(
                f"{self.source.description} has a single captioned image, and a batch of "
                f"{self.batch_size} needs at least two; add pairs"
            )

    def _say(self, made: int, *, alone: bool) -> None:
        """Says once what the data lacks for what was asked."""
        lacking = []
        if self.limit is not None and made < self.limit:
            lacking.append(f"{made:,} batches of the {self.limit:,} asked for")
        if alone:
            lacking.append("the last pair is left out, as it makes no batch by itself")
        if lacking and not self.shortfalls:
            logger.warning("%s: %s", self.source.description, "; ".join(lacking))
        self.shortfalls = tuple(lacking)

    def __len__(self) -> int:
        """Number of batches if no record is skipped.

        Raises:
            TypeError: if the source does not know its length (`operator.length_hint` copes).
        """
        pairs = self.source.length
        if pairs is None:
            raise TypeError(f"{self.source.description} is a stream of unknown length")
        whole, rest = divmod(pairs, self.batch_size)
        batches = whole + (rest > 1)
        return batches if self.limit is None else min(batches, self.limit)
