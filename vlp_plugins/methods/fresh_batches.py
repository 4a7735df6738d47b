"""Fresh calibration batches for every round of an iterative method."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from vlp_plugins.calibration.batches import batch_size, batches_again, chain_hash
from vlp_plugins.methods.context import Context
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError

logger = logging.getLogger("vlp_plugins.methods")


class FreshBatches:
    """Hands out the batches one after another; after the last comes the first again."""

    def __init__(self, batches: Iterable[Batch], limit: int | None = None) -> None:
        """Reads nothing yet.

        Args:
            batches: see `batches_again`.
            limit: number of batches after which the first comes again; None for all.
        """
        self._again = batches_again(batches, limit)
        self._running: Iterator[Batch] | None = None
        self._warned = False

    def restart(self) -> None:
        """The next batch is the first."""
        self._running = None

    def take(self, count: int) -> Iterator[Batch]:
        """The next batches.

        Raises:
            DataError: if there are none, or if they end and cannot be read again.
        """
        for _ in range(count):
            if self._running is None:
                self._running = self._again()
            batch = next(self._running, None)
            if batch is None:
                self._start_over()
                batch = next(self._running)
            yield batch

    def _start_over(self) -> None:
        self._running = self._again()
        if not self._warned:
            logger.warning(
                "the calibration data is shorter than all rounds or steps together: after its last "
                "batch comes the first again"
            )
            self._warned = True


class Seen:
    """Batches on their way to where they are used; notes what they were.

    Attributes:
        sizes: number of samples of each so far.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._digest = b""
        self.sizes: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._digest = chain_hash(self._digest, batch)
            self.sizes.append(batch_size(batch))
            yield batch

    @property
    def digest(self) -> str:
        """Hash of all of them so far, in their order, hexadecimal."""
        return self._digest.hex()

    def calibration(self) -> dict[str, Any]:
        """What the manifest of masks says about them."""
        return {
            "fingerprint": self.digest[:16],
            "batches": len(self.sizes),
            "samples": sum(self.sizes),
        }


def number_of_batches(context: Context) -> int | None:
    """How many batches a pass over the data has; None if nobody can say.

    A plan has no batches yet: the limit says how many there will be.
    """
    if isinstance(context.batches, tuple) and not context.batches:
        return context.limit
    try:
        length = len(context.batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader over an iterable data set
        return context.limit
    return length if context.limit is None else min(length, context.limit)


def share_of(context: Context, rounds: int) -> int:
    """How many batches each round gets if all together go over the data once; at least one.

    Raises:
        DataError: if nobody can say how many batches there are.
    """
    total = number_of_batches(context)
    if total is None:
        raise DataError(
            "nobody can say how many batches there are (an iterator?), so they cannot be shared "
            "out among rounds; give batches_per_round, a limit, or a list of batches"
        )
    return max(1, total // rounds)
