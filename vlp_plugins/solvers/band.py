"""Columns near the line between kept and pruned weights, held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vlp_plugins.solvers.columns import pick_columns
from vlp_plugins.solvers.dual import Dual
from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.ranked import Ranked
from vlp_plugins.solvers.rows import Rows


@dataclass(frozen=True)
class Band:
    """Some columns of the rows, with what a search among them needs.

    Attributes:
        columns: `[n, m]`, float64.
        weights: their dense weights, float64 `[m]`.
    """

    columns: torch.Tensor
    weights: torch.Tensor


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
