"""One pass over the batches: their gradients become rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.adapter import Batch
from vlp_plugins.rows.entries import Entries, Gradients
from vlp_plugins.rows.kept import Store
from vlp_plugins.rows.processes import exchange
from vlp_plugins.rows.rounding import Rounding
from vlp_plugins.runtime.distributed import all_gather, batch_shard, failing_together, rank_and_size
from vlp_plugins.runtime.errors import DataError, NonFiniteError

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class _Turn:
    """One batch of every process (of all together if the model is sharded), at last perhaps fewer.

    Attributes:
        gradients: of this process's batch.
        have: by batch, whether it gives a row.
    """

    gradients: Gradients
    have: list[bool]


@dataclass
class Filler:
    """Runs batches, as often as rows are needed; every run gives the same rows.

    Attributes:
        probe: of the model.
        entries: makes rows of gradients.
        batches: starts a pass over the batches.
        n: how many of them are read.
        dtype: of the rows.
        progress: called with (batches run in all passes, batches of all passes or None).
        total: the latter.
        rounding: of what was written.
        left_out: indices of the batches whose loss or gradient was not finite in the first run.
        done: batches run.
        runs: number of runs that ended well.
    """

    probe: LossProbe
    entries: Entries
    batches: Callable[[], Iterator[Batch]]
    n: int
    dtype: torch.dtype
    progress: Progress | None = None
    total: int | None = None
    rounding: Rounding = field(default_factory=Rounding)
    left_out: frozenset[int] = frozenset()
    done: int = 0
    runs: int = 0

    @property
    def rows(self) -> int:
        """Number of rows: one for every batch that was not left out."""
        return self.n - len(self.left_out)

    def run(
        self,
        store: Store,
        ranges: Sequence[tuple[int, int]],
        names: Collection[str] | None = None,
    ) -> None:
        """Writes the rows of some columns. Batch i belongs to process i modulo their number.

        All processes together run every batch of a sharded model.

        Args:
            store: for the columns of this process.
            ranges: by process, its first column and the one after the last.
            names: of the weights to differentiate by; None: all.

        Raises:
            DataError: if there are fewer batches than rows.
            NonFiniteError: if a loss or gradient is NaN or infinite, or those of all batches.
        """
        row = index = 0
        missing: set[int] = set()
        size = batch_shard(sharded=self.probe.sharded)[1]
        batches = _in_turns(islice(self.batches(), self.n), size)
        with self.probe.attached(names):
            while turn := self._turn(batches, index):
                have = turn.have
                if len(have) == size or index + len(have) == self.n:
                    places = [row + sum(have[:i]) if has else None for i, has in enumerate(have)]
                    self._deliver(turn.gradients, places, store, ranges)
                missing.update(index + i for i, has in enumerate(have) if not has)
                row += sum(have)
                index += len(have)
                self._tell(len(have))
        self._check(index, missing)

    def _turn(self, batches: Iterator[list[Batch]], first: int) -> _Turn | None:
        """Runs the batches of a turn; None where the data ends.

        Raises:
            VlpError: whatever happens in one process is raised in all.
        """
        with failing_together():
            turn = next(batches, [])
            gradients = self._measured(turn, first)
        found = all_gather((len(turn), gradients is not None))
        if len({count for count, _ in found}) > 1:
            counts = ", ".join(str(first + count) for count, _ in found)
            raise DataError(
                f"the processes read different numbers of batches ({counts}); give every process "
                "the same batches in the same order: no DistributedSampler, the same seed"
            )
        have = [has for _, has in found[: len(turn)]]
        return _Turn(gradients or {}, have) if turn else None

    def _measured(self, turn: Sequence[Batch], first: int) -> Gradients | None:
        """The gradients of this process's batch of a turn; None if it has none to give."""
        gradients = None
        own = batch_shard(sharded=self.probe.sharded)[0]
        for i, batch in enumerate(turn):
            if i == own and first + i not in self.left_out:
                gradients = self.probe.measure(batch, first + i)
            else:
                self.probe.advance(batch, first + i)
        return gradients

    def _deliver(
        self,
        gradients: Gradients,
        places: Sequence[int | None],
        store: Store,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        """Writes the rows of a turn.

        Args:
            gradients: of this process's batch.
            places: by process the row of its batch; None if it has none.
            store: for the columns of this process.
            ranges: by process, its first column and the one after the last.
        """

        def write(sender: int, start: int, values: torch.Tensor) -> None:
            row = places[sender] if sender < len(places) else None
            if row is not None:
                self.rounding.add(values, self.dtype)
                store.write(row, start, values)

        if len(ranges) > 1 and not self.probe.sharded:
            exchange(partial(self.entries.together, gradients), ranges, write)
            return
        pieces = self.entries.gathered if self.probe.sharded else self.entries.pieces
        for column, values in pieces(gradients, *ranges[rank_and_size()[0]]):
            write(0, column, values)

    def _tell(self, batches: int) -> None:
        self.done += batches
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _check(self, read: int, missing: set[int]) -> None:
        """Raises if rows are missing; notes which batches the first run left out."""
        if not read:
            raise DataError("the calibration data is empty: no batch was read; check its path")
        if read < self.n:
            raise DataError(
                f"{self.n} gradient rows were asked for, one batch each, but the data gave only "
                f"{read} batches; give more data or smaller batches, or ask for fewer rows"
            )
        if not self.runs:
            self.left_out = frozenset(missing)
        elif missing != self.left_out:
            raise NonFiniteError(
                f"batch {min(missing - self.left_out)} has a NaN or infinite gradient, which an "
                "earlier pass over the same batches did not have; leave it out of the data"
            )
        if not self.rows:
            raise NonFiniteError(
                f"all {read} batches were left out, because each had a NaN or infinite loss or "
                "gradient; look at the checkpoint (weights after a diverged training), or run in "
                "float32"
            )
        self.runs += 1


def _in_turns(batches: Iterable[Batch], processes: int) -> Iterator[list[Batch]]:
    """As many batches at a time as there are processes to run them, at last perhaps fewer."""
    left = iter(batches)
    while turn := list(islice(left, processes)):
        yield turn
