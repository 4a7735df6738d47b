"""The block-diagonal approximation: all blocks of many problems in one sweep over the rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import pad

from vlp_plugins.masks.packed import pack, unpack
from vlp_plugins.methods.chita.solver.dual import (
    check_finite,
    factor,
    gram,
    pick_columns,
    refit,
    weighted_sum,
    widened,
)
from vlp_plugins.methods.chita.solver.problem import Problem, Solution, swept
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.parallel import over_tensors

_PADDING = 1.5
_ELEMENTS = 1 << 20  # of the blocks in work at a time: 4 MiB of float32, so that they stay in cache


@dataclass(frozen=True)
class Part:
    """Whole blocks of a problem: what one part of the rows holds.

    Attributes:
        problem: what they belong to.
        columns: where the part lies in it.
        matrix: the rows, `[n, m]`, floating.
        edges: boundaries of the blocks, the first 0, the last m, strictly ascending.
        support: bool `[m]`, a view of that of the whole problem.
        values: float32 `[m]`, a view of those of the whole problem.
    """

    problem: Problem
    columns: slice
    matrix: torch.Tensor
    edges: list[int]
    support: torch.Tensor
    values: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """The dense weights v `[m]`."""
        return self.problem.weights[self.columns]

    @property
    def blocks(self) -> list[slice]:
        """The columns of every block."""
        return [slice(start, stop) for start, stop in pairwise(self.edges)]

    def over_blocks(
        self, sizes: list[int], solve: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:
        """Solves blocks of about one size together, a few at a time on every core.

        Args:
            sizes: columns in work of every block.
            solve: gets positions of blocks; returns what they add to F, see `by_blocks`.

        Returns:
            The sum over all blocks.
        """
        batches = []
        for group in similar(sizes):
            count = max(1, _ELEMENTS // max(1, len(self.matrix) * sizes[group[0]]))
            batches += [group[i : i + count] for i in range(0, len(group), count)]
        return torch.stack(over_tensors(solve, batches, self.matrix.device)).sum(0)


@dataclass(frozen=True)
class Task:
    """A problem that is solved part by part.

    Attributes:
        problem: without block bounds everything is one block, which must be one part.
        support: bool `[p]`, where to start from.
        solve: sets support and values of a part and returns what its blocks add to F:
            A (w - v) `[n]`, |w - v|^2 and 1'A v, float64 `[n + 2]`.
    """

    problem: Problem
    support: torch.Tensor
    solve: Callable[[Part], torch.Tensor]


class Found:
    """A solution that is made part by part, of the columns of this process.

    Packed, it takes a bit for every weight and the values that stay, in RAM: many can be held.
    """

    def __init__(self, task: Task, *, packed: bool) -> None:
        problem = task.problem
        self._task, self._problem, self._packed = task, problem, packed
        self._pieces: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        self.sums = problem.weights.new_zeros(problem.rows.n + 2, dtype=torch.float64)
        if not packed:
            self._values, self._support = self._vectors()

    def solve(self, first: int, matrix: torch.Tensor) -> None:
        """Solves a part of the rows, see `Part`."""
        task, problem, columns = self._task, self._problem, slice(first, first + matrix.shape[1])
        edges = edges_of(problem.bounds or (0, problem.rows.p), columns.start, columns.stop)
        start = task.support[columns]
        if self._packed:
            support, values = start.clone(), torch.zeros_like(problem.weights[columns])
        else:
            support, values = self._support[columns].copy_(start), self._values[columns]
        self.sums += task.solve(Part(problem, columns, matrix, edges, support, values))
        if self._packed:
            self._pieces.append((columns, pack(support), values[support].cpu()))

    def solution(self) -> Solution:
        """The whole of it, in vectors; a collective.

        Raises:
            NonFiniteError: if the rows hold NaN or infinity.
        """
        problem, rows = self._problem, self._problem.rows
        values, support = self._vectors() if self._packed else (self._values, self._support)
        for columns, bits, kept in self._pieces:
            inside = support[columns]
            inside.copy_(unpack(bits, inside.shape))
            values[columns][inside] = kept.to(values.device)
        values, support, sums = (
            rows.fill(values),
            rows.fill(support),
            rows.add_up(self.sums.clone()),
        )
        check_finite(sums)
        moved, (distance, dense) = sums[:-2], sums[-2:].tolist()
        quadratic = float(moved @ moved) / 2 + rows.n * problem.ridge / 2 * distance
        linear = problem.first_order * (float(moved.sum()) + dense)
        return Solution(values, support, quadratic + linear)

    def _vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.zeros_like(self._problem.weights, dtype=torch.float32)
        return values, torch.zeros_like(values, dtype=torch.bool)


def by_blocks(tasks: Sequence[Task]) -> list[Found]:
    """Solves problems with the same rows part by part; one sweep over the rows.

    Raises:
        UnsupportedError: if the rows come in parts that cut a block.
    """
    found = [Found(task, packed=len(tasks) > 1) for task in tasks]
    for index, first, matrix in swept([task.problem for task in tasks]):
        found[index].solve(first, matrix)
    return found


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


def stacked(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Matrices or vectors of blocks `[..., k]` in one tensor `[b, ..., m]`, 0 beyond their ends."""
    if len(pieces) == 1:
        return pieces[0][None]  # a view: large blocks are worked on one by one
    width = max(piece.shape[-1] for piece in pieces)
    return torch.stack([pad(piece, (0, width - piece.shape[-1])) for piece in pieces])


