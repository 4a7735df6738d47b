"""The distances of points to their two nearest neighbours: products first, then the differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlp_plugins.intrinsic.bounds import DistanceBounds, Neighbours, bounds_bytes
from vlp_plugins.intrinsic.products import (
    centred_gram,
    norms,
    product_error,
    products_bytes,
    squared_distances,
)
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError
from vlp_plugins.runtime.model_state import float32_product_error

_CANDIDATES = 16
_MORE = 4
# More pairs per point and block than these cost more to measure than products in float64.
_WORTH_MEASURING = 4
# Of squared norms: outside, squares lose accuracy in float32, or their sums overflow.
_RANGE = (1e-30, 1e36)


def nearest_two(points: torch.Tensor, *, what: str = "points") -> tuple[torch.Tensor, torch.Tensor]:
    """Distances to the two nearest other points.

    Gram distances of centred float32 points cancel: their error is a share of the norms, not of
    the distance. They only choose the candidates, with a bound of that error; the distances
    themselves are measured from the differences of the coordinates.

    Args:
        points: `[n, D]`, floating; n at least 3.
        what: names the points in errors.

    Returns:
        `r1 <= r2`, float64 `[n]`, on the device of the points; 0 exactly for equal points.

    Raises:
        StatisticsError: if these are not at least 3 points.
        NonFiniteError: if a coordinate is NaN or infinite.
    """
    everything = torch.arange(len(points), device=points.device).unsqueeze(0)
    (found,) = nearest_in_blocks(points, [everything], what=what)
    return found.r1[0], found.r2[0]


def nearest_in_blocks(
    points: torch.Tensor, blocks: Sequence[torch.Tensor], *, what: str = "points"
) -> list[Neighbours]:
    """The two nearest neighbours of every point within each of several blocks of the points.

    All blocks share one Gram matrix, and no pair is measured twice. The points are read twice as a
    rule, and more often where distances are tiny beside the spread of the points.

    Args:
        points: `[n, D]`, floating.
        blocks: each int64 `[b, m]`: positions of the points of b blocks of m points, m at least 3.
        what: names the points in errors.

    Returns:
        For each of `blocks` its neighbours.

    Raises:
        StatisticsError: if these are no points `[n, D]`, or a block has fewer than 3.
        NonFiniteError: if a coordinate is NaN or infinite.
    """
    if points.ndim != 2 or not points.is_floating_point():
        raise StatisticsError(
            f"{what}: floating points [n, D] are needed, not {points.dtype} {list(points.shape)}"
        )
    if (smallest := min(block.shape[1] for block in blocks)) < 3:
        raise StatisticsError(f"{what}: {smallest} have no two nearest neighbours; take 3 or more")
    dtype = torch.float32
    gram = centred_gram(points, dtype)
    if not _RANGE[0] < float(gram.diagonal().max()) < _RANGE[1]:
        _refuse_nonfinite(points, what)
        dtype, gram = torch.float64, centred_gram(points, torch.float64)
    bounds = DistanceBounds(gram, product_error(points, dtype))
    del gram  # it is the bounds now
    most = _CANDIDATES
    pairs = bounds.missing(blocks, most)
    asked = sum(block.numel() for block in blocks)
    if dtype == torch.float32 and len(pairs) > _WORTH_MEASURING * asked:
        dtype = torch.float64
        del bounds  # their memory, before others take as much
        bounds = DistanceBounds(centred_gram(points, dtype), product_error(points, dtype))
        pairs = bounds.missing(blocks, most)
    while len(pairs):
        bounds.record(pairs, squared_distances(points, pairs, dtype))
        most *= _MORE
        pairs = bounds.missing(blocks, most)
    return [bounds.nearest_two(block) for block in blocks]


def merge_duplicates(
    points: torch.Tensor, blocks: Sequence[torch.Tensor], found: Sequence[Neighbours]
) -> list[Neighbours]:
    """Distances as they were if points that differ by rounding alone had equal bits.

    Args:
        points: `[n, D]`, floating.
        blocks: see `nearest_in_blocks`.
        found: what it returned.

    Returns:
        The same with distances of 0 to duplicates, and with `r2 = r1` where the two neighbours are
        duplicates of each other.
    """
    reach = norms(points).mul_(rounding_of(points.dtype, points.device))
    merged = []
    for block, near in zip(blocks, found, strict=True):
        r1, r2 = (r.masked_fill(r <= reach[block], 0) for r in (near.r1, near.r2))
        first, second = block.gather(1, near.first), block.gather(1, near.second)
        # Distances to two duplicates differ by no more than theirs from each other.
        near_tie = (r1 < r2) & (r2 - r1 <= reach[first]) & (r1 > 0)
        pairs = torch.stack([first[near_tie], second[near_tie]], 1)
        if len(pairs):
            apart = squared_distances(points, pairs, torch.float64).sqrt_()
            r2[near_tie] = torch.where(apart <= reach[pairs[:, 0]], r1[near_tie], r2[near_tie])
        merged.append(Neighbours(r1, r2, near.first, near.second))
    return merged


def rounding_of(dtype: torch.dtype, device: torch.device) -> float:
    """How far apart, relative to their norm, rounding may put two copies of one sample.

    Sums are in another order where a batch has another size or length. In float32 that was up to
    50 unit roundoffs through 24 transformer layers and 12 through the 4 of a small BLIP, whose
    nearest samples that differ were 20,000 times as far apart; 64 are allowed. Points of half
    precision that are kept, not computed, in it differ by an epsilon at most; computed in it by a
    deep model they may differ by five, as far as other samples may be, and are told apart: measure
    in float32. float64 is judged as float32, in which most points are computed.

    Args:
        dtype: of the points.
        device: where they were computed; products of reduced precision round like their dtype.
    """
    return max(64 * 2.0**-24, torch.finfo(dtype).eps, float32_product_error(device))


def working_bytes(n: int, coordinates: int = 1 << 20, threads: int | None = None) -> int:
    """The most memory that a search takes beside the points themselves.

    Partial Gram matrices of the threads, bounds of all distances, and chunks of at most 4,096
    coordinates: about `(4 + threads) 8 n^2` bytes, and 16 to 50 MiB a thread for many coordinates.

    Args:
        n: number of points.
        coordinates: of each.
        threads: of torch; None for the present number.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return products_bytes(n, coordinates, threads) + bounds_bytes(n)


def _refuse_nonfinite(points: torch.Tensor, what: str) -> None:
    wrong = torch.cat([~some.isfinite().all(1) for some in points.split(1)])
    if count := int(wrong.sum()):
        raise NonFiniteError(
            f"{what}: {count} of {len(wrong)} hold NaN or infinity, the first is number "
            f"{int(wrong.nonzero()[0])}; an intrinsic dimension needs finite points"
        )
