"""One pass over the batches: the points of as many layers as fit into the memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch

from vlp_plugins.calibration.batches import batch_size, to_device
from vlp_plugins.calibration.statistic import Site
from vlp_plugins.intrinsic.gatherer import Gatherer
from vlp_plugins.intrinsic.outputs import OutputProbe
from vlp_plugins.intrinsic.packing import pack
from vlp_plugins.intrinsic.points import Points
from vlp_plugins.intrinsic.reading import Reader
from vlp_plugins.intrinsic.room import Room, expected
from vlp_plugins.intrinsic.sites import Met, Sites
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import all_gather, broadcast, failing_together
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.memory import text_of

Progress = Callable[[int, int | None], None]


class Pass:
    """One pass, under a probe that is attached.

    Attributes:
        group: the layers that are gathered; some may be given up on the way.
        later: number of passes that the other layers need, as far as is known.
    """

    def __init__(
        self,
        probe: OutputProbe,
        sites: Sites,
        left: Sequence[Met],
        budget: int,
        dtype: torch.dtype | None,
        turn: tuple[int, int],
    ) -> None:
        """Prepares a pass.

        Args:
            probe: runs batches.
            sites: what was met so far; is added to.
            left: what has no dimension yet; empty in the first pass, which finds out.
            budget: bytes of this process.
            dtype: of the points; None: that of the outputs.
            turn: index of this process, and the number of those that share the batches.
        """
        self._probe, self._sites, self._left = probe, sites, left
        self._budget, self._dtype = budget, dtype
        self._rank, self._processes = turn
        self._device = next(probe.model.parameters()).device
        self.group: list[Site] = []
        self.later = 0

    def run(self, reader: Reader, tell: Callable[[int], None]) -> dict[Site, Points]:
        """Reads all batches and runs those of this process.

        Args:
            reader: of the batches.
            tell: called after every batch with `later`.

        Returns:
            The points of `group` that this process's batches gave.

        Raises:
            DataError: if the batches are not those of an earlier pass, or can be read a single
                time and that is not enough.
            UnsupportedError: if a single layer does not fit into the budget.
            NonFiniteError: if an output holds NaN or infinity.
        """
        batches = iter(reader)
        with failing_together():
            first = next(batches)
            rows, samples = expected(reader.sizes, reader.total, batch_size(first), self._processes)
            room = Room(self._budget, rows, samples, self._processes > 1, self._dtype)
            gatherer = Gatherer(self._sites, room)
            if not self._left and self._rank == 0:
                self._run(gatherer, first, 0)
        self._choose(room, reader.once)
        gatherer.settle(self.group)
        with failing_together():
            for index, batch in enumerate(chain((first,), batches)):
                is_done = index == 0 and not self._left
                if index % self._processes == self._rank and not is_done:
                    self._run(gatherer, batch, index)
                tell(self.later)
        self._agree(gatherer)
        return gatherer.release(self.group)

    def _choose(self, room: Room, once: bool) -> None:
        """Decides which layers this pass gathers, in all processes the same."""
        if not self._left:
            self._sites.merge(broadcast(list(self._sites.values())))
        left = self._left or list(self._sites.values())
        needs = [room.need(met) for met in left]
        plan = pack(needs, self._budget)
        if once and len(plan) > 1:
            everything = sum(need.held for need in needs) + max(need.work for need in needs)
            raise DataError(
                f"the batches are an iterator (a generator?), which can be read once, but the "
                f"points of all layers take {text_of(everything)}, more than the memory budget of "
                f"{text_of(self._budget)}: give a list of batches or a loader, which is read "
                f"{len(plan)} times, or more memory"
            )
        self.group = [met.site for met in left[: plan[0][1] if plan else 0]]
        self.later = max(0, len(plan) - 1)

    def _run(self, gatherer: Gatherer, batch: Batch, index: int) -> None:
        self._probe.run(to_device(batch, self._device), gatherer.take, gatherer.wanted)
        gatherer.finish(index)

    def _agree(self, gatherer: Gatherer) -> None:
        """Keeps what no process has given up, and lets all know what each has met."""
        kept = all_gather(gatherer.kept)
        self.group = [site for site in self.group if all(site in theirs for theirs in kept)]
        everywhere = all_gather(list(self._sites.values()))
        self._sites.clear()  # or the order would be another in every process
        for met in everywhere:
            self._sites.merge(met)


class Telling:
    """Counts the batches of all passes for whoever wants to know.

    Attributes:
        passes: that are done.
    """

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self.passes = 0

    def __call__(self, later: int) -> None:
        self._done += 1
        if self._progress is not None:
            passes = self.passes + 1 + later
            self._progress(self._done, None if self._total is None else passes * self._total)
