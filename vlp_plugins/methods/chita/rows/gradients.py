"""Gradients of batches become rows, kept as planned or taken again in every sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.rows.plan import Columns, RowPlan, plan_rows
from vlp_plugins.methods.chita.rows.stores import (
    FileStore,
    GradientRows,
    KeptRows,
    Layout,
    MemoryStore,
    Store,
    add_up,
    exchange,
    released,
)
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import all_gather, batch_shard, failing_together, rank_and_size
from vlp_plugins.runtime.errors import DataError, NonFiniteError, UnsupportedError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.sharding import whole

Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Entries:
    """Which gradient goes to which column.

    Attributes:
        columns: where every weight lies.
        device: of the gradients.
        alive: bool masks by canonical name: the gradients of what was removed are 0. None: no mask.
    """

    columns: Columns
    device: torch.device
    alive: Mapping[str, torch.Tensor] | None = None

    def pieces(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Entries `start` to `stop` of a row, weight by weight.

        Args:
            gradients: by canonical name, float32; absent where the loss does not reach a weight.
            start: first column.
            stop: the column after the last.

        Yields:
            A column, and the entries from there on, float32.
        """
        for name, first, last, column in self.columns.pieces(start, stop):
            gradient = gradients.get(name)
            if gradient is None:
                yield column, torch.zeros(last - first, dtype=torch.float32, device=self.device)
                continue
            values = gradient.reshape(-1)[first:last]
            if self.alive is not None:
                values = values * self.alive[name].reshape(-1)[first:last].to(values.device)
            yield column, values

    def gathered(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same of gradients that are sharded: a collective.

        All processes make one gradient after the other whole, and each takes what it holds.
        """
        for name, bounds in zip(self.columns.names, pairwise(self.columns.starts), strict=True):
            sharded = gradients.get(name)
            gradient = {} if sharded is None else {name: whole(sharded)}
            first, last = max(start, bounds[0]), min(stop, bounds[1])
            if first < last:
                yield from self.pieces(gradient, first, last)

    def together(self, gradients: Gradients, start: int, stop: int) -> torch.Tensor:
        """The same in one tensor `[stop - start]`."""
        found = torch.empty(stop - start, dtype=torch.float32, device=self.device)
        for column, values in self.pieces(gradients, start, stop):
            found[column - start : column - start + len(values)] = values
        return found


class Rounding:
    """Adds up the squares of rows and of their errors, in float64."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Counts entries that will be kept as `dtype`.

        Args:
            values: float32 `[m]`.
            dtype: what they are rounded to.
        """
        if values.dtype == dtype:
            return
        error = values - values.to(dtype)
        norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in (error, values)]
        squares = torch.stack(norms).square_()
        self._sums = squares if self._sums is None else self._sums + squares

    def relative(self, device: torch.device) -> float:
        """The norm of the errors over that of the rows, of all processes; 0 if nothing was rounded.

        Args:
            device: where the processes meet.
        """
        sums = torch.zeros(2, dtype=torch.float64) if self._sums is None else self._sums
        error, total = add_up(sums.to(device, copy=True)).tolist()
        return float((error / total) ** 0.5) if total else 0.0


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


class PassRows(GradientRows):
    """One group of columns is in memory; the next takes its place.

    The loss starts from the same state in every pass (queues, momentum copies, random numbers), so
    a second sweep yields what the first did.
    """

    def __init__(
        self,
        filler: Filler,
        groups: Sequence[Sequence[tuple[int, ...]]],
        edges: Sequence[int],
        flat: torch.Tensor,
    ) -> None:
        """Gathers the first group.

        Args:
            filler: runs batches.
            groups: by group and process, the cuts of the parts.
            edges: first column of every process, then p.
            flat: memory for the largest group.

        Raises:
            VlpError: see `Filler.run`.
        """
        self._filler, self._groups = filler, groups
        self._flat: torch.Tensor | None = flat
        self._held: int | None = None
        self._met = 0
        # Which batches are left out must be known before the first column is used.
        self._gather(0, all_weights=filler.probe.skip_nonfinite)
        super().__init__(filler.rows, edges, self.rounding)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for index in range(len(self._groups)):
            if self._held != index:
                self._gather(index)
            yield from self._store(index).parts(self.n)

    def release(self) -> None:
        self._flat = None

    def _gather(self, index: int, *, all_weights: bool = False) -> None:
        """Runs the batches for one group of columns."""
        self._held = None  # in case it ends early
        ranges = [(cuts[0], cuts[-1]) for cuts in self._groups[index]]
        names = {name for own in ranges for name, *_ in self._filler.entries.columns.pieces(*own)}
        self._filler.run(self._store(index), ranges, None if all_weights else names)
        self._held = index
        if index >= self._met:
            self._met = index + 1
            self.rounding = self._filler.rounding.relative(self._filler.entries.device)

    def _store(self, index: int) -> MemoryStore:
        if self._flat is None:
            raise released()
        layout = Layout(self._filler.n, self._groups[index][rank_and_size()[0]])
        return MemoryStore(layout, self._flat)


logger = logging.getLogger("vlp_plugins.methods")


@contextmanager
def gradient_rows(
    probe: LossProbe,
    columns: Columns,
    batches: Callable[[], Iterator[Batch]],
    device: torch.device,
    *,
    n: int,
    budget: int | None,
    keep_in: str = "auto",
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    alive: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[GradientRows]:
    """One row per batch: the gradient of its loss by every prunable weight.

    In a process group every process runs some of the batches and holds some of the columns; all
    must be given the same batches. What rows take is given back at the end, whatever happens.

    Args:
        probe: of the model.
        columns: of its weights.
        batches: starts a pass over the batches, always the same ones.
        device: of the model.
        n: number of batches to use.
        budget: bytes of memory for rows; None: most of what is free.
        keep_in: `ram`, `disk`, `passes` (nowhere: the batches run again for every group of columns
            and sweep), or `auto`: the first of them that fits.
        folder: where a file may go; None: `TMPDIR` or /var/tmp.
        dtype: float32, or bfloat16 for half of the memory and an error that is logged.
        alive: bool masks by canonical name; gradients of removed weights are 0. None: no mask.
        progress: called with (batches run, batches to run, or None where the sweeps are not
            known).

    Yields:
        The rows. There are fewer than `n` if the probe skips batches that are not finite.

    Raises:
        UnsupportedError: if the budget is too small, with the least that will do.
        OutputError: if the disk has no room.
        DataError: if there are fewer batches than `n`.
        NonFiniteError: if a loss or gradient is NaN or infinite; names batch and weight.
    """
    plan = plan_rows(columns, n, budget, folder, dtype, keep_in=keep_in, device=device)
    logger.info("%s", plan.lines[0])
    total = None if plan.groups > 1 else n
    entries = Entries(columns, device, alive)
    filler = Filler(probe, entries, batches, n, dtype, progress, total)
    with ExitStack() as stack:
        rows = _gathered(plan, filler, stack)
        stack.callback(rows.release)
        if filler.left_out:
            logger.warning("%d of %d batches gave no row", len(filler.left_out), n)
        if dtype != torch.float32:
            logger.info("keeping rows in %s changes them by %.2g", dtype, rows.rounding)
        yield rows


def _gathered(plan: RowPlan, filler: Filler, stack: ExitStack) -> GradientRows:
    """The rows, those of the first group at least."""
    own = rank_and_size()[0]
    if plan.keep_in == "passes":
        largest = max(Layout(filler.n, group[own]).elements for group in plan.cuts)
        flat = _memory(largest, filler.dtype, plan.device)
        return PassRows(filler, plan.cuts, plan.edges, flat)
    layout = Layout(filler.n, plan.cuts[0][own])
    with failing_together():
        store = _store(plan, layout, filler.dtype, stack)
    filler.run(store, [(cuts[0], cuts[-1]) for cuts in plan.cuts[0]])
    device = filler.entries.device
    rounding = filler.rounding.relative(device)
    return KeptRows(store, filler.rows, plan.edges, device, rounding)


def _store(plan: RowPlan, layout: Layout, dtype: torch.dtype, stack: ExitStack) -> Store:
    if plan.keep_in == "ram":
        return MemoryStore(layout, _memory(layout.elements, dtype, plan.device))
    store = FileStore(layout, dtype, plan.folder)
    stack.callback(store.close)
    return store


def _memory(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError as error:
        amount = text_of(elements * dtype.itemsize)
        raise UnsupportedError(
            f"the system does not give {amount} of memory on {device} for gradient rows; give a "
            "smaller memory_budget"
        ) from error
