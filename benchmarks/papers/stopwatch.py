"""Time of batches in use, and of what others compute meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlp_plugins.models.adapter import Batch

_STAT = Path("/proc/stat")
_BUSY = (1, 2, 3, 6, 7, 8)  # user, nice, system, irq, softirq, steal


class TimedBatches(list[Batch]):
    """Batches that know how long they were in use: forward, backward, what is kept of them.

    Attributes:
        seconds: from handing out a batch to `done`, or to asking for the next; over all passes.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(batches)
        self.seconds = 0.0
        self._begin: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self._begin = time.perf_counter()
            try:
                yield batch
            finally:
                self.done()

    def done(self, *_: object) -> None:
        """The batch handed out last has been used; for `progress` of `prune`."""
        if self._begin is not None:
            self.seconds += time.perf_counter() - self._begin
            self._begin = None


class Others:
    """How much other processes compute, from when it is made; they spoil what is measured."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = _now()

    def cores(self) -> float | None:
        """Cores that others have used so far, on the average; None where the system tells not."""
        wall, own, every = _now()
        if every is None or self._all is None:
            return None
        used = (every - self._all) - (own - self._own)
        return round(max(0.0, used) / (wall - self._wall), 2)


def _now() -> tuple[float, float, float | None]:
    """Seconds: of the clock, of this process on all cores, of all processes."""
    every = None
    if _STAT.exists():
        fields = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        every = sum(int(fields[at]) for at in _BUSY) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), every
