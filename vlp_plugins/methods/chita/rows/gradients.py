"""Gradients of batches become rows, kept as planned or taken again in every sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice, pairwise

import torch
from torch import distributed

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.rows.plan import RowPlan
from vlp_plugins.methods.chita.rows.stores import (
    FileStore,
    Layout,
    MemoryStore,
    Store,
    exchange,
)
from vlp_plugins.methods.chita.solver.problem import Rows
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import all_gather, batch_shard, failing_together, rank_and_size
from vlp_plugins.runtime.errors import DataError, NonFiniteError, UnsupportedError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.sharding import whole

logger = logging.getLogger("vlp_plugins.methods.chita.rows")

Gradients = Mapping[str, torch.Tensor]
"""By canonical name, float32; absent where the loss does not reach a weight."""
Progress = Callable[[int, int | None], None]


class Filler:
    """Runs batches, as often as rows are needed; every run gives the same rows.

    Attributes:
        probe: of the model.
        plan: where which columns go.
        needs: of the plan.
        squares: summed over the entries that this process has written in the first run, and over
            what rounding changed, float64 `[2]`.
        left_out: indices of the batches whose loss or gradient was not finite in the first run.
    """

    def __init__(
        self,
        probe: LossProbe,
        plan: RowPlan,
        batches: Callable[[], Iterator[Batch]],
        alive: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Runs nothing yet; see `gradient_rows`."""
        self.probe, self.plan, self.needs = probe, plan, plan.needs
        self._batches, self._alive, self._progress = batches, alive, progress
        self.squares = torch.zeros(2, dtype=torch.float64, device=plan.needs.device)
        self.left_out: frozenset[int] = frozenset()
        self._runs = 0  # that ended well
        self._done = 0  # batches in all runs

    @property
    def rows(self) -> int:
        """Number of rows: one for every batch that was not left out."""
        return self.needs.n - len(self.left_out)

    def run(self, store: Store, group: int) -> None:
        """Writes the rows of a group of columns. Batch i belongs to process i modulo their number.

        All processes together run every batch of a sharded model. The first run looks at all
        columns: which batches are left out must be known before any column is used.

        Args:
            store: for the columns of this process.
            group: index of the group in the plan.

        Raises:
            DataError: if there are fewer batches than rows.
            NonFiniteError: if a loss or gradient is NaN or infinite, or those of all batches.
        """
        n, columns = self.needs.n, self.needs.columns
        ranges = [(cuts[0], cuts[-1]) for cuts in self.plan.cuts[group]]
        names = {name for own in ranges for name, *_ in columns.pieces(*own)}
        if not self._runs:
            ranges = list(pairwise(self.needs.edges))
        row = index = 0
        missing: set[int] = set()
        size = batch_shard(sharded=self.probe.sharded)[1]
        batches = islice(self._batches(), n)
        with self.probe.attached(names if self._runs else None):
            while turn := self._turn(batches, size, index):
                gradients, have = turn
                if len(have) == size or index + len(have) == n:
                    places = [row + sum(have[:i]) if has else None for i, has in enumerate(have)]
                    self._deliver(gradients, places, store, ranges)
                missing.update(index + i for i, has in enumerate(have) if not has)
                row += sum(have)
                index += len(have)
                self._done += len(have)
                if self._progress is not None:
                    self._progress(self._done, None if self.plan.groups > 1 else n)
        self._check(index, missing)

    def _turn(
        self, batches: Iterator[Batch], size: int, first: int
    ) -> tuple[Gradients, list[bool]] | None:
        """Runs one batch of every process (of all together if the model is sharded).

        Returns:
            The gradients of this process's batch, and by batch whether it gives a row; there may
            be fewer batches than processes at last. None where the data ends.

        Raises:
            VlpError: an error of one process is raised in all.
        """
        with failing_together():
            turn = list(islice(batches, size))
            gradients = self._measured(turn, first)
        found = all_gather((len(turn), gradients is not None))
        if len({count for count, _ in found}) > 1:
            counts = ", ".join(str(first + count) for count, _ in found)
            raise DataError(
                f"the processes read different numbers of batches ({counts}); give every process "
                "the same batches in the same order: no DistributedSampler, the same seed"
            )
        return (gradients or {}, [has for _, has in found[: len(turn)]]) if turn else None

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
        """Writes the rows of a turn: by process, the place of its row and the columns it holds."""

        def write(sender: int, start: int, values: torch.Tensor) -> None:
            row = places[sender] if sender < len(places) else None
            if row is not None:
                if not self._runs:
                    self._count(values)
                store.write(row, start, values)

        if len(ranges) > 1 and not self.probe.sharded:
            exchange(partial(self._joined, gradients), ranges, write)
            return
        pieces = self._whole_pieces if self.probe.sharded else self._pieces
        for column, values in pieces(gradients, *ranges[rank_and_size()[0]]):
            write(0, column, values)

    def _count(self, values: torch.Tensor) -> None:
        """Adds up the squares of entries, float32 `[m]`, before they are rounded."""
        kept = values.to(self.needs.dtype)
        norms = [torch.linalg.vector_norm(kept, dtype=torch.float64).square()]
        if kept.dtype != values.dtype:
            norms.append(torch.linalg.vector_norm(values - kept, dtype=torch.float64).square())
        self.squares[: len(norms)] += torch.stack(norms).to(self.squares.device)

    def _pieces(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Entries `start` to `stop` of a row, weight by weight: a column, and those from there on.

        Gradients of weights that were removed before are 0.
        """
        for name, first, last, column in self.needs.columns.pieces(start, stop):
            gradient = gradients.get(name)
            if gradient is None:
                zeros = torch.zeros(last - first, dtype=torch.float32, device=self.needs.device)
                yield column, zeros
                continue
            values = gradient.reshape(-1)[first:last]
            if self._alive is not None:
                values = values * self._alive[name].reshape(-1)[first:last].to(values.device)
            yield column, values

    def _whole_pieces(
        self, gradients: Gradients, start: int, stop: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """`_pieces` of gradients that are sharded: a collective.

        All processes make one gradient after the other whole, and each takes what it holds.
        """
        columns = self.needs.columns
        for name, bounds in zip(columns.names, pairwise(columns.starts), strict=True):
            sharded = gradients.get(name)
            gradient = {} if sharded is None else {name: whole(sharded)}
            first, last = max(start, bounds[0]), min(stop, bounds[1])
            if first < last:
                yield from self._pieces(gradient, first, last)

    def _joined(self, gradients: Gradients, start: int, stop: int) -> torch.Tensor:
        """`_pieces` in one tensor `[stop - start]`."""
        found = torch.empty(stop - start, dtype=torch.float32, device=self.needs.device)
        for column, values in self._pieces(gradients, start, stop):
            found[column - start : column - start + len(values)] = values
        return found

    def _check(self, read: int, missing: set[int]) -> None:
        """Raises if rows are missing; notes which batches the first run left out."""
        if not read:
            raise DataError("the calibration data is empty: no batch was read; check its path")
        if read < self.needs.n:
            raise DataError(
                f"{self.needs.n} gradient rows were asked for, one batch each, but the data gave "
                f"only {read} batches; give more data or smaller batches, or ask for fewer rows"
            )
        if not self._runs:
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
        self._runs += 1


class GradientRows(Rows):
    """Rows of a model; every process holds some of the columns.

    Rows that are kept are one group of columns. Otherwise each group takes the place of the one
    before: the loss starts from the same state in every pass (queues, momentum copies, random
    numbers), so that a second sweep yields what the first did.

    Attributes:
        mean_square: of all elements.
        rounding: relative error of the rows by rounding them to their dtype, in the Frobenius norm;
            0 for float32.
    """

    def __init__(self, filler: Filler, stores: Sequence[Store]) -> None:
        """Gathers the first group.

        Args:
            filler: runs batches.
            stores: for the columns of this process, by group.

        Raises:
            VlpError: see `Filler.run`.
        """
        self._filler, self._stores = filler, stores
        self._held: int | None = None
        self._gather(0)
        self.n, self.p = filler.rows, filler.needs.columns.p
        squares, errors = self.add_up(filler.squares.clone()).tolist()
        self.mean_square = squares / (self.n * self.p)
        self.rounding = (errors / squares) ** 0.5 if errors else 0.0

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        if not self._stores:
            raise UnsupportedError(
                "these gradient rows are gone: use them inside `with gradient_rows`"
            )
        self.sweeps += 1
        for group, store in enumerate(self._stores):
            if self._held != group:
                self._gather(group)
            for start, part in store.parts(self.n):
                yield start, part.to(self._filler.needs.device)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        if rank_and_size()[1] > 1:
            distributed.all_reduce(tensor)
        return tensor

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        if rank_and_size()[1] > 1:
            entries = vector.view(torch.uint8) if vector.dtype == torch.bool else vector
            for owner, (start, stop) in enumerate(pairwise(self._filler.needs.edges)):
                if start < stop:
                    distributed.broadcast(entries[start:stop], src=owner)
        return vector

    def release(self) -> None:
        """Gives the memory back; there are no parts any more."""
        self._stores = ()

    def _gather(self, group: int) -> None:
        """Runs the batches for one group of columns."""
        self._held = None  # in case it ends early
        self._filler.run(self._stores[group], group)
        self._held = group


@contextmanager
def gradient_rows(
    probe: LossProbe,
    plan: RowPlan,
    batches: Callable[[], Iterator[Batch]],
    *,
    alive: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[GradientRows]:
    """One row per batch: the gradient of its loss by every prunable weight.

    In a process group every process runs some of the batches and holds some of the columns; all
    must be given the same batches. What rows take is freed at the end, also after an error.

    Args:
        probe: of the model.
        plan: says how many batches are used, and where their rows are kept.
        batches: starts a pass over the batches, always the same ones.
        alive: bool masks by canonical name; gradients of removed weights are 0. None: no mask.
        progress: called with (batches run, batches to run, or None where the sweeps are not
            known).

    Yields:
        The rows. There are fewer than planned if the probe skips batches that are not finite.

    Raises:
        UnsupportedError: if the system does not give the memory.
        OutputError: if the disk has no room.
        DataError: if there are fewer batches than planned.
        NonFiniteError: if a loss or gradient is NaN or infinite; names batch and weight.
    """
    logger.info("%s", plan.lines[0])
    filler = Filler(probe, plan, batches, alive, progress)
    with ExitStack() as stack:
        with failing_together():
            stores = _stores(plan, stack)
        rows = GradientRows(filler, stores)
        del stores  # or they would outlive `release`
        stack.callback(rows.release)
        if filler.left_out:
            logger.warning("%d of %d batches gave no row", len(filler.left_out), plan.needs.n)
        if plan.needs.dtype != torch.float32:
            logger.info("keeping rows in %s changes them by %.2g", plan.needs.dtype, rows.rounding)
        yield rows


def _stores(plan: RowPlan, stack: ExitStack) -> Sequence[Store]:
    """Room for the columns of this process, by group; groups share their memory."""
    layouts = [Layout(plan.needs.n, group[rank_and_size()[0]]) for group in plan.cuts]
    if plan.keep_in == "disk":
        store = FileStore(layouts[0], plan.needs.dtype, plan.needs.place)
        stack.callback(store.close)
        return [store]
    elements = max(each.elements for each in layouts)
    try:
        flat = torch.empty(elements, dtype=plan.needs.dtype, device=plan.device)
    except RuntimeError as error:
        amount = text_of(elements * plan.needs.dtype.itemsize)
        raise UnsupportedError(
            f"the system does not give {amount} of memory on {plan.device} for gradient rows; give "
            "a smaller memory_budget"
        ) from error
    return [MemoryStore(layout, flat) for layout in layouts]
