"""Structured pruning without a host: heads, their dimensions and feed-forward units are cut out.

    prepare(model, adapter)
    cut(model, adapter, Record({"vision.0.attention": Kept(heads=(0, 2)), ...}))
    save_structured(model, folder, record)

What to keep is chosen elsewhere (by Torch-Pruning, or your own method) and given as a `Record`.
Only the inner width of blocks changes, never the stream between them, so any layer can be cut by
itself.
"""

from vlp_plugins.structured.check import check_equal, example_batch, outputs, relative_error
from vlp_plugins.structured.cuts import cut, masked, patch, prepare, transferred
from vlp_plugins.structured.files import is_structured, read_record, rebuild, save_structured
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of, uncut

__all__ = [
    "Kept",
    "Record",
    "blocks_of",
    "check_equal",
    "cut",
    "example_batch",
    "is_structured",
    "masked",
    "outputs",
    "patch",
    "prepare",
    "read_record",
    "rebuild",
    "relative_error",
    "save_structured",
    "transferred",
    "uncut",
]
