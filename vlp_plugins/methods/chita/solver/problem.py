"""The problem of CHITA: a quadratic model of the loss, and how many weights may stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.scoring.threshold import top, top_by

# Elements of a part that are in work at a time: 64 MiB of float32.
_PART = 1 << 24
# Rows that are in memory need no room for a part: enough blocks at a time for many cores.
_VIEW = 1 << 26


class Rows(ABC):
    """A matrix `[n, p]` that is read part by part, because it may be larger than the memory.

    With several processes each holds some of the columns. A solver is written once: it sweeps over
    `parts`, and calls `add_up` and `fill` where the columns of all processes meet.

    Attributes:
        n: number of rows.
        p: number of columns, of all processes.
        sweeps: how often `parts` was iterated so far; a sweep may cost reading a disk or running
            every batch again.
    """

    n: int
    p: int
    sweeps: int = 0

    @abstractmethod
    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """One sweep over the columns of this process, in ascending order.

        Yields:
            The first column, and `[n, width]` float32 (or the dtype of a smaller kind of rows),
            not to be modified and valid until the next part only. A part holds whole blocks
            wherever the rows were made with block bounds.
        """

    @cached_property
    def held(self) -> dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]:
        """What a solver keeps for its next solution: by edges of blocks, columns and their sums."""
        return {}

    @property
    def source(self) -> Rows:
        """The rows that are read: these, or those that these are some columns of."""
        return self

    def own(self, first: int, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """What these rows have of a part of their source, as `parts` yields it."""
        yield first, part

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes; the tensor itself where there is one."""
        return tensor

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        """Gives a vector `[p]` the entries that other processes computed, in place."""
        return vector


class MemoryRows(Rows):
    """Rows that are one tensor."""

    def __init__(self, matrix: torch.Tensor, bounds: Sequence[int] | None = None) -> None:
        """Keeps the tensor itself.

        Args:
            matrix: `[n, p]`, floating.
            bounds: block boundaries, the first 0, the last p; None for no blocks.

        Raises:
            UnsupportedError: if the matrix is empty or not two-dimensional.
        """
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise UnsupportedError(
                f"rows are a matrix [n, p] with at least one of each, not {list(matrix.shape)}"
            )
        self.n, self.p = matrix.shape
        self.matrix = matrix
        self._cuts = part_bounds(self.n, self.p, bounds, _VIEW)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.sweeps += 1
        for start, stop in pairwise(self._cuts):
            yield start, self.matrix[:, start:stop]