def picked(matrix: torch.Tensor, chosen: list[torch.Tensor]) -> torch.Tensor:
    """Some columns of every block `[b, n, m]`, float32 at least, 0 beyond their ends; one copy."""
    width = max(map(len, chosen))
    columns = widened(matrix[:0]).new_empty((len(chosen), len(matrix), width))
    for into, positions in zip(columns, chosen, strict=True):
        there, beyond = into[:, : len(positions)], into[:, len(positions) :]
        if matrix.dtype == into.dtype:
            torch.gather(matrix, 1, positions.expand(len(matrix), -1), out=there)
        else:
            there.copy_(pick_columns(matrix, positions))
        beyond.zero_()
    return columns


def together(tensor: torch.Tensor, spans: list[slice]) -> torch.Tensor:
    """Blocks of a vector `[k]` or matrix `[n, k]` in one tensor `[b, ..., m]`, see `stacked`.

    Neighbours of one width are a view.
    """
    if not _neighbours(spans):
        return stacked([tensor[..., span] for span in spans])
    return (
        tensor[..., spans[0].start : spans[-1].stop].unflatten(-1, (len(spans), -1)).movedim(-2, 0)
    )


def put_apart(found: torch.Tensor, vector: torch.Tensor, spans: list[slice]) -> None:
    """Inverse of `together`: writes `[b, m]` to the blocks of a vector."""
    if _neighbours(spans):
        vector[spans[0].start : spans[-1].stop] = found.flatten()
        return
    for span, values in zip(spans, found, strict=True):
        vector[span] = values[: span.stop - span.start]


def _neighbours(spans: list[slice]) -> bool:
    """Whether blocks of one width lie next to each other."""
    first, width = spans[0].start, spans[0].stop - spans[0].start
    return all(s == slice(first + i * width, first + (i + 1) * width) for i, s in enumerate(spans))


def fit(part: Part) -> torch.Tensor:
    """Sets the values to the minimiser of every block on its support; see `by_blocks`."""
    problem, matrix, weights = part.problem, part.matrix, part.weights
    ridge, c = problem.rows.n * problem.ridge, problem.first_order
    blocks, pruned = part.blocks, weights.masked_fill(part.support, 0)
    chosen = part.support.nonzero()[:, 0]
    # A GPU is waited for once, not for every block.
    ends = torch.searchsorted(chosen, torch.tensor(part.edges, device=matrix.device)).tolist()

    def solve(batch: list[int]) -> torch.Tensor:
        kept = [chosen[ends[i] : ends[i + 1]] for i in batch]
        spans = [blocks[i] for i in batch]
        targets = torch.stack([weighted_sum(matrix[:, s], pruned[s]) for s in spans]) - c
        columns = picked(matrix, kept)
        systems = gram(columns, ridge)
        squares = systems.diagonal(dim1=1, dim2=2).sum(1)
        systems.diagonal(dim1=1, dim2=2).add_(ridge)
        u = torch.cholesky_solve(targets[..., None], factor(systems))[..., 0]
        fitted = refit(columns, stacked([weights[piece] for piece in kept]), u, squares)
        for piece, values in zip(kept, fitted, strict=True):
            part.values[piece] = values[: len(piece)]
        moved = -(ridge * u + c).sum(0)
        distance = (targets * u).sum() - ridge * u.square().sum()
        return torch.cat((moved, torch.stack((distance, torch.zeros_like(distance)))))

    sums = part.over_blocks([stop - start for start, stop in pairwise(ends)], solve)
    sums[-2] += torch.linalg.vector_norm(pruned, dtype=torch.float64).square()
    if c:
        sums[-1] = weighted_sum(matrix, weights).sum()
    return sums
