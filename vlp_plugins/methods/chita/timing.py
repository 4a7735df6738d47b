"""How long the solver will take, from two small problems that are solved now."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vlp_plugins.solvers.problem import Problem
from vlp_plugins.solvers.rows import MemoryRows
from vlp_plugins.solvers.solve import Effort, solve

_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class SolverTime:
    """Seconds of one solve, a straight line over the number of columns.

    Attributes:
        fixed: seconds that do not depend on the number of columns.
        per_column: seconds.
    """

    fixed: float
    per_column: float

    @classmethod
    def measured(
        cls,
        effort: Effort,
        n: int,
        block_size: int | None,
        first_order: float,
        density: float,
        device: torch.device,
    ) -> SolverTime:
        """Solves random problems of about two and four megabytes, or of one and two blocks.

        Args:
            effort: of the solver.
            n: number of rows.
            block_size: columns of a block; None for the full problem.
            first_order: weight of the first-order term.
            density: fraction kept.
            device: of the rows.
        """
        block = block_size or 1
        small = max(1, _ELEMENTS // n // block) * block
        times = []
        for p in (small, small, 2 * small):  # the first warms up
            draw = torch.Generator().manual_seed(0)
            bounds = None if block_size is None else tuple(range(0, p + 1, block))
            rows = MemoryRows(torch.randn(n, p, generator=draw).to(device), bounds)
            weights = torch.randn(p, generator=draw).to(device)
            problem = Problem(weights, rows, 1.0, int(density * p), first_order, bounds)
            times.append(_seconds(problem, effort))
        _, one, two = times
        slope = max(two - one, two / 4) / small
        return cls(max(0.0, two - slope * 2 * small), slope)

    def seconds(self, p: int) -> float:
        """Of a problem with p columns."""
        return self.fixed + self.per_column * p


def _seconds(problem: Problem, effort: Effort) -> float:
    start = time.perf_counter()
    solve(problem, effort)
    return time.perf_counter() - start
