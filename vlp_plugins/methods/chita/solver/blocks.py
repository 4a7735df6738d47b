"""The exact weights of many blocks on given supports, in one sweep over the rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue

import torch
from torch.nn.utils.rnn import pad_sequence

from vlp_plugins.methods.chita.solver.gram import (
    block_sums,
    check_finite,
    gram,
    inexact,
    pick_and_sum,
    pick_columns,
    refit,
    solve_systems,
    symmetric,
    weighted_sum,
    widened,
)
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem, Solution
from vlp_plugins.methods.chita.solver.start import starting_point
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.parallel import over_tensors

_PADDING = 1.5


def solve_batch(
    problem: Problem,
    part: torch.Tensor,
    weights: torch.Tensor,
    inside: torch.Tensor,
    blocks: list[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimisers by batched Cholesky; arguments and result as of `blocks.solve_blocks`.

    Args:
        problem: what the part belongs to.
        part: `[n, m]`, floating.
        weights: v `[m]`.
        inside: bool `[m]`, the support.
        blocks: first column and the one after the last of every block.
    """
    values = torch.zeros_like(weights, dtype=torch.float32)
    sums = weights.new_zeros(len(part) + 2, dtype=torch.float64)
    everywhere = torch.arange(len(weights), device=weights.device)
    chosen = inside.nonzero()[:, 0]
    stops = torch.tensor([stop for _, stop in blocks], device=weights.device)
    # A GPU is waited for once, not for every block.
    ends = [0, *torch.searchsorted(chosen, stops).tolist()]
    for batch in similar([stop - start for start, stop in blocks]):
        columns = [everywhere[slice(*blocks[i])] for i in batch]
        kept = [chosen[ends[i] : ends[i + 1]] for i in batch]
        ridge, c = problem.rows.n * problem.ridge, problem.first_order

        pruned, v_pruned = _padded(part, weights.masked_fill(inside, 0), columns)
        targets = (pruned @ v_pruned[..., None])[..., 0].double() - c
        if c:
            dense = pad_sequence([weights[piece] for piece in columns], batch_first=True)
            moved = pruned @ dense[..., None].to(pruned.dtype)
            sums[-1] += moved.sum(dtype=torch.float64)
        matrices, v_kept = _padded(part, weights, kept)
        solutions = solve_systems(gram(matrices, ridge), targets, ridge)
        found = v_kept.double() + (matrices.mT.double() @ solutions[..., None])[..., 0]
        for piece, row in zip(kept, found, strict=True):
            values[piece] = row[: len(piece)].float()
        sums[:-1] += block_sums(solutions, targets, ridge, c)
        sums[-2] += v_pruned.double().square().sum()
    return values, sums


def similar(sizes: list[int]) -> list[list[int]]:
    """Groups of blocks of about one size, so that padding them to the largest costs little.

    Args:
        sizes: columns of every block.

    Returns:
        Positions in `sizes`, every one once.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        if groups and sizes[groups[-1][0]] <= _PADDING * sizes[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(
    part: torch.Tensor, vector: torch.Tensor, pieces: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns `[b, n, k]` and entries `[b, k]` of every piece, zero beyond its end."""
    places = pad_sequence(pieces, batch_first=True, padding_value=0)
    ends = torch.tensor([len(piece) for piece in pieces], device=part.device)
    there = torch.arange(places.shape[1], device=part.device) < ends[:, None]
    columns = pick_columns(part, places.flatten()).unflatten(1, places.shape)
    entries = vector[places].to(columns.dtype) * there
    return (columns * there).transpose(0, 1), entries


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


def solve_blockwise(
    problem: Problem, bounds: tuple[int, ...], solve: Callable[[Problem], Solution]
) -> Solution:
    """Solves every block as a full problem of its own, all in memory while its part is.

    Blocks keep as many weights as in the start of the published solver (`start.starting_point`):
    one threshold over the whole vector, `keep` in all. One sweep over the rows; with a first-order
    term one more, or two, for that start.

    Args:
        problem: what is to be solved.
        bounds: boundaries of its blocks.
        solve: a solver of full problems.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
        NonFiniteError: if the rows hold NaN or infinity.
    """
    rows, support = problem.rows, starting_point(problem).support
    values = torch.zeros_like(problem.weights, dtype=torch.float32)
    sums = torch.zeros(rows.n + 2, dtype=torch.float64, device=values.device)
    for first, part in rows.parts():
        columns = slice(first, first + part.shape[1])
        weights, inside, found = problem.weights[columns], support[columns], values[columns]

        def search(
            block: tuple[int, int],
            part: torch.Tensor = part,
            weights: torch.Tensor = weights,
            inside: torch.Tensor = inside,
            found: torch.Tensor = found,
        ) -> torch.Tensor:
            span = slice(*block)
            alone = _block_problem(problem, part[:, span], weights[span], inside[span])
            solution = solve(alone)
            found[span], inside[span] = solution.values, solution.support
            return _added_to_f(alone, solution)

        blocks = list(pairwise(edges_of(bounds, columns.start, columns.stop)))
        sums += torch.stack(over_tensors(search, blocks, part.device)).sum(0)
    support = rows.fill(support.to(torch.uint8)).bool()
    return Solution(rows.fill(values), support, full_objective(problem, rows.add_up(sums)))


def _block_problem(
    problem: Problem, part: torch.Tensor, weights: torch.Tensor, inside: torch.Tensor
) -> Problem:
    """A block as a full problem that keeps as many weights as the start does there."""
    rows = MemoryRows(widened(part).contiguous())
    keep = int(inside.count_nonzero())
    return Problem(weights, rows, problem.ridge, keep, problem.first_order)


def _added_to_f(block: Problem, solution: Solution) -> torch.Tensor:
    """A (w - v), |w - v|^2 and 1'A v of a block, see `full_objective`; float64 `[n + 2]`."""
    change = solution.values.double() - block.weights.double()
    ((_, part),) = block.rows.parts()
    dense = weighted_sum(part, block.weights).sum()
    moved = weighted_sum(part.double(), change)
    return torch.cat((moved, torch.stack((change @ change, dense))))
