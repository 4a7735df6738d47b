"""Rows of the toy model whose losses remember earlier batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.rows.gradients import GradientRows, gradient_rows
from vlp_plugins.methods.chita.rows.plan import Columns, RowNeeds
from vlp_plugins.models.weights import WeightMap

N = 5
CPU = torch.device("cpu")


def toy_columns(block_size: int | None = 20) -> Columns:
    return Columns.of(WeightMap.of(losing_toy(), LosingAdapter()), block_size)


@contextmanager
def toy_rows(batches: Any = None, *, skip: bool = False, **options: Any) -> Iterator[GradientRows]:
    """Rows of five batches, in memory unless told otherwise."""
    model, adapter = losing_toy(), LosingAdapter()
    probe = LossProbe(model, adapter, WeightMap.of(model, adapter), skip_nonfinite=skip)
    batches = toy_batches(N) if batches is None else batches
    columns = options.pop("columns", None) or toy_columns()
    of_rows = {name: options.pop(name) for name in ("alive", "progress") if name in options}
    options = {"n": N, "budget": None, "folder": None, "dtype": torch.float32, **options}
    plan = RowNeeds(columns, device=CPU, **options).plan()
    with gradient_rows(probe, plan, lambda: iter(batches), **of_rows) as rows:
        yield rows


def matrix(rows: GradientRows) -> torch.Tensor:
    """All rows of this process, float32 `[n, p]`; one sweep."""
    found = torch.full((rows.n, rows.p), torch.nan)
    for start, part in rows.parts():
        found[:, start : start + part.shape[1]] = part
    return found


def by_hand(batches: Any, *, skip: tuple[int, ...] = ()) -> torch.Tensor:
    """The same matrix from the probe alone, whole weights side by side."""
    model, adapter = losing_toy(), LosingAdapter()
    weights = WeightMap.of(model, adapter)
    probe = LossProbe(model, adapter, weights, skip_nonfinite=bool(skip))
    rows = []
    with probe.attached():
        for index, batch in enumerate(batches):
            gradients = probe.measure(batch, index)
            assert (gradients is None) == (index in skip)
            if gradients is not None:
                rows.append(torch.cat([gradients[name].flatten() for name in weights]))
    return torch.stack(rows)
