"""From what was kept of a pre-training model to what is kept of a downstream one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Block
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.finding import blocks_of
from vlp_plugins.structured.indices import check_fits
from vlp_plugins.structured.record import Kept, Record


@takes_model
def transferred(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> Record:
    """The part of a record that is about blocks of another model of the family.

    Blocks that the model lacks are left out. A block whose weights are copies of those of a block
    of the record (a decoder that began as the encoder) keeps what that one keeps.

    Args:
        model: prepared, not cut; a downstream model with weights of the pre-training model.
        adapter: of the model.
        record: in coordinates of the uncut pre-training model.

    Raises:
        StructureError: if nothing of the record is about this model, its blocks are smaller, or the
            record is of another adapter.
    """
    if isinstance(record, Record):
        record.check_adapter(adapter.name)
    origins = {weight.name: weight.copy_of for weight in WeightMap.of(model, adapter).values()}
    blocks = blocks_of(model, adapter)
    found = {}
    for block in blocks:
        name = block.name if block.name in record else _origin(block, origins)
        if name in record:
            check_fits(block, record[name])
            found[block.name] = record[name]
    if record and not found:
        raise StructureError(
            f"no block of the record ({', '.join(list(record)[:3])}, ...) is in "
            f"{type(model).__name__}, whose blocks are {', '.join(b.name for b in blocks[:3])}, ..."
        )
    return Record(found, adapter.name)


def _origin(block: Block, origins: Mapping[str, str | None]) -> str:
    """The name of the block that this one began as a copy of; its own if it began as none."""
    for part in block.parts:
        origin = origins.get(part.weight) if part.weight else None
        if part.weight and origin and part.weight.startswith(f"{block.name}."):
            return origin.removesuffix(part.weight.removeprefix(block.name))
    return block.name
