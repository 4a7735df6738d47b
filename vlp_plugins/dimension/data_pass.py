"""One pass over the batches: the points of as many layers as fit into the memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch

from vlp_plugins.calibration.batches import (
    batch_size,
    batches_again,
    chain_hash,
    number_of_batches,
    to_device,
    warn_if_fewer,
)
from vlp_plugins.calibration.moments import Site
from vlp_plugins.calibration.outputs import Output, OutputProbe
from vlp_plugins.dimension.points import LayerUse, Need, Points, Room, Sites, expected, fits, pack
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.distributed import all_gather, broadcast, failing_together
from vlp_plugins.runtime.errors import DataError, NonFiniteError
from vlp_plugins.runtime.memory import text_of
from vlp_plugins.runtime.offload import device_of

_DIGITS = 16


class Reader:
    """Reads the batches once per pass.

    Attributes:
        hashes: the chained hash after every batch, once they were all read.
        sizes: of the batches, in samples, once they were all read; those of a list at once.
        once: whether they can be read a single time.
        total: how many a pass reads at most; None if that is unknown.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        limit: int | None,
        hashes: Sequence[str] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Reads nothing yet; `hashes` and `sizes` are those of an interrupted run.

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
        """Starts a pass; `DataError` if it has no batches, or not those of an earlier pass."""
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
        warn_if_fewer(len(hashes), self._limit)
        self.hashes, self.sizes, self._read = tuple(hashes), tuple(sizes), True


_STEP = 1.5


