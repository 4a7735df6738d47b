"""The problem on a fixed support, solved through its n x n dual.

For a support S with complement C, r = n ridge and c = first_order let

    M = r I + A_S A_S',   q = A_C v_C - c 1,   u = M^-1 q.

Then w_S = v_S + A_S' u is the minimiser and

    F_S = r/2 (q'u + |v_C|^2) + c 1'A v - n c^2/2

is F there. Nothing divides by lambda. With z = v + A'u and h_j = a_j' M^-1 a_j, removing j from S
costs r/2 z_j^2 / (1 - h_j) exactly, and adding j of C gains r/2 z_j^2 / (1 + h_j).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vlp_plugins.methods.chita.solver.gram import (
    check_finite,
    factor,
    gram,
    pick_columns,
    refit,
    weighted_sum,
)
from vlp_plugins.methods.chita.solver.problem import Problem, Ranked, Rows

_WIDTH = 1 << 14  # columns in work at a time


@dataclass(frozen=True)
class Band:
    """Some columns of the rows, with what a search among them needs.

    Attributes:
        columns: `[n, m]`, float64.
        weights: their dense weights, float64 `[m]`.
    """

    columns: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Dual:
    """The dual of one support; all tensors float64.

    Attributes:
        matrix: M `[n, n]`.
        target: q `[n]`.
        ridge: r = n lambda.
        pruned: |v_C|^2.
        first_order: c.
        dense: 1'A v; left out (0) where c is 0.
    """

    matrix: torch.Tensor
    target: torch.Tensor
    ridge: float
    pruned: float
    first_order: float = 0.0
    dense: float = 0.0

    @classmethod
    def of(cls, problem: Problem, support: torch.Tensor) -> Dual:
        """The dual of a support of the full problem; one sweep over the rows.

        Args:
            problem: see `Problem`; its blocks play no part.
            support: bool `[p]`.
        """
        rows, c = problem.rows, problem.first_order
        ridge = rows.n * problem.ridge
        matrix = problem.weights.new_zeros((rows.n, rows.n), dtype=torch.float64)
        sums = problem.weights.new_zeros(rows.n + 2, dtype=torch.float64)  # A_C v_C, |v_C|^2, 1'A v
        for start, part in rows.parts():
            columns = slice(start, start + part.shape[1])
            inside, weights = support[columns], problem.weights[columns].double()
            tolerable = ridge * (part.shape[1] / rows.p) ** 0.5  # errors of parts add up
            for chosen in inside.nonzero()[:, 0].split(_WIDTH):
                matrix += gram(pick_columns(part, chosen), tolerable)
            pruned = weights.masked_fill(inside, 0)
            sums[:-2] += weighted_sum(part, pruned)
            sums[-2] += pruned.square().sum()
            if c:
                sums[-1] += weighted_sum(part, weights).sum()
        matrix, sums = rows.add_up(matrix), rows.add_up(sums)
        check_finite(sums)
        matrix.diagonal().add_(ridge)
        square, dense = sums[-2:].tolist()
        return cls(matrix, sums[:-2] - c, ridge, square, c, dense)

    @cached_property
    def factor(self) -> torch.Tensor:
        """Lower triangular L with M = L L'."""
        return factor(self.matrix)

    @cached_property
    def solution(self) -> torch.Tensor:
        """U = M^-1 q `[n]`."""
        return torch.cholesky_solve(self.target[:, None], self.factor)[:, 0]

    @cached_property
    def whitener(self) -> torch.Tensor:
        """L^-1 `[n, n]`: h_j is the squared length of L^-1 a_j."""
        identity = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        return torch.linalg.solve_triangular(self.factor, identity, upper=False)

    @property
    def objective(self) -> float:
        """F of the minimiser on the support; no sweep."""
        c = self.first_order
        quadratic = self.ridge / 2 * (float(self.target @ self.solution) + self.pruned)
        return quadratic + c * self.dense - len(self.target) * c**2 / 2

    def values(self, problem: Problem, support: torch.Tensor) -> torch.Tensor:
        """The minimiser, float32 `[p]`; one sweep over the rows."""
        values = torch.zeros_like(problem.weights, dtype=torch.float32)
        for start, part in problem.rows.parts():
            weights = problem.weights[start : start + part.shape[1]]
            inside = support[start : start + part.shape[1]]
            for chosen in inside.nonzero()[:, 0].split(_WIDTH):
                kept = pick_columns(part, chosen)
                values[start + chosen] = self.refit(kept, weights[chosen])
        return problem.rows.fill(values)

    def refit(self, kept: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """v_S + A_S' u for columns of the support `[n, k]` and v there `[k]`; float32 `[k]`."""
        squares = self.matrix.diagonal().sum() - len(self.matrix) * self.ridge
        return refit(kept, weights, self.solution, squares.clamp_min(0))

    def exchanged(self, band: Band, leaving: torch.Tensor, joining: torch.Tensor) -> Dual:
        """The dual after columns of a band left and joined the support, from these alone.

        Args:
            band: columns at hand.
            leaving: int64 `[a]`, positions in the band.
            joining: int64 `[b]`.
        """
        added, removed = band.columns[:, joining], band.columns[:, leaving]
        v_added, v_removed = band.weights[joining], band.weights[leaving]
        return replace(
            self,
            matrix=self.matrix + added @ added.T - removed @ removed.T,
            target=self.target - added @ v_added + removed @ v_removed,
            pruned=max(0.0, self.pruned - float(v_added @ v_added) + float(v_removed @ v_removed)),
        )


def removal_costs(z: torch.Tensor, h: torch.Tensor, ridge: float) -> torch.Tensor:
    """By how much F rises when one weight of the support goes and the others are solved again.

    Args:
        z: `v + A'u` `[m]`, the current weights.
        h: their leverages `[m]`.
        ridge: r = n lambda.
    """
    return z.square() * (ridge / 2) / (1 - h).clamp_min(torch.finfo(h.dtype).eps)


def adding_gains(z: torch.Tensor, h: torch.Tensor, ridge: float) -> torch.Tensor:
    """By how much F falls when one pruned weight joins and all are solved again.

    Args:
        z: `v + A'u` `[m]`.
        h: their leverages `[m]`.
        ridge: r = n lambda.
    """
    return z.square() * (ridge / 2) / (1 + h)


def dual_and_band(problem: Problem, chosen: Ranked) -> tuple[Dual, Band]:
    """The dual of a support and the columns of its band, in the same sweep over the rows."""
    collecting = _Collecting(problem.rows, chosen.band)
    dual = Dual.of(replace(problem, rows=collecting), chosen.support)
    columns = problem.rows.add_up(collecting.collected)
    return dual, Band(columns, problem.weights[chosen.band].double())


class _Collecting(Rows):
    """Rows that keep a copy of some columns while they are swept over."""

    def __init__(self, rows: Rows, positions: torch.Tensor) -> None:
        self.n, self.p = rows.n, rows.p
        self.rows, self.positions = rows, positions
        shape = (rows.n, len(positions))
        self.collected = torch.zeros(shape, dtype=torch.float64, device=positions.device)

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start, part in self.rows.parts():
            edges = torch.tensor([start, start + part.shape[1]], device=self.positions.device)
            first, last = torch.searchsorted(self.positions, edges).tolist()
            here = self.positions[first:last] - start
            self.collected[:, first:last] = pick_columns(part, here).double()
            yield start, part

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.rows.add_up(tensor)

    def fill(self, vector: torch.Tensor) -> torch.Tensor:
        return self.rows.fill(vector)
