"""TwoNN: the intrinsic dimension of points from the distances to their two nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from vlp_plugins.dimension.neighbours import (
    Neighbours,
    merge_duplicates,
    nearest_in_blocks,
    norms,
    rounding_of,
)
from vlp_plugins.models.request import whole_number
from vlp_plugins.runtime.errors import StatisticsError, UnsupportedError, check_known

Fit = Literal["slope", "likelihood"]
Duplicates = Literal["rounding", "exact"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """How TwoNN (Facco et al. 2017) turns distances into a dimension.

    Attributes:
        fit: `slope` of the line through the origin, as published, or the maximum `likelihood`.
        drop: fraction of the largest ratios left out of the fit, up to 0.9 (Facco et al.: 0.1).
            None leaves exactly two out of a slope, as the published code of the ICML 2024 paper
            does, and none out of a likelihood.
        blocks: 1 takes all points; B > 1 is the mean over b = 1..B of the mean over b disjoint
            random blocks (published: 20).
        seed: of NumPy's legacy generator, which permutes the points before they are cut.
        duplicates: `rounding` takes points for equal that are no further apart than the rounding
            of a forward pass, so that a sample and its copy in a batch of another size are;
            `exact` only those whose bits are, as the published code does.
    """

    fit: Fit = "slope"
    drop: float | None = None
    blocks: int = 1
    seed: int = 123
    duplicates: Duplicates = "rounding"

    def __post_init__(self) -> None:
        check_known("fit", self.fit, get_args(Fit))
        check_known("duplicates", self.duplicates, get_args(Duplicates))
        if self.drop is not None and not 0 <= self.drop <= 0.9:
            raise UnsupportedError(f"drop is a fraction from 0 to 0.9, not {self.drop}")
        for name in ("blocks", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.blocks < 1:
            raise UnsupportedError(f"blocks is 1 (all points) or more, not {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise UnsupportedError(f"seed is a number from 0 to 2**32 - 1, not {self.seed}")


class ConstantError(StatisticsError):
    """Points that do not vary from sample to sample, and have no dimension."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator found.

    Attributes:
        dimension: intrinsic dimension.
        error: its standard error.
        used: points whose ratio entered the fit on all points.
        block_dimensions: for b = 1..B the mean over b blocks; a single one on all points.
        block_deviations: the population standard deviation over those blocks.
        duplicates: points that equal another one, and have no ratio.
    """

    dimension: float
    error: float
    used: int
    block_dimensions: tuple[float, ...]
    block_deviations: tuple[float, ...]
    duplicates: int = 0


_ROWS = 512


def inflation(influence: torch.Tensor, neighbours: Neighbours) -> float:
    """By what factor shared points raise the variance of a mean over all points.

    The ratio of a point is made of itself and its two nearest neighbours; ratios that have one of
    these points in common are not independent. The variance counts the products of their
    influences too, as the standard errors of regressions on networks do; it is never taken to be
    below that of independent ratios.

    Args:
        influence: float64 `[n]`, sum 0; 0 for a point without a ratio.
        neighbours: of all points, as one block.

    Returns:
        At least 1.
    """
    alone = float(influence.square().sum())
    if alone == 0:
        return 1.0
    n = len(influence)
    itself = torch.arange(n, device=influence.device)
    made_of = torch.stack([itself, neighbours.first[0], neighbours.second[0]])
    member = torch.zeros((n, n), dtype=torch.bool, device=influence.device)
    member[itself, made_of] = True
    together = 0.0
    for rows in itself.split(_ROWS):
        shared = member[rows][:, made_of[0]]
        for column in made_of[1:]:
            shared |= member[rows][:, column]
        together += float(influence[rows] @ (shared.to(influence.dtype) @ influence))
    return max(1.0, together / alone)


@dataclass(frozen=True, slots=True)
class DimensionFit:
    """A dimension fitted to ratios.

    Attributes:
        kept: ratios that entered the fit.
        influence: float64 `[N]`, in the order of the ratios: a change of the share of ratio i in
            the sample by s changes the dimension by s times its influence, to first order
            (Hampel's influence function at the sample).
    """

    dimension: float
    kept: int
    influence: torch.Tensor


def slope(logs: torch.Tensor, drop: float | None = None) -> DimensionFit:
    """The slope of -log(1 - F) on the sorted log ratios, through the origin (Facco et al. 2017).

    The i-th of N sorted ratios has F = i / N. The last has no finite -log(1 - F) and is never part
    of the fit.

    Args:
        logs: float64 `[N]`, the logarithms of r2 / r1, all above 0; at least 4.
        drop: fraction of the largest ratios left out; None leaves out the last two.
    """
    n = len(logs)
    kept = n - 2 if drop is None else min(_kept(n, drop), n - 1)
    x, order = logs.sort()
    heights = -torch.log1p(-torch.arange(1, n, dtype=x.dtype, device=x.device) / n)
    x_kept, y_kept = x[:kept], heights[:kept]
    products, squares = x_kept @ y_kept, x_kept @ x_kept
    dimension = products / squares
    # Products and squares are L-statistics: their influences rise with x by -log(1 - F) and 2x,
    # and no more beyond the last that is kept. F is taken in the middle of each step.
    middle = -torch.log1p(-(torch.arange(kept, dtype=x.dtype, device=x.device) + 0.5) / n)
    rises = torch.zeros_like(x)
    rises[:kept] = torch.diff(x_kept, prepend=x.new_zeros(1)) * middle
    of_products, of_squares = rises.cumsum(0), x.clamp_max(x[kept - 1]).square()
    influence = of_products - of_products.mean() - dimension * (of_squares - of_squares.mean())
    influence *= n / squares
    return DimensionFit(float(dimension), kept, torch.empty_like(x).scatter_(0, order, influence))


def likelihood(logs: torch.Tensor, drop: float | None = None) -> DimensionFit:
    """Maximum likelihood for exponentially distributed log ratios, made unbiased.

    (N - 1) / sum(log ratios) (Denti et al. 2022). Where the largest are left out, each is known to
    be at least as large as the largest that is kept: the likelihood of a censored sample.

    Args:
        logs: float64 `[N]`, the logarithms of r2 / r1, all above 0; at least 4.
        drop: fraction of the largest ratios left out; None for none.
    """
    n = len(logs)
    kept = _kept(n, drop or 0.0)
    limit = logs.kthvalue(kept).values
    times = logs.clamp_max(limit)
    dimension = (kept - 1) / times.sum()
    # Of the censored sample by the hazard of the exponential distribution, which is its dimension.
    rate = kept / times.sum()
    counted = (logs <= limit).double()
    influence = dimension * (n / kept) * (counted - rate * times)
    return DimensionFit(float(dimension), kept, influence)


def _kept(n: int, drop: float) -> int:
    return n - round(drop * n)


MINIMUM = 20
"""Usable points below which there is no estimate."""
ALL_POINTS = Estimator()


def estimate(
    points: torch.Tensor, estimator: Estimator = ALL_POINTS, *, what: str = "points"
) -> Estimate:
    """The intrinsic dimension of points (Facco et al. 2017).

    With the distances r1 < r2 of a point to its two nearest neighbours, log(r2 / r1) is
    exponentially distributed with the dimension as its rate, wherever the density hardly changes
    within r2. Points with r1 = 0 or r1 = r2 have no usable ratio and are left out. Both hold up to
    the rounding of the points (`neighbours.rounding_of`), unless the estimator says `exact`.

    The standard error says how much the estimate varies from one sample of as many points to
    another: the squared influences of all points on it, summed, times what neighbours have in
    common (`inflation`). On tori of 1 to 10 dimensions and 50 to 400 points it was within
    an eighth of the spread of many estimates. It does not say how far the estimate is from the
    truth: TwoNN falls short of high dimensions (a cube of dimension 30 gives 20 with 1,000 points)
    and sees the scale of the nearest neighbours only.

    Args:
        points: `[n, D]`, floating, on any device.
        estimator: fit, fraction left out, blocks.
        what: names the points in errors.

    Raises:
        ConstantError: if all points are equal, up to the zeros that shorter ones end in.
        StatisticsError: if fewer than 20 are usable, in a block too.
        NonFiniteError: if a coordinate is NaN or infinite.
    """
    check_number(len(points), estimator, what=what)
    blocks = disjoint_blocks(len(points), estimator)
    positions = [block.to(points.device) for block in blocks]
    nearest = nearest_in_blocks(points, positions, what=what)
    if estimator.duplicates == "rounding":
        nearest = merge_duplicates(points, positions, nearest)
    found = [near.cpu() for near in nearest]
    if _constant(points, estimator):
        raise ConstantError(
            f"{what}: all {len(points)} are equal and have no dimension; are the samples "
            "different, and do they reach the layer?"
        )
    parts = [
        _within(block, near, len(points), estimator, what)
        for block, near in zip(blocks, found, strict=True)
    ]
    influence = torch.stack([part.influence for part in parts]).mean(0)
    # A point's ratios in different blocks are taken together; what neighbours share is seen best
    # among all points.
    shared = inflation(parts[0].influence[blocks[0][0]], found[0])
    return Estimate(
        dimension=float(np.mean([part.dimension for part in parts])),
        error=float((influence.square().sum() * shared).sqrt()),
        used=parts[0].kept,
        block_dimensions=tuple(part.dimension for part in parts),
        block_deviations=tuple(part.deviation for part in parts),
        duplicates=int((found[0].r1 == 0).sum()),
    )


def check_number(n: int, estimator: Estimator, *, what: str = "points") -> None:
    """Raises `StatisticsError` if so many points are too few, in blocks or at all."""
    if n < MINIMUM:
        raise StatisticsError(
            f"{what}: {n} are too few, an intrinsic dimension needs {MINIMUM}; take more samples"
        )
    blocks = estimator.blocks
    if (size := n // blocks) < MINIMUM:
        raise StatisticsError(
            f"{what}: {n} in {blocks} blocks leave {size} in each, and an intrinsic dimension "
            f"needs {MINIMUM}; take {MINIMUM * blocks} samples or more, or at most "
            f"{n // MINIMUM} blocks"
        )


def disjoint_blocks(n: int, estimator: Estimator) -> list[torch.Tensor]:
    """Which points each estimate is made of.

    For every b = 1..B one permutation of the points, from NumPy's legacy generator seeded once, is
    cut into b blocks of floor(n / b) points; the rest is dropped.

    Returns:
        int64 `[b, n // b]` for b = 1..B.
    """
    generator = np.random.RandomState(estimator.seed)
    permutations = [generator.permutation(n) for _ in range(estimator.blocks)]
    return [
        torch.from_numpy(permutation[: n // b * b]).long().view(b, n // b)
        for b, permutation in enumerate(permutations, start=1)
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """The estimate from b blocks, with the population standard deviation over them."""

    dimension: float
    deviation: float
    kept: int  # ratios that entered the fits
    influence: torch.Tensor
    """float64 `[n]`, how far each point moved the mean; their squares add up to its variance, if
    ratios are independent."""


def _within(
    block: torch.Tensor, near: Neighbours, n: int, estimator: Estimator, what: str
) -> _Part:
    influence = torch.zeros(n, dtype=torch.float64)
    fit_logs = slope if estimator.fit == "slope" else likelihood
    fits = []
    for number, positions in enumerate(block):
        r1, r2 = near.r1[number], near.r2[number]
        usable = (r1 > 0) & (r1 < r2)
        if (count := int(usable.sum())) < MINIMUM:
            where = f"block {number + 1} of {len(block)} of the {what}" if len(block) > 1 else what
            raise StatisticsError(
                f"{where}: {count} of {len(usable)} are usable and {MINIMUM} are needed; "
                f"{int((r1 == 0).sum())} equal another one, {int((~usable & (r1 > 0)).sum())} have "
                "two neighbours equally near; take more samples, without duplicates"
            )
        fits.append(fit := fit_logs((r2[usable] / r1[usable]).log(), estimator.drop))
        influence[positions[usable]] = fit.influence / (len(fit.influence) * len(block))
    dimensions = [fit.dimension for fit in fits]
    return _Part(
        dimension=float(np.mean(dimensions)),
        deviation=float(np.std(dimensions)),
        kept=sum(fit.kept for fit in fits),
        influence=influence,
    )


def _constant(points: torch.Tensor, estimator: Estimator) -> bool:
    """Whether each point is the beginning of the longest, with zeros behind it."""
    exact = estimator.duplicates == "exact"
    rounding = 0.0 if exact else rounding_of(points.dtype, points.device)
    longest = points[0, :0]
    for point in points:
        reached = point.nonzero()
        point = point[: int(reached[-1]) + 1 if len(reached) else 0]
        short, longest = sorted((point, longest), key=len)
        apart, size = norms(torch.stack([longest[: len(short)] - short, short])).tolist()
        if not apart <= rounding * size:
            return False
    return True
