"""Cuts networks that follow others, which nobody traces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlp_plugins.blocks import Block, Part
from vlp_plugins.structured import Record
from vlp_plugins.structured.indices import rows_kept


@torch.no_grad()
def cut_followers(model: nn.Module, blocks: Sequence[Block], record: Record) -> None:
    """Cuts the followers' copies of blocks as a record says of the blocks themselves.

    Args:
        model: whose own blocks are cut by somebody else.
        blocks: as they were before.
        record: in their coordinates.
    """
    done: set[int] = set()
    for block in blocks:
        if block.name not in record:
            continue
        rows = rows_kept(block, record[block.name])
        for part in block.inner:
            for linear in _followers(model, part):
                _take(linear.weight, 0, rows, done)
                if linear.bias is not None:
                    _take(linear.bias, 0, rows, done)
                linear.out_features = len(rows)
        for linear in _followers(model, block.output):
            _take(linear.weight, 1, rows, done)
            linear.in_features = len(rows)


def _followers(model: nn.Module, part: Part) -> list[nn.Linear]:
    found = [model.get_submodule(path) for path in part.followers]
    return [layer for layer in found if isinstance(layer, nn.Linear)]


def _take(parameter: torch.Tensor, dim: int, rows: torch.Tensor, done: set[int]) -> None:
    if id(parameter) in done:  # tied
        return
    done.add(id(parameter))
    parameter.data = parameter.data.index_select(dim, rows.to(parameter.device))
    parameter.grad = None
