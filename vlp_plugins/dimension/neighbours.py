"""The distances of points to their two nearest neighbours, within bounds that hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError
from vlp_plugins.runtime.model_state import float32_product_error
from vlp_plugins.runtime.parallel import over_tensors

# Rows of points are far apart in memory: a chunk takes long pieces of them, as far as it stays in
# the cache, and few enough for the rounding of its products.
_CHUNK = 1 << 19
_WIDTHS = (1024, 4096)
_STRIP = 64
# Differences of pairs that are in work at a time.
_BATCH = 1 << 20
# What the partial sums of all threads may take together; above it torch's threads share a product.
_PARTIAL = 1 << 28

_Add = Callable[[torch.Tensor, torch.Tensor], None]


def centred_gram(points: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Products of all pairs of points, after the mean of the points is taken off every coordinate.

    On a CPU only one triangle is computed, in strips. The points are read once, and never copied
    as a whole.

    Args:
        points: `[n, D]`, floating.
        dtype: of the products, float32 or float64.

    Returns:
        float64 `[n, n]`, symmetric; each entry within `product_error` times the norms of its two
        centred points.
    """
    n = len(points)
    width = _width(*points.shape)
    # On a CPU narrower strips than these lose what they save.
    strip = _STRIP if points.device.type == "cpu" else n

    def begin() -> _Add:
        room = points.new_empty(n * width, dtype=dtype)

        def add(chunk: torch.Tensor, total: torch.Tensor) -> None:
            wide = chunk.to(torch.promote_types(dtype, chunk.dtype))
            centred = torch.sub(wide, wide.mean(0), out=room[: wide.numel()].view(wide.shape))
            for start in range(0, n, strip):
                rows = slice(start, start + strip)
                total[rows, : start + strip] += centred[rows] @ centred[: start + strip].T

        return add

    total = _sum_over_chunks(points, (n, n), begin)
    return total.tril_().add_(total.tril(-1).T)


