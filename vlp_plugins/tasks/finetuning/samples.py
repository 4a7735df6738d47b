"""Samples of a fine-tuning, mixed in every epoch, prefetched in groups that make one step."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from vlp_plugins.calibration.batches import check_batches
from vlp_plugins.data.batches import collated
from vlp_plugins.data.chat import IGNORED
from vlp_plugins.data.processors import Processor
from vlp_plugins.data.records import Sample, upright_rgb
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.runtime.errors import DataError, first_line
from vlp_plugins.tasks.captioning import tokenizer_of
from vlp_plugins.tasks.finetuning.files import seed_of

LazyBatch = Callable[[], Batch]
"""Makes a batch when it is needed: each of several processes makes its own only."""

Batches = Iterable[Batch | LazyBatch] | Callable[[int], Iterable[Batch | LazyBatch]]
"""The same batches in every epoch, or by number of the epoch (from 0) other ones."""

Group = list[Batch | LazyBatch]

_NO_BATCH = -1
"""Where the seed of a batch has its number."""


class Epochs:
    """Groups of batches; what is left over at the end of an epoch is dropped."""

    def __init__(self, batches: Batches, per_step: int, *, seed: int = 0) -> None:
        """Nothing is read yet.

        Args:
            batches: of a step each, if one process takes a step with every batch.
            per_step: batches in a group.
            seed: with the number of the epoch, for loaders that shuffle: an epoch has one order, in
                every process and when a run is resumed.

        Raises:
            DataError: if that is a single batch.
        """
        if not callable(batches):
            check_batches(batches)
        self._batches = batches
        self._per_step = per_step
        self._seed = seed

    def steps(self) -> int | None:
        """Groups in an epoch, if every one is as long as the first; None if that is unknown.

        Raises:
            DataError: if there is no whole group.
        """
        count = _length(self._of(0))
        if count is None:
            return None
        if count < self._per_step:
            raise DataError(
                f"an epoch has {count} batches, but a step takes {self._per_step}; give more data, "
                "smaller batches, or accumulate fewer"
            )
        return count // self._per_step

    def from_place(self, epoch: int, done: int) -> Iterator[tuple[int, int, Group]]:
        """Groups without end; sets the global random seed at each epoch.

        They begin in an epoch after the groups that are `done`.

        Yields:
            Number of the epoch, number of the group in it, both from 0, and the group.

        Raises:
            DataError: if an epoch has no group at all.
        """
        while True:
            number = -1
            for number, group in enumerate(self._groups(epoch)):
                if number >= done:
                    yield epoch, number, group
            if number < 0:
                raise DataError(
                    f"epoch {epoch} has no {self._per_step} batches, as one step takes; give more "
                    "data, or batches that can be iterated again (a list, a loader, a function)"
                )
            epoch, done = epoch + 1, 0

    def _groups(self, epoch: int) -> Iterator[Group]:
        group: Group = []
        torch.manual_seed(seed_of(self._seed, epoch, _NO_BATCH))
        for batch in self._of(epoch):
            group.append(batch)
            if len(group) == self._per_step:
                yield group
                group = []

    def _of(self, epoch: int) -> Iterable[Batch | LazyBatch]:
        return self._batches(epoch) if callable(self._batches) else self._batches


def _length(batches: Iterable[object]) -> int | None:
    """How many there are; None if unknown: a generator, or a loader of a stream."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def made(batch: Batch | LazyBatch) -> Batch:
    """The batch itself."""
    return batch if isinstance(batch, Mapping) else batch()


_log = logging.getLogger(__name__)
_FEWEST = 2  # rows of a batch: a contrastive loss of one is 0


@dataclass(frozen=True, slots=True)
class _Row:
    sample: Sample
    text: str
    answer: str | None


