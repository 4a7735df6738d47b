"""The same cut as zeros in the uncut model: what a cut model must equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.model_state import bare
from vlp_plugins.structured.cutting import linears_of
from vlp_plugins.structured.indices import fitting, rows_removed
from vlp_plugins.structured.record import Kept


@contextmanager
def masked(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> Iterator[None]:
    """Zeroes in the uncut model what a record removes; values return when the block ends.

    Zero columns of the output layer silence a unit, a head, or the value dimensions of one. Of a
    dimension of a head that stays, the query's row and bias are zero too, as the product with any
    key adds nothing to a score then. So nothing else needs to be zero: rows of keys, values and
    units change nothing any more.

    Args:
        model: prepared, not cut.
        adapter: of the model.
        record: in coordinates of the model.

    Raises:
        StructureError: if the record does not fit.
    """
    model = bare(model)
    saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        for block, kept in fitting(model, adapter, record):
            _zero(model, block, rows_removed(block, kept), saved)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved.values():
                parameter.copy_(values)


@torch.no_grad()
def _zero(
    model: nn.Module,
    block: Block,
    rows: torch.Tensor,
    saved: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    silenced: list[tuple[torch.Tensor, int]] = [
        (linear.weight, 1) for linear in linears_of(model, block.output)
    ]
    if isinstance(block, Attention):
        for linear in linears_of(model, block.query):
            silenced += [(p, 0) for p in (linear.weight, linear.bias) if p is not None]
    for parameter, dim in silenced:
        if id(parameter) not in saved:
            saved[id(parameter)] = (parameter, parameter.detach().clone())
            parameter.index_fill_(dim, rows.to(parameter.device), 0)