def squared_distances(
    points: torch.Tensor, pairs: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The squared distance of every pair from the differences of its coordinates.

    Args:
        points: `[n, D]`, floating.
        pairs: int64 `[p, 2]`.
        dtype: at least that of the differences and of their sums within a chunk.

    Returns:
        float64 `[p]`; 0 exactly for equal points.
    """
    wide_dtype = torch.promote_types(dtype, points.dtype)
    width = _width(*points.shape)
    batch = min(_BATCH // max(1, width), len(pairs))

    def begin() -> _Add:
        room = points.new_empty((2, batch * width), dtype=wide_dtype)

        def add(chunk: torch.Tensor, total: torch.Tensor) -> None:
            wide = chunk.to(wide_dtype)
            for some, sums in zip(pairs.split(batch), total.split(batch), strict=True):
                shape = (len(some), wide.shape[1])
                one, other = (part[: len(some) * wide.shape[1]].view(shape) for part in room)
                torch.index_select(wide, 0, some[:, 0], out=one)
                torch.index_select(wide, 0, some[:, 1], out=other)
                lengths = torch.linalg.vector_norm(one.sub_(other), dim=1)
                sums += lengths.double().square_()

        return add

    return _sum_over_chunks(points, (len(pairs),), begin)


def norms(points: torch.Tensor) -> torch.Tensor:
    """The norm of every point `[n, D]`, float64 `[n]`; the mean stays on."""
    rows = max(1, _CHUNK // max(1, points.shape[1]))
    parts = points.detach().split(rows)
    return torch.cat([torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in parts])


def product_error(points: torch.Tensor, dtype: torch.dtype) -> float:
    """A bound of the error of a product in `centred_gram`, relative to the norms of its points.

    A sum of `w` terms in any order is off by at most about `w u` times the sum of their
    magnitudes, `u` the unit roundoff; that sum is at most the product of the norms. What is lost
    when the mean is taken off, and by reduced precision of the products where PyTorch was allowed
    it (`float32_product_error`), comes on top. Sums of chunks are float64.
    """
    terms = _width(*points.shape) + 16
    if dtype == torch.float64:
        return terms * 2.0**-53
    return terms * 2.0**-24 + float32_product_error(points.device)


def products_bytes(n: int, coordinates: int, threads: int) -> int:
    """The most memory that `centred_gram` and `squared_distances` take beyond n points."""
    width = _width(n, coordinates)
    shares = _shares(8 * n * n, threads)
    # A chunk in float64, and centred points or the differences of pairs.
    room = 8 * (width * n + max(width * n, 2 * min(_BATCH, width * n * n // 2)))
    return (shares + 1) * 8 * n * n + shares * (room + 12 * min(_STRIP, n) * n)


def _width(n: int, coordinates: int) -> int:
    """Coordinates of a chunk of n points."""
    return min(coordinates, max(_CHUNK // n, _WIDTHS[0]), _WIDTHS[1])


def _shares(total_bytes: int, threads: int) -> int:
    """Among how many threads the chunks are divided, each with a partial sum of its own."""
    return threads if threads * total_bytes <= _PARTIAL else 1


def _sum_over_chunks(
    points: torch.Tensor, shape: tuple[int, ...], begin: Callable[[], _Add]
) -> torch.Tensor:
    """float64 sums over chunks of coordinates; each thread adds chunks by its own `begin()`."""
    chunks = points.detach().split(_width(*points.shape), dim=1)
    device = points.device
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    shares = min(_shares(8 * total.numel(), threads), len(chunks))

    def add_up(share: int) -> torch.Tensor:
        partial = total if share == 0 else torch.zeros_like(total)
        add = begin()
        with torch.autocast(device.type, enabled=False):
            for chunk in chunks[share::shares]:
                add(chunk, partial)
        return partial

    for partial in over_tensors(add_up, range(shares), device)[1:]:
        total += partial
    return total


# Pairs that are looked at together: 4 MiB of float64.
_TILE = 1 << 19
# Squared norms below this are no longer accurate to float32's relative precision.
_TINY = 1e-34


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The two nearest other points of every point of some blocks of equal size.

    Attributes:
        r1: distance to the nearest, float64 `[b, m]`.
        r2: to the second, at least `r1`; float64 `[b, m]`.
        first: position of the nearest in the block, int64 `[b, m]`.
        second: of the second.
    """

    r1: torch.Tensor
    r2: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    def cpu(self) -> Neighbours:
        """The same, on the CPU."""
        return Neighbours(self.r1.cpu(), self.r2.cpu(), self.first.cpu(), self.second.cpu())


class DistanceBounds:
    """Lower and upper bounds of all squared distances, which measured pairs tighten to a value.

    Attributes:
        lower: float64 `[n, n]`, symmetric, infinite on the diagonal.
        upper: as `lower`; equal to it where the distance was measured.
    """

    def __init__(self, gram: torch.Tensor, error: float) -> None:
        """Bounds from products of centred points.

        Args:
            gram: float64 `[n, n]`; overwritten.
            error: bound of the error of a product, relative to the norms of its points.
        """
        squares = gram.diagonal().clamp_min(0)
        # |d2 - its estimate| <= error (|x|^2 + |y|^2 + 2 |x| |y|); 1.1: the norms err themselves.
        margin = (1.1 * error * (squares + _TINY)).sqrt()
        slack = torch.add(margin[:, None], margin).square_()
        self.upper = gram.mul_(-2).add_(squares[:, None]).add_(squares)
        self.lower = (self.upper - slack).clamp_min_(0)
        self.upper.add_(slack)
        for bound in (self.lower, self.upper):
            bound.fill_diagonal_(torch.inf)

    def missing(self, blocks: Sequence[torch.Tensor], most: int) -> torch.Tensor:
        """The pairs to measure before the two nearest neighbours within blocks are certain.

        A point's second neighbour is at most as far as its second smallest upper bound; every pair
        that may be nearer is a candidate.

        Args:
            blocks: each int64 `[b, m]`: positions of the points of b blocks of m points.
            most: candidates per point; where there are more the nearest come first, and a later
                call, which knows more, returns what is still missing.

        Returns:
            int64 `[p, 2]`, every pair once, the smaller position first.
        """
        wanted = torch.zeros_like(self.lower, dtype=torch.bool)
        for block in blocks:
            for rows in _tiles(block):
                upper = _between(self.upper, rows, block)
                limit = _two_smallest(upper)[1].unsqueeze(-1)
                lower = _between(self.lower, rows, block)
                candidate = (lower < upper) & (lower < limit)
                if int(candidate.sum(-1).max()) > most:
                    nearest = upper.masked_fill_(~candidate, torch.inf).topk(most, largest=False)
                    candidate &= torch.zeros_like(candidate).scatter_(-1, nearest.indices, True)
                which, row, column = candidate.nonzero(as_tuple=True)
                wanted[rows[which, row], block[which, column]] = True
        return (wanted | wanted.T).triu_().nonzero()

    def record(self, pairs: torch.Tensor, squared: torch.Tensor) -> None:
        """Keeps the measured squared distances, float64 `[p]`, of pairs `[p, 2]`."""
        for one, other in (pairs.unbind(1), pairs.flip(1).unbind(1)):
            self.lower[one, other] = squared
            self.upper[one, other] = squared

    def nearest_two(self, block: torch.Tensor) -> Neighbours:
        """The two nearest neighbours within blocks int64 `[b, m]` of which no pair is missing."""
        found = [_two_smallest(_between(self.upper, rows, block)) for rows in _tiles(block)]
        r1, r2, first, second = (torch.cat(tiles, 1) for tiles in zip(*found, strict=True))
        return Neighbours(r1.sqrt_(), r2.sqrt_(), first, second)


def bounds_bytes(n: int) -> int:
    """The most memory that `DistanceBounds` of n points takes, its Gram matrix included."""
    return 8 * n * n * 3 + 3 * n * n + 6 * 8 * min(max(_TILE, n), n * n)


def _tiles(block: torch.Tensor) -> Sequence[torch.Tensor]:
    """Blocks in pieces `[b, s]`, whose pairs with all points are few enough for one step."""
    return block.split(max(1, _TILE // block.numel()), dim=1)


def _between(bound: torch.Tensor, rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Of the pairs of some points of blocks `[b, s]` with all points `[b, m]`: `[b, s, m]`."""
    places = rows.unsqueeze(2) * len(bound) + block.unsqueeze(1)
    # Four times as fast as indexing with rows and columns on a CPU.
    return bound.view(-1).index_select(0, places.view(-1)).view(places.shape)


def _two_smallest(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Smallest and second smallest values along the last dimension, and where each of them is."""
    # Four times as fast as topk(2) on a CPU.
    first, at = values.min(-1, keepdim=True)
    values.scatter_(-1, at, torch.inf)
    second, there = values.min(-1)
    values.scatter_(-1, at, first)
    return first.squeeze(-1), second, at.squeeze(-1), there


_CANDIDATES = 16
_MORE = 4
# More pairs per point and block than these cost more to measure than products in float64.
_WORTH_MEASURING = 4
# Of squared norms: outside, squares lose accuracy in float32, or their sums overflow.
_RANGE = (1e-30, 1e36)


def nearest_in_blocks(
    points: torch.Tensor, blocks: Sequence[torch.Tensor], *, what: str = "points"
) -> list[Neighbours]:
    """The two nearest neighbours of every point within each of several blocks of the points.

    Gram distances of centred float32 points cancel: their error is a share of the norms, not of
    the distance. They only choose the candidates, with a bound of that error; the distances
    themselves are measured from the differences of the coordinates, and are 0 exactly for equal
    points. All blocks share one Gram matrix, and no pair is measured twice. The points are read
    twice as a rule, and more often where distances are tiny compared with the spread of the points.

    Args:
        points: `[n, D]`, floating.
        blocks: each int64 `[b, m]`: positions of the points of b blocks of m points, m at least 3.
        what: names the points in errors.

    Returns:
        For each of `blocks` its neighbours.

    Raises:
        StatisticsError: if these are not points `[n, D]`, or a block has fewer than 3.
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
    deep model they may differ by five, as far as other samples may be, and count as different:
    measure in float32. float64 is judged as float32, in which most points are computed.

    Args:
        dtype: of the points.
        device: where they were computed; products of reduced precision round like their dtype.
    """
    return max(64 * 2.0**-24, torch.finfo(dtype).eps, float32_product_error(device))


def working_bytes(n: int, coordinates: int = 1 << 20, threads: int | None = None) -> int:
    """The most memory that a search among n points takes in addition to the points.

    Partial Gram matrices of torch's threads, bounds of all distances, and chunks of at most 4,096
    coordinates: about `(4 + threads) 8 n^2` bytes, and 16 to 50 MiB a thread for many coordinates.
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
