"""From what is kept of a block to rows and columns of its layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block
from vlp_plugins.runtime.errors import StructureError, suggest
from vlp_plugins.structured.finding import blocks_of, uncut
from vlp_plugins.structured.record import Kept, Record


def fitting(
    model: torch.nn.Module, adapter: Adapter, record: Mapping[str, Kept]
) -> list[tuple[Block, Kept]]:
    """The blocks that a record names, in the order of the model, each with what is kept of it.

    Raises:
        StructureError: if the record names a block that the model does not have or that is smaller,
            or is of another adapter.
    """
    if isinstance(record, Record):
        record.check_adapter(adapter.name)
    blocks = {block.name: block for block in blocks_of(model, adapter)}
    for name, kept in record.items():
        if name not in blocks:
            left_out = uncut(model, adapter)
            why = f": {left_out[name]}" if name in left_out else suggest(name, list(blocks))
            if name not in left_out and left_out:
                path, reason = next(iter(left_out.items()))
                why += f"; left out are {len(left_out)}, first {path}: {reason}"
            raise StructureError(f"{type(model).__name__} has no block {name!r} to cut{why}")
        check_fits(blocks[name], kept)
    return [(block, record[name]) for name, block in blocks.items() if name in record]


def check_fits(block: Block, kept: Kept) -> None:
    """Raises `StructureError` if `kept` is not of a block like this."""
    if not isinstance(block, Attention):
        if kept.heads is not None or kept.dims is not None:
            raise StructureError(f"{block.name!r} is a feed-forward block and has no heads")
        _check_range(block, "unit", kept.units, block.width)
        return
    if kept.units is not None:
        raise StructureError(f"{block.name!r} is an attention block; give heads and dims")
    _check_range(block, "head", kept.heads, block.heads)
    if kept.dims is None:
        return
    if block.rotary:
        raise StructureError(
            f"positions turn the dimensions of {block.name!r} in pairs, so only whole heads can go"
        )
    count = block.heads if kept.heads is None else len(kept.heads)
    if len(kept.dims) != count:
        raise StructureError(
            f"{block.name!r} keeps {count} heads, but has dims of {len(kept.dims)}"
        )
    for dims in kept.dims:
        _check_range(block, "dimension", dims, block.head_dim)


def size_of(block: Block, kept: Kept) -> tuple[int, int]:
    """Number and size of the heads that are kept; of a feed-forward block (units, 1)."""
    if not isinstance(block, Attention):
        return (block.width if kept.units is None else len(kept.units)), 1
    heads = block.heads if kept.heads is None else len(kept.heads)
    return heads, block.head_dim if kept.dims is None else len(kept.dims[0])


def rows_kept(block: Block, kept: Kept) -> torch.Tensor:
    """Rows of the inner layers, which are columns of the output, that are kept; int64, ascending.

    Row `h * head_dim + d` is dimension `d` of head `h`.
    """
    if not isinstance(block, Attention):
        units = range(block.width) if kept.units is None else kept.units
        return torch.tensor(units, device="cpu")
    heads = range(block.heads) if kept.heads is None else kept.heads
    dims = [range(block.head_dim)] * len(heads) if kept.dims is None else kept.dims
    return torch.tensor(
        [
            head * block.head_dim + dim
            for head, each in zip(heads, dims, strict=True)
            for dim in each
        ],
        device="cpu",
    )


def rows_removed(block: Block, kept: Kept) -> torch.Tensor:
    """The other rows; int64, ascending."""
    removed = torch.ones(block.width, dtype=torch.bool, device="cpu")
    removed[rows_kept(block, kept)] = False
    return removed.nonzero().flatten()


def _check_range(block: Block, what: str, indices: tuple[int, ...] | None, count: int) -> None:
    if indices is not None and indices[-1] >= count:
        raise StructureError(
            f"{block.name!r} has no {what} {indices[-1]}, only {count}; is the record in "
            "coordinates of this model, and not of one that was larger?"
        )
