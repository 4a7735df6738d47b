"""Sums over the coordinates of points, by chunks: products of all pairs, distances of some."""

from __future__ import annotations

from collections.abc import Callable

import torch

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

    Args:
        points: `[n, D]`.
        dtype: of the products.
    """
    terms = _width(*points.shape) + 16
    if dtype == torch.float64:
        return terms * 2.0**-53
    return terms * 2.0**-24 + float32_product_error(points.device)


def products_bytes(n: int, coordinates: int, threads: int) -> int:
    """The most memory that `centred_gram` and `squared_distances` take beside the points.

    Args:
        n: number of points.
        coordinates: of each.
        threads: of torch (`torch.get_num_threads()`).
    """
    width = _width(n, coordinates)
    shares = _shares(8 * n * n, threads)
    # A chunk in float64, and centred points or the differences of pairs.
    room = 8 * (width * n + max(width * n, 2 * min(_BATCH, width * n * n // 2)))
    return (shares + 1) * 8 * n * n + shares * (room + 12 * min(_STRIP, n) * n)


def _width(n: int, coordinates: int) -> int:
    """Coordinates of a chunk of n points."""
    return min(coordinates, max(_CHUNK // n, _WIDTHS[0]), _WIDTHS[1])


def _shares(total_bytes: int, threads: int) -> int:
    """Among how many threads the chunks are shared out, each with a partial sum of its own."""
    return threads if threads * total_bytes <= _PARTIAL else 1


def _sum_over_chunks(
    points: torch.Tensor, shape: tuple[int, ...], begin: Callable[[], _Add]
) -> torch.Tensor:
    """float64 sums of that shape over chunks of coordinates, several threads at a time.

    Args:
        points: `[n, D]`.
        shape: of the sums.
        begin: called once by every thread; returns what adds a chunk to its sums.
    """
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
