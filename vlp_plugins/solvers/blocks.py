"""The exact weights of many blocks on given supports, in one visit of a part of the rows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue

import torch

from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.parallel import over_tensors
from vlp_plugins.solvers.batched import solve_batch
from vlp_plugins.solvers.columns import inexact, pick_and_sum, symmetric, weighted_sum, widened
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.systems import block_sums, check_finite, refit, solve_systems

_SMALL = 1 << 17  # elements of a block below which calls cost more than padding
_GROUP = 1 << 20  # elements of kept columns that stay in the cache until they are used again


def edges_of(bounds: tuple[int, ...], start: int, stop: int) -> list[int]:
    """The boundaries of the blocks of a part, counted from its first column, without empty ones.

    Raises:
        UnsupportedError: if the part does not hold whole blocks.
    """
    inner = bounds[bisect_left(bounds, start) : bisect_left(bounds, stop) + 1]
    if not inner or (inner[0], inner[-1]) != (start, stop):
        raise UnsupportedError(
            f"columns {start} to {stop} of the rows cut a block; make the rows with the same block "
            f"bounds as the problem"
        )
    return [bound - start for bound in dict.fromkeys(inner)]


def solve_blocks(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    inside: torch.Tensor,
    edges: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimiser of every block on its support.

    Blocks are shared out among the cores. On a GPU, and where they are small, their products are
    made many at a time as well.

    Args:
        problem: what the part belongs to.
        part: `[n, m]`, floating.
        weights: v `[m]`.
        inside: bool `[m]`, the support.
        edges: boundaries of the blocks, the first 0, the last m, strictly ascending.

    Returns:
        The values, float32 `[m]`, and what the part adds to F: see `full_objective`.
    """
    blocks = list(pairwise(edges))
    if part.device.type != "cpu" or part.numel() < _SMALL * len(blocks):
        return solve_batch(problem, part, weights, inside, blocks)
    values = torch.zeros_like(weights, dtype=torch.float32)
    pruned = weights.masked_fill(inside, 0)
    chosen = inside.nonzero()[:, 0]
    ends = torch.searchsorted(chosen, torch.tensor(edges)).tolist()

    groups = _groups(ends, len(part))
    rooms: SimpleQueue[Room] = SimpleQueue()
    for _ in range(min(torch.get_num_threads(), len(groups))):
        rooms.put(Room.of(part, groups, ends))

    def solve(group: range) -> torch.Tensor:
        pieces = [chosen[ends[i] : ends[i + 1]] for i in group]
        spans = [slice(edges[i], edges[i + 1]) for i in group]
        room = rooms.get()
        try:
            return _solve_group(problem, part, weights, pruned, values, spans, pieces, room)
        finally:
            rooms.put(room)

    sums = torch.stack(over_tensors(solve, groups, part.device)).sum(0)
    sums[-1] += torch.linalg.vector_norm(pruned, dtype=torch.float64).square()
    dense = weighted_sum(part, weights).sum() if problem.first_order else sums.new_zeros(())
    return values, torch.cat((sums, dense[None]))


@dataclass(frozen=True)
class Room:
    """Memory for one group of blocks, used again: fresh memory costs as much time as filling it.

    Attributes:
        kept: for the kept columns of all blocks of a group, 1-D.
        products: for their Gram matrices `[b, n, n]`.
        grams: for the same in float64.
    """

    kept: torch.Tensor
    products: torch.Tensor
    grams: torch.Tensor

    @classmethod
    def of(cls, part: torch.Tensor, groups: list[range], ends: list[int]) -> Room:
        """Room for the largest of the groups."""
        n, dtype = len(part), widened(part[:0]).dtype
        kept = max(ends[group.stop] - ends[group.start] for group in groups)
        most = max(map(len, groups))
        products = part.new_empty((most, n, n), dtype=dtype)
        exact = torch.empty_like(products, dtype=torch.float64)
        return cls(part.new_empty(n * kept, dtype=dtype), products, exact)


def _groups(ends: list[int], n: int) -> list[range]:
    """Neighbouring blocks whose kept columns fit into the cache: they are factorised together."""
    groups, first = [], 0
    for i in range(1, len(ends)):
        if i == len(ends) - 1 or (ends[i + 1] - ends[first]) * n > _GROUP:
            groups.append(range(first, i))
            first = i
    return groups


def _solve_group(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    pruned: torch.Tensor,
    values: torch.Tensor,
    spans: list[slice],
    pieces: list[torch.Tensor],
    room: Room,
) -> torch.Tensor:
    """Writes the values of some blocks and returns what they add to F: see `block_sums`.

    Args:
        problem: what the part belongs to.
        part: `[n, m]`.
        weights: v `[m]`.
        pruned: v outside the support, else 0, `[m]`.
        values: `[m]`, written at `pieces`.
        spans: the columns of every block.
        pieces: those of them that are in the support.
        room: what to compute in.
    """
    n, ridge, c = len(part), problem.rows.n * problem.ridge, problem.first_order
    products, grams = room.products[: len(spans)], room.grams[: len(spans)]
    moved = products.new_empty((len(spans), n))
    sizes = [n * len(piece) for piece in pieces]
    flat = room.kept[: sum(sizes)].split(sizes)
    kept = [block.view(n, len(piece)) for block, piece in zip(flat, pieces, strict=True)]
    for i, (span, piece) in enumerate(zip(spans, pieces, strict=True)):
        vector = pruned[span].to(products.dtype)
        pick_and_sum(widened(part[:, span]), piece - span.start, vector, kept[i], moved[i])
        symmetric(kept[i], out=products[i])
    targets = moved.double() - c
    grams.copy_(products)
    for i in inexact(products, ridge).nonzero()[:, 0].tolist():
        grams[i] = symmetric(kept[i].double())
    squares = grams.diagonal(dim1=1, dim2=2).sum(1).tolist()
    solutions = solve_systems(grams, targets, ridge)
    for i, piece in enumerate(pieces):
        values[piece] = refit(kept[i], weights[piece], solutions[i], squares[i])
    return block_sums(solutions, targets, ridge, c)


def full_objective(problem: Problem, sums: torch.Tensor) -> float:
    """F of the full problem from sums over all blocks; no sweep.

    Args:
        problem: see `Problem`.
        sums: A (w - v), then |w - v|^2 and 1'A v; float64 `[n + 2]`.

    Raises:
        NonFiniteError: if the rows hold NaN or infinity.
    """
    check_finite(sums)
    moved, (distance, dense) = sums[:-2], sums[-2:].tolist()
    quadratic = float(moved @ moved) / 2 + problem.rows.n * problem.ridge / 2 * distance
    return quadratic + problem.first_order * (float(moved.sum()) + dense)
