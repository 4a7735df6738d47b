"""Batches that a model takes, from records or from examples that must all be measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn

from vlp_plugins.data.chat import ChatProcessor
from vlp_plugins.data.karpathy import is_karpathy
from vlp_plugins.data.labelled import LabelSource, open_labelled
from vlp_plugins.data.nlvr2 import has_statements, statement_source
from vlp_plugins.data.processors import Processor, reads_text
from vlp_plugins.data.records import Captions, CaptionSource, Record, Said, texts_of, upright
from vlp_plugins.data.sources import open_source
from vlp_plugins.models.adapter import Adapter, Batch, StatementAdapter
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.runtime.parallel import ahead, default_workers, prefetched

logger = logging.getLogger(__name__)


class CaptionedBatches:
    """Batches of a source, the same ones in every iteration.

    A last batch that is smaller is kept, except a single pair where more were asked for: a pair
    alone has no negatives, and the published padding filter fails on it. A conversation does.
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
        workers: int | None = None,
    ) -> None:
        """Nothing is read before the first iteration.

        `limit` is the number of batches (None: all), and `shuffle_seed` that of the order of the
        pairs (None: as stored). So many `workers` decode images in threads while the model
        computes, and one more makes the batches; 0 for none, None for the cores but one, at most 8.
        The batches are the same for any number.

        Raises:
            DataError: if `batch_size` or `limit` is below 1, or `workers` below 0.
        """
        for name, value in (("batch size", batch_size), ("number of batches", limit)):
            if value is not None and value < 1:
                raise DataError(f"the {name} must be at least 1, not {value}")
        if workers is not None and workers < 0:
            raise DataError(f"workers={workers}; give a number of threads from 0 on")
        self.source = source
        self.processor = processor
        self.adapter = adapter
        self.batch_size = batch_size
        self.limit = limit
        self.shuffle_seed = shuffle_seed
        self.workers = default_workers() if workers is None else workers
        self.shortfalls: tuple[str, ...] = ()
        """What the last iteration gave less than was asked for, in sentences."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches; tensors on the CPU.

        Raises:
            DataError: if the source fails, or has no whole batch.
        """
        return prefetched(self._made()) if self.workers else self._made()

    def _made(self) -> Iterator[Batch]:
        images: list[Any] = []
        texts: list[Any] = []
        made = 0
        for image, text in self.source.pairs(self.shuffle_seed, workers=self.workers):
            images.append(image)
            texts.append(text)
            if len(images) == self.batch_size:
                yield self._batch(images, texts)
                made += 1
                images, texts = [], []
                if made == self.limit:
                    self.source.check()  # the source itself checks only at its end
                    return
        if len(images) >= self._least:
            yield self._batch(images, texts)
            made += 1
        if not made:
            raise DataError(
                f"{self.source.description} has a single captioned image, and a batch of "
                f"{self.batch_size} needs at least two; add pairs"
            )
        lacking = []
        if self.limit is not None and made < self.limit:
            lacking.append(f"{made:,} batches of the {self.limit:,} asked for")
        if 0 < len(images) < self._least:
            lacking.append("the last pair is left out, as it makes no batch by itself")
        if lacking and not self.shortfalls:
            logger.warning("%s: %s", self.source.description, "; ".join(lacking))
        self.shortfalls = tuple(lacking)

    @property
    def _least(self) -> int:
        """Rows of a batch: a conversation needs no other, a pair does."""
        return 1 if isinstance(self.processor, ChatProcessor) else 2

    def _batch(self, images: list[Any], texts: list[Any]) -> Batch:
        if self.source.captions == "labels":
            labels = torch.tensor(list(map(int, texts)), device="cpu")
            batch = self.adapter.collate(self.processor, images, [""] * len(images))
        elif self.source.captions == "statements":
            left, right = zip(*images, strict=True)
            labels = torch.tensor([statement.label for statement in texts], device="cpu")
            said = [statement.texts[0] for statement in texts]
            batch = collated(self.adapter, self.processor, left, said, right)
        else:
            return self.adapter.collate(self.processor, images, texts)
        return batch | {"labels": labels}

    def __len__(self) -> int:
        """Number of batches if no record is skipped.

        Raises:
            TypeError: if the source does not know its length (`operator.length_hint` copes).
        """
        pairs = self.source.length
        if pairs is None:
            raise TypeError(f"{self.source.description} is a stream of unknown length")
        whole, rest = divmod(pairs, self.batch_size)
        batches = whole + (rest >= self._least)
        return batches if self.limit is None else min(batches, self.limit)

    def __repr__(self) -> str:
        pairs = self.source.length
        known = "" if pairs is None else f"{len(self):,} "
        size = f"{known}batches of {self.batch_size}"
        return f"CaptionedBatches({size} from {self.source.description})"


