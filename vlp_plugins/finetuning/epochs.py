"""Batches epoch by epoch, in groups that make one step each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from vlp_plugins.calibration.batches import check_batches
from vlp_plugins.finetuning.files import seed_of
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError

LazyBatch = Callable[[], Batch]
"""Makes a batch when somebody needs it: of several processes each makes its own only."""

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
        """Groups in an epoch, if every one is as long as the first; None if nobody knows.

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
        """Groups for ever, from a place on; sets the global random seed at each epoch.

        Args:
            epoch: where to begin.
            done: groups of that epoch to leave out.

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
    """How many there are; None if nobody knows: a generator, or a loader of a stream."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def made(batch: Batch | LazyBatch) -> Batch:
    """The batch itself."""
    return batch if isinstance(batch, Mapping) else batch()
