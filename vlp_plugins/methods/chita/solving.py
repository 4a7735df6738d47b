"""From the rows of a model to the new values of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlp_plugins.methods.chita.group_rows import GroupRows, gather, spread
from vlp_plugins.methods.chita.groups import Group
from vlp_plugins.rows.columns import Columns
from vlp_plugins.scoring.factors import Factors
from vlp_plugins.solvers.importance import Importance
from vlp_plugins.solvers.problem import Problem, Solution
from vlp_plugins.solvers.rows import Rows
from vlp_plugins.solvers.solve import Effort, solve


@dataclass(frozen=True)
class Pruner:
    """Everything of a problem but lambda and how many weights stay.

    Attributes:
        dense: the weights before, float32 `[p]`.
        rows: their gradients.
        columns: where weights and blocks lie.
        effort: of the solver.
        first_order: weight c of the first-order term.
        nonzero: only what is not 0 counts as kept, as in the published code.
        alive: bool `[p]`, false where a weight was removed before and stays so; None: nowhere.
        kept_in: where the rows are.
        factors: what multiplies magnitudes where they share out weights among blocks; None: 1.
    """

    dense: torch.Tensor
    rows: Rows
    columns: Columns
    effort: Effort
    first_order: float
    nonzero: bool = False
    alive: torch.Tensor | None = None
    kept_in: str = "ram"
    factors: Factors | None = None

    def mean_square(self) -> float:
        """Of all elements of the rows; one sweep."""
        total = self.dense.new_zeros((), dtype=torch.float64)
        for _, part in self.rows.parts():
            total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return float(self.rows.add_up(total)) / (self.rows.n * self.rows.p)

    def prune(self, groups: Sequence[Group], ridge: float) -> Solution:
        """Solves one problem for every group; the objective is the sum of theirs.

        Args:
            groups: every weight is in one of them.
            ridge: lambda.
        """
        if len(groups) == 1:
            bounds = self.columns.bounds
            return self._solved(self.dense, self.rows, bounds, groups[0], ridge, self.alive)
        values = torch.zeros_like(self.dense)
        support = torch.zeros_like(self.dense, dtype=torch.bool)
        total = 0.0
        spans = dict(zip(self.columns.names, pairwise(self.columns.starts), strict=True))
        for group in groups:
            ranges = _merged([spans[name] for name in group.names])
            rows = GroupRows(self.rows, ranges)
            found = self._solved(
                gather(self.dense, ranges),
                rows,
                rows.bounds(self.columns.bounds),
                group,
                ridge,
                None if self.alive is None else gather(self.alive, ranges),
            )
            spread(found.values, values, ranges)
            spread(found.support, support, ranges)
            total += found.objective
        return Solution(values, support, total)

    def _solved(
        self,
        dense: torch.Tensor,
        rows: Rows,
        bounds: tuple[int, ...] | None,
        group: Group,
        ridge: float,
        alive: torch.Tensor | None,
    ) -> Solution:
        importance = None
        if self.factors is not None:
            importance = _importance_of(self.factors, self._widths(group))
        problem = Problem(dense, rows, ridge, group.keep, self.first_order, bounds, importance)
        found = solve(problem, self.effort)
        if self.nonzero:
            return Solution(found.values, found.values != 0, found.objective)
        if alive is None:
            return found
        return Solution(found.values, stay_removed(found.support, alive), found.objective)

    def _widths(self, group: Group) -> list[tuple[str, int]]:
        """Names and numbers of columns of the weights of a group, in the order of the columns."""
        spans = zip(self.columns.names, pairwise(self.columns.starts), strict=True)
        return [(name, stop - start) for name, (start, stop) in spans if name in group.names]


def stay_removed(support: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """The support without removed weights, filled up by others that are 0, the first by position.

    Removed weights have no gradient and are 0, so a solver takes one only to fill up a count: it
    is as good as any other weight of value 0.

    Args:
        support: bool `[p]`.
        alive: bool `[p]`, at least as many true.

    Returns:
        Bool `[p]` with as many true as `support`.
    """
    revived = int((support & ~alive).sum())
    if not revived:
        return support
    support = support & alive
    support[(alive & ~support).nonzero()[:revived, 0]] = True
    return support


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges as one, ascending."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _importance_of(factors: Factors, widths: Sequence[tuple[str, int]]) -> Importance:
    """The factors of columns.

    Args:
        factors: by canonical name.
        widths: names and numbers of columns of weights, in the order of their columns.
    """
    bounds = [0]
    for _, width in widths:
        bounds.append(bounds[-1] + width)
    return Importance(tuple(bounds), tuple(factors.relative(name) for name, _ in widths))
