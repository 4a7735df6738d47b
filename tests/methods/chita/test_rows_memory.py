"""Rows that do not fit into the budget never are in memory together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_memory
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.rows.gradients import gradient_rows
from vlp_plugins.methods.chita.rows.plan import Columns, RowNeeds
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap

MIB = 1 << 20
WIDTH, N, BUDGET = 1024, 12, 24 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_in", ["disk", "passes"])
def test_the_peak_is_within_the_budget(keep_in, dtype, tmp_path):
    """4 M weights: 192 MiB of rows, 16 MiB of gradients and some for one part as float32."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])
    adapter = ModuleAdapter(model, loss=lambda module, batch: module(batch).square().mean())
    weights = WeightMap.of(model, adapter)
    columns = Columns.of(weights, 10_000)
    assert N * columns.p * 4 == 192 * MIB
    probe, batches = LossProbe(model, adapter, weights), [torch.rand(2, WIDTH) for _ in range(N)]
    total = 0.0
    plan = RowNeeds(columns, N, BUDGET, tmp_path, dtype, keep_in=keep_in).plan()
    with peak_memory() as meter, gradient_rows(probe, plan, lambda: iter(batches)) as rows:
        for _, part in rows.parts():
            total += float(part.float().norm() ** 2)
    assert total > 0
    gradients = 16 * MIB
    assert meter.extra <= BUDGET + 2 * gradients + 16 * MIB, meter.extra / MIB
