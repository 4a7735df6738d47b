"""The exact weights of many blocks on given supports, in one visit of a part of the rows."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from queue import SimpleQueue

import torch

from vlp_plugins.errors import UnsupportedError
from vlp_plugins.parallel import over_tensors
from vlp_plugins.solvers.batched import solve_batch
from vlp_plugins.solvers.columns import (
    inexact,
    pick_and_sum,
    symmetric,
    widened,
)
from vlp_plugins.solvers.grouping import Group, Room, groups_of
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.systems import (
    block_sums,
    check_finite,
    refit,
    solve_systems,
    visibly_rounded,
)

_SMALL = 1 << 17  # elements of a block below which calls cost more than padding


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
    sizes = [int(inside[start:stop].count_nonzero()) for start, stop in blocks]
    groups = groups_of(sizes, len(part))
    rooms: SimpleQueue[Room] = SimpleQueue()
    for _ in range(min(torch.get_num_threads(), len(groups))):
        rooms.put(Room.of(part, [sizes[group] for group in groups]))

    def solve(these: slice) -> torch.Tensor:
        bounds = edges[these.start : these.stop + 1]
        span = slice(bounds[0], bounds[-1])
        inner = [bound - span.start for bound in bounds]
        group = Group.of(part[:, span], weights[span], inside[span], inner)
        room = rooms.get()
        try:
            sums = _solve_group(problem, group, room)
        finally:
            rooms.put(room)
        values[span].scatter_(0, group.chosen, group.found)
        return sums

    return values, torch.cat(over_tensors(solve, groups, part.device)).sum(0)


def _solve_group(problem: Problem, group: Group, room: Room) -> torch.Tensor:
    """Writes the values of some blocks; returns by block what it adds: see `full_objective`."""
    n, ridge, c = problem.rows.n, problem.rows.n * problem.ridge, problem.first_order
    blocks = group.blocks
    products, grams = room.products[: len(blocks)], room.grams[: len(blocks)]
    moved = products.new_empty((len(blocks), n))
    sizes = [n * len(block.places) for block in blocks]
    kept = [columns.view(n, -1) for columns in room.kept[: sum(sizes)].split(sizes)]
    for block, columns, product, total in zip(blocks, kept, products, moved, strict=True):
        pick_and_sum(widened(block.rows), block.places, block.pruned, columns, total)
        symmetric(columns, out=product)
    targets = moved.double() - c
    grams.copy_(products)
    for i in inexact(products, ridge).nonzero()[:, 0].tolist():
        grams[i] = symmetric(kept[i].double())
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)
    solutions = solve_systems(grams, targets, ridge)
    exact = visibly_rounded(solutions, squares, _norms([block.kept for block in blocks])).tolist()
    for i, block in enumerate(blocks):
        block.found.copy_(refit(kept[i], block.kept, solutions[i], exact=exact[i]))
    sums = torch.nn.functional.pad(block_sums(solutions, targets, ridge, c), (0, 1))
    sums[:, -2] += _norms([block.pruned for block in blocks]).square()
    if c:
        pairs = zip(kept, blocks, strict=True)
        of_kept = [columns @ block.kept.to(columns.dtype) for columns, block in pairs]
        sums[:, -1] = (moved + torch.stack(of_kept)).sum(1, dtype=torch.float64)
    return sums


def _norms(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Their Euclidean norms, float64 `[b]`."""
    return torch.stack([torch.linalg.vector_norm(one, dtype=torch.float64) for one in vectors])


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
