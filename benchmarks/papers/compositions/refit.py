"""CHITA's update of the weights on a support that another method has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.pruner import Pruner
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.methods.chita.solver.blocks import edges_of
from vlp_plugins.methods.chita.solver.dual import Dual
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.methods.method import Context, Cost, Method, Procedure
from vlp_plugins.methods.rounds import RecordedBatches
from vlp_plugins.models.adapter import Batch
from vlp_plugins.scoring.allocation import GlobalAllocation

ROW = 4
"""Samples of a row of gradients."""


@dataclass(frozen=True)
class Refit(Procedure):
    """Masks of another method, and the values that CHITA's quadratic model gives what they keep.

    In every block of 2,000 weights the kept ones are the exact minimiser of the ridge-penalised
    model (`solver/dual.py`) on the support of the other method.

    Attributes:
        base: chooses the support; reads the batches as they are.
        ridge: lambda.
        rows: batches that make rows, in pieces of `ROW` samples.
    """

    base: Method
    ridge: float = 1e-8
    rows: int = 4
    name: str = "refit"
    parameters: dict[str, Any] = field(default_factory=dict)

    def run(self, context: Context) -> list[Masks]:
        found = self.base.run(context)
        pieces = [p for b in list(context.batches)[: self.rows] for p in pieces_of(b, ROW)]
        context = replace(context, batches=pieces, limit=None)
        settings = Settings(lambda_=self.ridge).for_variant(published=False)
        setup = Setup.of(context, settings, GlobalAllocation())
        with setup.pruner(RecordedBatches(setup.calibration.of_round(0))) as pruner:
            return [self._refitted(setup, pruner, masks) for masks in found]

    def cost(self, context: Context) -> Cost:
        return Cost()

    def _refitted(self, setup: Setup, pruner: Pruner, masks: Masks) -> Masks:
        kept = {name: masks[name] for name in setup.context.weights}
        support = setup.columns.join(kept)
        values = torch.zeros_like(pruner.dense)
        bounds = setup.columns.bounds
        assert bounds is not None
        for first, part in pruner.rows.parts():
            for start, stop in pairwise(edges_of(bounds, first, first + part.shape[1])):
                span, whole = slice(start, stop), slice(first + start, first + stop)
                inside = support[whole]
                if not inside.any():
                    continue
                block, dense = part[:, span], pruner.dense[whole]
                problem = Problem(dense, MemoryRows(block), self.ridge, int(inside.sum()))
                dual = Dual.of(problem, inside)
                values[whole][inside] = dual.refit(block[:, inside], dense[inside])
        return Masks.from_dense(kept, masks.manifest, setup.columns.split(values))


def pieces_of(batch: Batch, size: int) -> Iterator[dict[str, Any]]:
    """A batch in pieces of some rows."""
    rows = len(batch["input_ids"])
    for start in range(0, rows, size):
        yield {
            key: value[start : start + size]
            if torch.is_tensor(value) and value.ndim and len(value) == rows
            else value
            for key, value in batch.items()
        }
