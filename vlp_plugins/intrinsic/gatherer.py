"""Keeps the points of some layers while batches run, and never more than the budget allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlp_plugins.calibration.statistic import Site
from vlp_plugins.intrinsic.outputs import Output
from vlp_plugins.intrinsic.packing import Need, fits
from vlp_plugins.intrinsic.points import Points
from vlp_plugins.intrinsic.room import Room
from vlp_plugins.intrinsic.sites import Met, Sites
from vlp_plugins.runtime.errors import NonFiniteError

_STEP = 1.5


class Gatherer:
    """Takes the outputs of one pass.

    How long the longest text is, and sometimes how many samples there are, shows only as the pass
    goes on. Where the points outgrow the budget, the last layers are given up; a later pass takes
    them, which knows.
    """

    def __init__(self, sites: Sites, room: Room) -> None:
        """Starts open: what is met is gathered as long as it fits, until `settle`.

        Args:
            sites: what was met so far; is added to.
            room: of this process.
        """
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
        """Gathers these layers, which fit, and no others.

        Args:
            group: in the order of execution.
        """
        self._open = False
        self._points = {site: self._points[site] for site in group if site in self._points}
        self._held = {site: self.room.need(self.sites[site]) for site in group}
        order = self.sites.streams()
        self._last = max((order.index(site.stream) for site in group), default=-1)

    def wanted(self, stream: str) -> bool:
        """Whether a stream runs: up to that of the last layer, and any that nobody has met."""
        order = self.sites.streams()
        return self._open or stream not in order or order.index(stream) <= self._last

    def take(self, output: Output) -> None:
        """Notes an output, and keeps it if its layer is gathered."""
        dtype = self.room.dtype or output.tokens.dtype
        met = self.sites.see(output, dtype.itemsize)
        points = self._place(output, met, dtype)
        if points is not None:
            block = points.write(output.call, output.tokens, output.padding)
            self._sums.append((met.site, len(block), block.sum(dtype=torch.float32)))

    def finish(self, batch: int) -> None:
        """Ends a batch.

        Raises:
            NonFiniteError: if what was kept of it holds NaN or infinity.
        """
        for points in self._points.values():
            points.finish(batch)
        if self._sums:
            self._check_finite(batch)
        self._sums.clear()

    def release(self, group: Sequence[Site]) -> dict[Site, Points]:
        """Hands the points of these layers over and forgets the others."""
        found, self._points, self._held = self._points, {}, {}
        return {site: found[site] for site in group if site in found}

    def _place(self, output: Output, met: Met, dtype: torch.dtype) -> Points | None:
        """The points of a layer with room for an output; None if they are not gathered."""
        site, size = met.site, len(output.tokens)
        if site not in self._held and not self._open:
            return None
        points = self._points.get(site)
        if points is not None and points.fits(output.call, size, output.width):
            return points
        count = 0 if points is None else points.count
        rows = self.room.rows if points is None else points.rows
        if count + size > rows:
            rows = max(count + size, int(_STEP * rows))
        need = self.room.need(met, rows)
        if not self._has_room(site, need, 0 if points is None else points.nbytes):
            return None
        self._held[site] = need
        if points is None:
            points = Points(met.widths, rows, dtype, output.tokens.device)
            self._points[site] = points
        else:
            points.grow(met.widths, rows)
        return points

    def _has_room(self, site: Site, need: Need, old: int) -> bool:
        """Whether a layer may take what it needs; gives up the last ones for it.

        Args:
            site: the layer.
            need: with its new size.
            old: bytes of its smaller tensor, which is there until the rows have moved.
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
            self._drop(last)
            if last == site:
                return False

    def _drop(self, site: Site) -> None:
        self._points.pop(site, None)
        self._held.pop(site, None)

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