class Gatherer:
    """Takes the outputs of one pass.

    The length of the longest text, and sometimes the number of samples, is known only at the end
    of the pass. Where the points outgrow the budget, the last layers are left to a later pass.
    """

    def __init__(self, sites: Sites, room: Room) -> None:
        """Starts open: every layer is gathered as long as it fits, until `settle`."""
        self.sites = sites
        self.room = room
        self._open = True
        self._held: dict[Site, Need] = {}
        self._points: dict[Site, Points] = {}
        self._sums: list[tuple[Site, int, torch.Tensor]] = []
        self._last = -1

    @property
    def kept(self) -> set[Site]:
        """The layers that are gathered and were not given up."""
        return set(self._held)

    def settle(self, group: Sequence[Site]) -> None:
        """Gathers these layers, which fit, and no others; in the order of execution."""
        self._open = False
        self._points = {site: self._points[site] for site in group if site in self._points}
        self._held = {site: self.room.need(self.sites[site]) for site in group}
        order = self.sites.streams()
        self._last = max((order.index(site.stream) for site in group), default=-1)

    def wanted(self, stream: str) -> bool:
        """Whether a stream runs: those up to that of the last layer, and unknown ones."""
        order = self.sites.streams()
        return self._open or stream not in order or order.index(stream) <= self._last

    def take(self, output: Output) -> None:
        """Notes an output, and keeps it if its layer is gathered."""
        dtype = self.room.dtype or output.tokens.dtype
        use = self.sites.see(output, dtype.itemsize)
        points = self._place(output, use, dtype)
        if points is not None:
            block = points.write(output.call, output.tokens, output.padding)
            self._sums.append((use.site, len(block), block.sum(dtype=torch.float32)))

    def finish(self, batch: int) -> None:
        """Ends a batch; `NonFiniteError` if what was kept of it holds NaN or infinity."""
        for points in self._points.values():
            points.finish(batch)
        if self._sums:
            self._check_finite(batch)
        self._sums.clear()

    def release(self, group: Sequence[Site]) -> dict[Site, Points]:
        """Returns the points of these layers and forgets the others."""
        found, self._points, self._held = self._points, {}, {}
        return {site: found[site] for site in group if site in found}

    def _place(self, output: Output, use: LayerUse, dtype: torch.dtype) -> Points | None:
        """The points of a layer with room for an output; None if they are not gathered."""
        site, size = use.site, len(output.tokens)
        if site not in self._held and not self._open:
            return None
        points = self._points.get(site)
        if points is not None and points.fits(output.call, size, output.width):
            return points
        count = 0 if points is None else points.count
        rows = self.room.rows if points is None else points.rows
        if count + size > rows:
            rows = max(count + size, int(_STEP * rows))
        need = self.room.need(use, rows)
        if not self._has_room(site, need, 0 if points is None else points.nbytes):
            return None
        self._held[site] = need
        if points is None:
            points = Points(use.widths, rows, dtype, output.tokens.device)
            self._points[site] = points
        else:
            points.grow(use.widths, rows)
        return points

    def _has_room(self, site: Site, need: Need, old: int) -> bool:
        """Whether a layer may grow from `old` bytes, held until the rows have moved, to `need`.

        Gives up the last layers for it.
        """
        while True:
            others = [held for other, held in self._held.items() if other != site]
            moving = sum(other.held for other in others) + old + need.held
            if moving <= self.room.budget and fits([*others, need], self.room.budget):
                return True
            if self._open:
                self._open = False
                if site not in self._held:
                    return False
            last = next(reversed(self._held), site)
            self._points.pop(last, None)
            self._held.pop(last, None)
            if last == site:
                return False

    def _check_finite(self, batch: int) -> None:
        fine = torch.isfinite(torch.stack([value for _, _, value in self._sums])).tolist()
        for (site, size, _), is_fine in zip(self._sums, fine, strict=True):
            if is_fine or site not in self._points:
                continue
            # The sum of large numbers may overflow, hence the second look.
            if not bool(torch.isfinite(self._points[site].values[-size:]).all()):
                raise NonFiniteError(
                    f"the output of {self.sites[site]} holds NaN or infinity in batch {batch}; "
                    "look at that batch, at the checkpoint (weights after a diverged training), or "
                    "run the model in float32"
                )


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
        left: Sequence[LayerUse],
        budget: int,
        dtype: torch.dtype | None,
        turn: tuple[int, int],
    ) -> None:
        """Prepares a pass.

        Args:
            probe: runs batches.
            sites: the layers so far; is added to.
            left: what has no dimension yet; empty in the first pass, which finds out.
            budget: bytes of this process.
            dtype: of the points; None: that of the outputs.
            turn: index of this process, and the number of those that share the batches.
        """
        self._probe, self._sites, self._left = probe, sites, left
        self._budget, self._dtype = budget, dtype
        self._rank, self._processes = turn
        self._device = device_of(probe.model)
        self.group: list[Site] = []
        self.later = 0

    def run(self, reader: Reader, report: Callable[[int], None]) -> dict[Site, Points]:
        """Reads all batches and runs those of this process; reports `later` after each of all.

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
                report(self.later)
        self._agree(gatherer)
        return gatherer.release(self.group)

    def _choose(self, room: Room, once: bool) -> None:
        """Decides which layers this pass gathers, in all processes the same."""
        if not self._left:
            self._sites.merge(broadcast(list(self._sites.values())))
        left = self._left or list(self._sites.values())
        needs = [room.need(use) for use in left]
        plan = pack(needs, self._budget)
        if once and len(plan) > 1:
            everything = sum(need.held for need in needs) + max(need.work for need in needs)
            raise DataError(
                f"the batches are an iterator (a generator?), which can be read once, but the "
                f"points of all layers take {text_of(everything)}, more than the memory budget of "
                f"{text_of(self._budget)}: give a list of batches or a loader, which is read "
                f"{len(plan)} times, or more memory"
            )
        self.group = [use.site for use in left[: plan[0][1] if plan else 0]]
        self.later = max(0, len(plan) - 1)

    def _run(self, gatherer: Gatherer, batch: Batch, index: int) -> None:
        self._probe.run(to_device(batch, self._device), gatherer.take, gatherer.wanted)
        gatherer.finish(index)

    def _agree(self, gatherer: Gatherer) -> None:
        """Keeps the layers that no process has given up, and merges what all know of them."""
        kept = all_gather(gatherer.kept)
        self.group = [site for site in self.group if all(site in theirs for theirs in kept)]
        everywhere = all_gather(list(self._sites.values()))
        self._sites.clear()  # or the order would be another in every process
        for use in everywhere:
            self._sites.merge(use)


class PassProgress:
    """Counts the batches of all passes and reports them; `passes` are done."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self.passes = 0

    def __call__(self, later: int) -> None:
        self._done += 1
        if self._progress is not None:
            passes = self.passes + 1 + later
            self._progress(self._done, None if self._total is None else passes * self._total)
