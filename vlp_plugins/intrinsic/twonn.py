"""TwoNN: the intrinsic dimension of points from the distances to their two nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vlp_plugins.intrinsic.bounds import Neighbours
from vlp_plugins.intrinsic.estimate import Estimate, Estimator
from vlp_plugins.intrinsic.fits import fit_dimension
from vlp_plugins.intrinsic.neighbours import merge_duplicates, nearest_in_blocks, rounding_of
from vlp_plugins.intrinsic.products import norms, squared_distances
from vlp_plugins.intrinsic.sharing import inflation
from vlp_plugins.runtime.errors import StatisticsError

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
    common (`sharing.inflation`). On tori of 1 to 10 dimensions and 50 to 400 points it was within
    an eighth of the spread of many estimates. It does not say how far the estimate is from the
    truth: TwoNN falls short of high dimensions (a cube of dimension 30 gives 20 with 1,000 points)
    and sees the scale of the nearest neighbours only.

    Args:
        points: `[n, D]`, floating, on any device.
        estimator: fit, fraction left out, blocks.
        what: names the points in errors.

    Raises:
        StatisticsError: if all points are equal, or fewer than 20 are usable, in a block too.
        NonFiniteError: if a coordinate is NaN or infinite.
    """
    check_number(len(points), estimator, what=what)
    blocks = disjoint_blocks(len(points), estimator)
    positions = [block.to(points.device) for block in blocks]
    nearest = nearest_in_blocks(points, positions, what=what)
    if estimator.duplicates == "rounding":
        nearest = merge_duplicates(points, positions, nearest)
    found = [near.cpu() for near in nearest]
    if not found[0].r2.any() and _all_equal(points, estimator):
        raise StatisticsError(
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
    if (size := n // estimator.blocks) < MINIMUM:
        raise StatisticsError(_too_few(n, size, estimator.blocks, what))


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
    """The estimate from b blocks.

    Attributes:
        dimension: mean over the blocks.
        deviation: population standard deviation over them.
        kept: ratios that entered the fits.
        influence: float64 `[n]`, how far each point moved the mean; their squares add up to its
            variance, if ratios are independent.
    """

    dimension: float
    deviation: float
    kept: int
    influence: torch.Tensor


def _within(
    block: torch.Tensor, near: Neighbours, n: int, estimator: Estimator, what: str
) -> _Part:
    influence = torch.zeros(n, dtype=torch.float64)
    fits = []
    for number, positions in enumerate(block):
        r1, r2 = near.r1[number], near.r2[number]
        usable = (r1 > 0) & (r1 < r2)
        if int(usable.sum()) < MINIMUM:
            where = f"block {number + 1} of {len(block)} of the {what}" if len(block) > 1 else what
            raise StatisticsError(_unusable(r1, usable, where))
        fits.append(fit := fit_dimension((r2[usable] / r1[usable]).log(), estimator))
        influence[positions[usable]] = fit.influence / (len(fit.influence) * len(block))
    dimensions = [fit.dimension for fit in fits]
    return _Part(
        dimension=float(np.mean(dimensions)),
        deviation=float(np.std(dimensions)),
        kept=sum(fit.kept for fit in fits),
        influence=influence,
    )


def _all_equal(points: torch.Tensor, estimator: Estimator) -> bool:
    others = torch.arange(1, len(points), device=points.device)
    pairs = torch.stack([torch.zeros_like(others), others], 1)
    farthest = float(squared_distances(points, pairs, torch.float64).max().sqrt())
    if estimator.duplicates == "exact":
        return farthest == 0
    return farthest <= rounding_of(points.dtype, points.device) * float(norms(points).max())


def _too_few(n: int, size: int, blocks: int, what: str) -> str:
    if n < MINIMUM:
        return f"{what}: {n} are too few, an intrinsic dimension needs {MINIMUM}; take more samples"
    return (
        f"{what}: {n} in {blocks} blocks leave {size} in each, and an intrinsic dimension needs "
        f"{MINIMUM}; take {MINIMUM * blocks} samples or more, or at most {n // MINIMUM} blocks"
    )


def _unusable(r1: torch.Tensor, usable: torch.Tensor, where: str) -> str:
    return (
        f"{where}: {int(usable.sum())} of {len(usable)} are usable and {MINIMUM} are needed; "
        f"{int((r1 == 0).sum())} equal another one, {int((~usable & (r1 > 0)).sum())} have two "
        "neighbours equally near; take more samples, without duplicates"
    )
