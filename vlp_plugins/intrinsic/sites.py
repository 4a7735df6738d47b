"""The uses of weights that were met, and what their points will take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vlp_plugins.calibration.statistic import Site
from vlp_plugins.intrinsic.outputs import Output


@dataclass(frozen=True, slots=True)
class Met:
    """One use of a weight, as far as it is known.

    Attributes:
        site: weight, stream and owner.
        module: dotted path.
        widths: numbers per sample of every call of the module, for the longest sample so far.
        itemsize: bytes of a number.
    """

    site: Site
    module: str
    widths: tuple[int, ...]
    itemsize: int

    def __str__(self) -> str:
        site = self.site
        return f"{self.module} (weight {site.weight!r}, stream {site.stream!r})"

    @property
    def ambient(self) -> int:
        """Numbers in a point."""
        return sum(self.widths)

    def wider(self, widths: tuple[int, ...]) -> Met:
        """With blocks at least that wide."""
        if len(widths) < len(self.widths):
            widths += (0,) * (len(self.widths) - len(widths))
        own = self.widths + (0,) * (len(widths) - len(self.widths))
        return replace(self, widths=tuple(map(max, own, widths)))


class Sites(dict[Site, Met]):
    """What was met, in the order of execution."""

    def see(self, output: Output, itemsize: int) -> Met:
        """Notes an output; what is known of its site then."""
        widths = (0,) * output.call + (output.width,)
        met = self.get(output.site) or Met(output.site, output.module, (), itemsize)
        if len(met.widths) <= output.call or met.widths[output.call] < output.width:
            met = self[output.site] = met.wider(widths)
        return met

    def merge(self, others: Iterable[Met]) -> None:
        """Adds what another process has met."""
        for met in others:
            self[met.site] = self[met.site].wider(met.widths) if met.site in self else met

    def streams(self) -> list[str]:
        """Names of the streams, in their order."""
        return list(dict.fromkeys(site.stream for site in self))
