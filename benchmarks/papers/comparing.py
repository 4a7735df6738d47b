"""Whether one figure is above another, beyond what queries and seeds do by chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean

from benchmarks.papers.findings import Entry

SEED_SPREAD = 2.0
"""Standard deviation of an average R@1 from seed to seed, in points, rounded;
`benchmarks.papers.levels` measures it."""


@dataclass(frozen=True)
class Margin:
    """A difference of two figures.

    Attributes:
        points: other minus plain, over the seeds that both have.
        error: its standard error: of independent queries, and of the seeds.
    """

    points: float
    error: float

    @property
    def beyond(self) -> bool:
        """Whether it is more than two standard errors away from nothing."""
        return abs(self.points) > 2 * self.error

    @property
    def text(self) -> str:
        """With its error."""
        return f"{self.points:+.1f}±{self.error:.1f}"


def margin(plain: Entry, other: Entry, queries: int) -> Margin | None:
    """Of two ways with the same seeds; None if they have no figures or no seed in common.

    Args:
        plain: an average R@1, in percent.
        other: another.
        queries: that each is measured on.
    """
    both = plain.by_seed.keys() & other.by_seed.keys()
    if plain.mean is None or other.mean is None or not both:
        return None
    points = fmean(other.by_seed[seed] - plain.by_seed[seed] for seed in both)
    of_queries = [standard_error(each.mean or 0.0, queries) for each in (plain, other)]
    return Margin(points, hypot(*of_queries, SEED_SPREAD * sqrt(2 / len(both))))


def standard_error(percent: float, queries: int) -> float:
    """Of a fraction of right answers, binomial, in points."""
    return sqrt(percent * (100 - percent) / queries)


def pooled_spread(entries: list[Entry]) -> float:
    """The standard deviation over seeds that figures have in common."""
    spreads = [(entry.spread, len(entry.by_seed) - 1) for entry in entries]
    known = [(spread, free) for spread, free in spreads if spread is not None]
    return sqrt(sum(s * s * free for s, free in known) / sum(free for _, free in known))