def part_bounds(n: int, p: int, bounds: Sequence[int] | None, elements: int = _PART) -> list[int]:
    """Where to cut `p` columns into parts of about `elements` elements, at block bounds if any."""
    width = max(1, elements // max(1, n))
    if bounds is None:
        return [*range(0, p, width), p]
    cuts = [0]
    for start, stop in pairwise(bounds):
        if stop - cuts[-1] > width and start > cuts[-1]:
            cuts.append(start)
    return cuts if cuts[-1] == p else [*cuts, p]


@dataclass(frozen=True)
class Importance:
    """Factors that are constant on ranges of columns; nothing of length p is kept.

    Attributes:
        bounds: where the ranges begin and end, the first 0, the last p, ascending.
        factors: of every range, above 0.
    """

    bounds: tuple[int, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(start <= stop for start, stop in pairwise(self.bounds))
        if self.bounds[:1] != (0,) or not ascending:
            raise UnsupportedError("ranges of columns go from 0 to p in ascending order")
        if len(self.factors) != len(self.bounds) - 1 or min(self.factors, default=1.0) <= 0:
            raise UnsupportedError(
                f"{len(self.bounds) - 1} ranges of columns have as many factors above 0, not "
                f"{list(self.factors)}"
            )

    def times(self, values: torch.Tensor, entries: slice = slice(None)) -> torch.Tensor:
        """Values times the factors of their columns, in place.

        Args:
            values: of the columns in `entries`, one each.
            entries: a slice of all columns, of any step above 0.
        """
        first, last, step = entries.indices(self.bounds[-1])
        for (start, stop), factor in zip(pairwise(self.bounds), self.factors, strict=True):
            low, high = max(start, first), min(stop, last)
            if low < high:  # positions of the first column from `low` and from `high` on
                values[-((first - low) // step) : -((first - high) // step)].mul_(factor)
        return values


@dataclass(frozen=True)
class Ranked:
    """A support and what lies next to the line between it and the other entries.

    Attributes:
        support: bool `[p]`.
        threshold: the largest absolute value outside the support, -inf if nothing is.
        band: int64, ascending positions: the smallest of the support, the largest of the others.
    """

    support: torch.Tensor
    threshold: float
    band: torch.Tensor


def ranked(vector: torch.Tensor, keep: int, near: int = 0) -> Ranked:
    """The `keep` largest entries by absolute value; of equal ones the last stay.

    Args:
        vector: float32 `[p]`, finite.
        keep: 0 to p.
        near: entries of the band on each side of the line; fewer where a side has fewer.
    """
    return with_band(vector, top(vector.abs(), keep), near)


def with_band(vector: torch.Tensor, support: torch.Tensor, near: int) -> Ranked:
    """A given support, ranked by the absolute values of a vector.

    Args:
        vector: float32 `[p]`, finite.
        support: bool `[p]`.
        near: see `ranked`.
    """
    sizes, p, keep = vector.abs(), len(vector), int(support.count_nonzero())
    outside = sizes.masked_fill(support, -float("inf"))
    threshold = float(outside.max())
    if near == 0:
        return Ranked(support, threshold, support.new_zeros(0, dtype=torch.int64))
    band = top(outside, min(near, p - keep))
    band |= ~top(sizes.masked_fill_(~support, float("inf")), p - min(near, keep))
    return Ranked(support, threshold, band.nonzero()[:, 0])


@dataclass(frozen=True)
class Problem:
    """Minimise F over vectors with at most `keep` non-zeros (Benbaki et al., ICML 2023, eq. 5).

        F(w) = 1/2 |A (w - v)|^2 + n ridge / 2 |w - v|^2 + first_order 1'A w

    with the dense weights v `[p]` and the rows A `[n, p]`, gradients of n batches. F is n times the
    usual second-order model of the loss, the empirical Fisher matrix A'A / n for its Hessian.

    Attributes:
        weights: v, float32 `[p]`.
        rows: A.
        ridge: lambda > 0.
        keep: number of weights that stay, 0 to p.
        first_order: weight c >= 0 of the first-order term; 0 leaves it out. The published code of
            MULTIFLOW has 1 / (samples in a batch).
        bounds: boundaries of the blocks of the block-diagonal approximation, the first 0, the last
            p, ascending (equal neighbours are empty blocks); None for the full problem.
        importance: factors of the columns. They say nothing about F: they multiply |v| where one
            threshold over the whole vector decides how many weights each block keeps, and in the
            full problem where it is the whole search (`published`). None: 1.
    """

    weights: torch.Tensor
    rows: Rows
    ridge: float
    keep: int
    first_order: float = 0.0
    bounds: tuple[int, ...] | None = None
    importance: Importance | None = None

    def __post_init__(self) -> None:
        p = self.rows.p
        if self.weights.shape != (p,):
            raise UnsupportedError(
                f"{list(self.weights.shape)} weights do not fit rows of {p} columns"
            )
        if not self.ridge > 0 or self.ridge == float("inf"):
            raise UnsupportedError(
                f"the ridge penalty lambda must be above 0, not {self.ridge:g}; 0.1 is a good start"
            )
        if not self.first_order >= 0:
            raise UnsupportedError(f"first_order is a weight >= 0, not {self.first_order:g}")
        if not 0 <= self.keep <= p:
            raise UnsupportedError(f"{self.keep} of {p} weights cannot be kept")
        if not bool(torch.isfinite(self.weights.sum())):
            raise NonFiniteError("the weights of the problem hold NaN or infinity")
        if self.bounds is not None:
            ascending = all(start <= stop for start, stop in pairwise(self.bounds))
            if self.bounds[:1] != (0,) or self.bounds[-1:] != (p,) or not ascending:
                raise UnsupportedError(f"block bounds go from 0 to {p} in ascending order")
        if self.importance is not None and self.importance.bounds[-1] != p:
            raise UnsupportedError(
                f"factors of {self.importance.bounds[-1]} columns do not fit rows of {p}"
            )

    def weighed(self, values: torch.Tensor, entries: slice = slice(None)) -> torch.Tensor:
        """Values times the importance of their columns, in place.

        Args:
            values: of the columns in `entries`.
            entries: of any step above 0.
        """
        return values if self.importance is None else self.importance.times(values, entries)

    @property
    def alike(self) -> tuple[int, int]:
        """The same for problems with the same rows that differ in lambda alone."""
        return id(self.rows), self.keep

    def largest(self) -> torch.Tensor:
        """Bool `[p]`: the `keep` weights of the largest |v|, times their importance."""
        return top_by(
            lambda entries: self.weighed(self.weights[entries].abs(), entries),
            self.rows.p,
            self.keep,
            self.weights.device,
        )


def largest_of(problems: Sequence[Problem]) -> list[torch.Tensor]:
    """`Problem.largest` of each; of problems that differ in lambda alone it is one tensor."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for problem in problems:
        if problem.alike not in found:
            found[problem.alike] = problem.largest()
    return [found[problem.alike] for problem in problems]


def swept(problems: Sequence[Problem]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """One sweep over the rows that problems share: a part is read once for all of them.

    Args:
        problems: at least one; their rows have the same source.

    Yields:
        The index of a problem, and a part of its rows as `Rows.parts` does.
    """
    for first, part in problems[0].rows.source.parts():
        for index, problem in enumerate(problems):
            for start, piece in problem.rows.own(first, part):
                yield index, start, piece


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        values: float32 `[p]`, exactly 0 outside the support.
        support: bool `[p]`, `keep` of them true; values inside may be 0.
        objective: F of `values`, in float64, full problem or not.
    """

    values: torch.Tensor
    support: torch.Tensor
    objective: float
