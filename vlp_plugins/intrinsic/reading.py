"""The batches of all passes, the same in each, and the same as before an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vlp_plugins.calibration.batches import (
    batch_size,
    batches_again,
    chain_hash,
    number_of_batches,
    say_if_fewer,
)
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError

_DIGITS = 16


class Reader:
    """Reads the batches once per pass.

    Attributes:
        hashes: the chained hash after every batch, once they were all read.
        sizes: of the batches, in samples, once they were all read; those of a list at once.
        once: whether they can be read a single time.
        total: how many a pass reads at most; None if nobody knows.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        limit: int | None,
        hashes: Sequence[str] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Reads nothing yet.

        Args:
            batches: any iterable.
            limit: number of batches of every pass; None for all.
            hashes: of an interrupted run.
            sizes: of its batches.

        Raises:
            DataError: for a single batch, or a limit below 1.
            BatchError: if a batch holds no tensor.
        """
        self._again = batches_again(batches, limit)
        self._limit = limit
        self.once = isinstance(batches, Iterator)
        self.total = number_of_batches(batches, limit)
        self.hashes, self.sizes = tuple(hashes), tuple(sizes)
        if isinstance(batches, list | tuple) and not sizes:
            self.sizes = tuple(batch_size(batch) for batch in batches[:limit])
        self._read = False

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass.

        Raises:
            DataError: if the batches are not those of an earlier pass, or there are none.
        """
        if self._read:
            yield from self._again()
            return
        digest, hashes, sizes = b"", [], []
        for index, batch in enumerate(self._again()):
            digest = chain_hash(digest, batch)
            hashes.append(digest.hex()[:_DIGITS])
            sizes.append(batch_size(batch))
            if self.hashes and self.hashes[index : index + 1] != (hashes[-1],):
                raise DataError(
                    f"batch {index} is not the one that the interrupted run has seen; give the "
                    "same data in the same order (fix the loader's seed), or start again without "
                    "resume"
                )
            yield batch
        if len(hashes) < len(self.hashes):
            raise DataError(
                f"the interrupted run has seen {len(self.hashes)} batches, but the data gave only "
                f"{len(hashes)}; give the same data, or start again without resume"
            )
        say_if_fewer(len(hashes), self._limit)
        self.hashes, self.sizes, self._read = tuple(hashes), tuple(sizes), True