def open_batches(
    data: str,
    processor: Processor,
    adapter: Adapter,
    batch_size: int,
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    workers: int | None = None,
    model: nn.Module | None = None,
) -> CaptionedBatches:
    """Batches of what a user names as data; see `open_source` and `CaptionedBatches`.

    A model of images only gets them without captions, and with `labels` if they are in classes
    that it knows (its configuration may name them): gradient methods need them.

    A chat model gets whole conversations where the data has some. A folder with statements of NLVR2
    is read as such, if models of the family judge those; see `StatementAdapter`.

    Raises:
        DataError: if there is no data.
    """
    source: CaptionSource | None = None
    folder = Path(data).expanduser()
    is_captioned = image_column is not None or is_karpathy(folder)
    if isinstance(adapter, StatementAdapter) and has_statements(folder):
        source = statement_source(folder, split)
    elif not is_captioned and not reads_text(processor):
        with suppress(DataError):  # images without classes
            source = LabelSource(open_labelled(data, split), model)
    if source is None:
        captions: Captions = "first" if reads_text(processor) else "none"
        source = open_source(
            data,
            split=split,
            image_column=image_column,
            caption_column=caption_column,
            captions="conversations" if isinstance(processor, ChatProcessor) else captions,
        )
    return CaptionedBatches(
        source,
        processor,
        adapter,
        batch_size,
        limit=limit,
        shuffle_seed=shuffle_seed,
        workers=workers,
    )


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a batch.

    Attributes:
        image: opens the image; the same object stands for the same image.
        text: what the model reads with it; what a chat model is asked.
        label: number of the class; None without classes.
        second: opens the other image of a statement about two; None for rows of one image.
    """

    place: str
    image: Callable[[], Image.Image]
    text: Said = ""
    label: int | None = None
    second: Callable[[], Image.Image] | None = None


class ExampleBatches:
    """Batches of examples, the same ones in every iteration; tensors on the CPU."""

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        adapter: Adapter,
        batch_size: int,
        workers: int | None = None,
    ) -> None:
        """Nothing is read before the first iteration; examples of one image follow each other."""
        self._examples = examples
        self._workers = default_workers() if workers is None else workers
        self._processor, self._adapter = processor, adapter
        self._batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches; the last may be smaller."""
        return -(-len(self._examples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches, with `labels` where the examples have some.

        Raises:
            DataError: if an image cannot be decoded.
        """
        return prefetched(self._made()) if self._workers else self._made()

    def _made(self) -> Iterator[Batch]:
        images = self._images()
        for start in range(0, len(self._examples), self._batch_size):
            rows = self._examples[start : start + self._batch_size]
            found = list(islice(images, len(rows)))
            firsts = [image for image, _ in found]
            seconds = [image for _, image in found if image is not None]
            texts: list[Any] = [row.text for row in rows]
            batch = collated(self._adapter, self._processor, firsts, texts, seconds)
            labels = [row.label for row in rows if row.label is not None]
            yield batch | {"labels": torch.tensor(labels, device="cpu")} if labels else batch

    def _images(self) -> Iterator[tuple[Image.Image, Image.Image | None]]:
        """Of every example; examples of one image share it."""
        runs = [list(run) for _, run in groupby(self._examples, lambda row: id(row.image))]
        for decoded in ahead(_decode_run, runs, self._workers):
            yield from decoded


def collated(
    adapter: Adapter,
    processor: Processor,
    images: Sequence[Image.Image],
    texts: Sequence[Any],
    seconds: Sequence[Image.Image] = (),
) -> dict[str, Any]:
    """A batch of `B` rows of an image and a text, or of two images and a text.

    Returns:
        What the adapter makes of them; with `seconds`, `pixel_values` is `[B, 2, 3, H, W]`.
    """
    batch = dict(adapter.collate(processor, [*images, *seconds], texts))
    if seconds:
        both: torch.Tensor = batch["pixel_values"]
        batch["pixel_values"] = both.unflatten(0, (2, len(images))).transpose(0, 1).contiguous()
    return batch


def captioned(source: CaptionSource, limit: int | None) -> list[tuple[Record, list[str]]]:
    """The first images of a source in stored order, each with all its captions.

    Raises:
        DataError: if there is none, or a record has no caption.
    """
    found = []
    for record in first(source.records(None), limit, source.description):
        try:
            found.append((record, texts_of(record.caption)))
        except ValueError as error:
            raise DataError(f"{source.description}, {record.place}: {error}") from error
    if not found:
        raise DataError(f"{source.description} holds no captioned image")
    return found


def first(items: Iterable[T], limit: int | None, description: str) -> Iterator[T]:
    """The first `limit` items, or all; warns if there are fewer."""
    count = 0
    for item in islice(items, limit):
        count += 1
        yield item
    if limit is not None and count < limit:
        logger.warning("%s has %s of the %s asked for", description, f"{count:,}", f"{limit:,}")


def _decode_run(run: Sequence[Example]) -> list[tuple[Image.Image, Image.Image | None]]:
    """Of examples with one first image: that, and the second one of each."""
    first = _decoded(run[0].image, run[0].place)
    seconds = (None if row.second is None else _decoded(row.second, row.place) for row in run)
    return [(first, second) for second in seconds]


def _decoded(image: Callable[[], Any], place: str) -> Any:
    try:
        return upright(image())
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(
            f"the image of {place} cannot be read ({first_line(error)}); figures of a part "
            "of the data would not compare with others: repair or remove it"
        ) from error