class SampleEpochs:
    """By number of the epoch its batches, which are made when they are needed.

    Every epoch has every caption once, in passes that show no image twice: of several captions of
    an image in one batch a contrastive loss would take some for wrong. Where a batch reaches into
    the next pass, captions of images that it has already wait for the batch after it; only where
    there are fewer images than a batch has rows, some are in it twice. Rows that are left over are
    dropped. The mixture depends on the seed and the epoch only.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        adapter: Adapter,
        batch_size: int,
        *,
        seed: int = 0,
    ) -> None:
        """Nothing is read until a batch is needed; all samples are of the same kind.

        Raises:
            DataError: if there are fewer rows than a batch has.
        """
        self._samples = samples
        self._processor, self._adapter = processor, adapter
        self._batch_size, self._seed = batch_size, seed
        rows = sum(len(sample.texts) for sample in samples)
        if rows < batch_size or batch_size < 1:
            raise DataError(
                f"the data has {rows:,} rows, fewer than a batch of {batch_size:,}; give a smaller "
                "--batch-size, or more data"
            )

    def __call__(self, epoch: int) -> list[LazyBatch]:
        """The batches of an epoch."""
        return [partial(self._batch, rows) for rows in _cut(self._rows(epoch), self._batch_size)]

    def _rows(self, epoch: int) -> list[_Row]:
        rng = random.Random(f"{self._seed}|{epoch}")
        first = [rng.randrange(len(sample.texts)) for sample in self._samples]
        rows: list[_Row] = []
        for turn in range(max(len(sample.texts) for sample in self._samples)):
            numbers = [n for n, sample in enumerate(self._samples) if turn < len(sample.texts)]
            rng.shuffle(numbers)
            for number in numbers:
                sample = self._samples[number]
                text = sample.texts[(first[number] + turn) % len(sample.texts)]
                answer = rng.choice(sample.answers) if sample.answers else None
                rows.append(_Row(sample, text, answer))
        return rows

    def _batch(self, rows: Sequence[_Row]) -> Batch:
        images, seconds, kept = [], [], []
        for row in rows:
            image, second = _decoded(row.sample, row.sample.image), None
            if image is not None and row.sample.second is not None:
                second = _decoded(row.sample, row.sample.second)
            if image is None or (row.sample.second is not None and second is None):
                continue
            images.append(image)
            kept.append(row)
            if second is not None:
                seconds.append(second)
        if len(kept) < min(_FEWEST, self._batch_size):
            raise DataError(
                f"of {len(rows)} images of a batch only {len(kept)} can be read (first: "
                f"{rows[0].sample.place}); repair or remove the others"
            )
        texts = [row.text for row in kept]
        batch = collated(self._adapter, self._processor, images, texts, seconds)
        labels = [row.sample.label for row in kept if row.sample.label is not None]
        answers = [row.answer for row in kept if row.answer is not None]
        if labels:
            batch["labels"] = torch.tensor(labels, device="cpu")
        if answers:
            tokenizer = tokenizer_of(self._processor, "answers need")
            made = tokenizer(answers, padding=True, truncation=True, return_tensors="pt")
            batch["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORED)
        return batch


def _cut(rows: Sequence[_Row], size: int) -> list[list[_Row]]:
    """Batches of rows in their order, no image twice in a batch as far as that can be."""
    batches: list[list[_Row]] = []
    remaining = deque(rows)
    for _ in range(len(rows) // size):
        batch: list[_Row] = []
        duplicates: list[_Row] = []
        images: set[int] = set()
        while remaining and len(batch) < size:
            row = remaining.popleft()
            (duplicates if id(row.sample) in images else batch).append(row)
            images.add(id(row.sample))
        missing = size - len(batch)
        remaining.extendleft(reversed(duplicates[missing:]))
        batches.append(batch + duplicates[:missing])
    return batches


def _decoded(sample: Sample, image: Callable[[], Image.Image]) -> Image.Image | None:
    """An image of a sample; None, with a warning, if it is damaged."""
    try:
        return upright_rgb(image())
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        _log.warning("left out %s: %s", sample.place, first_line(error))
        return None
