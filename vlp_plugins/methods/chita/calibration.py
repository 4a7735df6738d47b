"""The calibration batches of CHITA: those that make rows, those held out to choose lambda."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlp_plugins.calibration.batches import batches_again
from vlp_plugins.methods.chita.settings import MOST_HELD_OUT, Settings
from vlp_plugins.methods.method import Context
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """The calibration batches of a run, divided.

    Attributes:
        again: starts a pass over all of them.
        available: how many of the first ones may make rows.
        held_out: the last ones, on the CPU; they never make rows.
    """

    again: Callable[[], Iterator[Batch]]
    available: int
    held_out: tuple[Batch, ...] = ()

    @classmethod
    def of(cls, context: Context, settings: Settings, *, rounds: int = 1) -> Calibration:
        """Divides the batches; reads them once if their number is not sure otherwise.

        A loader's length is no more than a guess where records may be skipped.

        Args:
            context: of the run.
            settings: say how many are held out and how many rows are asked for.
            rounds: how many times fresh batches are wanted; above 1 they may start over.

        Raises:
            DataError: if there are no batches, or too few for the rows or the held-out ones.
        """
        batches, limit = context.batches, context.limit
        again = batches_again(batches, limit)
        if isinstance(batches, list | tuple):
            total = len(batches) if limit is None else min(len(batches), limit)
            held = batches[total - settings.held_out_of(total) : total] if settings.auto else ()
        elif iter(batches) is batches and not settings.auto and rounds == 1:
            total, held = _promised(settings, limit), ()
        else:
            total, held = _read(again, settings)
        check_enough(total, settings, rounds)
        return cls(again, total - len(held), tuple(held))

    def from_(self, start: int, count: int) -> Callable[[], Iterator[Batch]]:
        """`count` of the available batches from the one at `start`; the first follows the last."""

        def batches() -> Iterator[Batch]:
            first, left = start % self.available, count
            while left > 0:
                read = 0
                for batch in islice(self.again(), first, min(self.available, first + left)):
                    read += 1
                    yield batch
                if not read:
                    return  # the data ended early: what counts the rows complains
                first, left = 0, left - read

        return batches


def _promised(settings: Settings, limit: int | None) -> int:
    """The number of batches of an iterator, which cannot be counted without being used up."""
    known = [number for number in (settings.rows, limit) if number is not None]
    if not known:
        raise DataError(
            "the batches are an iterator (a generator?) of unknown length, which can be read once; "
            "give a list of batches or a loader, or say how many with limit"
        )
    return min(known)


def _read(
    again: Callable[[], Iterator[Batch]], settings: Settings
) -> tuple[int, tuple[Batch, ...]]:
    """Counts the batches and holds on to the last ones."""
    if not settings.auto:
        return sum(1 for _ in islice(again(), settings.rows)), ()
    most = int(settings.held_out) if settings.held_out >= 1 else MOST_HELD_OUT
    last: deque[Batch] = deque(maxlen=most)
    total = 0
    for batch in again():
        total += 1
        last.append(batch)
    wanted = settings.held_out_of(total)
    return total, tuple(last)[len(last) - min(wanted, len(last)) :]


def check_enough(total: int, settings: Settings, rounds: int) -> None:
    """Makes sure that there are as many batches for gradients as asked for, without those held out.

    Raises:
        DataError: if there are not.
    """
    if not total:
        raise DataError("the calibration data is empty: there is no batch; check its path")
    held = settings.held_out_of(total)
    if held >= total:
        raise DataError(
            f"lambda=auto holds {held} of the batches out and needs others for gradients, but "
            f"there are {total}; give more batches, hold out fewer, or give lambda as a number"
        )
    if rounds == 1 and settings.rows is not None and settings.rows > total - held:
        others = f" next to the {held} held out for lambda=auto" if held else ""
        raise DataError(
            f"rows={settings.rows} needs as many batches, but there are {total - held}{others}; "
            "give more batches or ask for fewer rows"
        )


def calibration_record(digests: Sequence[str], sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the manifest says about the batches that made rows.

    Args:
        digests: by round, the hash of its batches, hexadecimal.
        sizes: by round, the number of samples of each of its batches.
    """
    together = digests[0]
    if len(digests) > 1:
        together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {
        "fingerprint": together[:16],
        "batches": sum(map(len, sizes)),
        "samples": sum(map(sum, sizes)),
        "tokens": "as the loss reads them",
    }
