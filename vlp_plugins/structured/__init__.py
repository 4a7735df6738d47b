"""Structured pruning without a host: heads, their dimensions and feed-forward units are cut out.

    prepare(model, adapter)
    cut(model, adapter, Record({"vision.0.attention": Kept(heads=(0, 2)), ...}))
    save_structured(model, folder, record)

Whoever chooses what to keep (Torch-Pruning, a method of one's own) says so by a `Record`. Only the
inner width of blocks changes, never the stream between them, so any layer can be cut by itself.
"""

from vlp_plugins.structured.checking import check_equal, outputs, relative_error
from vlp_plugins.structured.cutting import cut, prepare
from vlp_plugins.structured.files import is_structured, read_record
from vlp_plugins.structured.finding import blocks_of, uncut
from vlp_plugins.structured.made_up import example_batch
from vlp_plugins.structured.masking import masked
from vlp_plugins.structured.patching import patch
from vlp_plugins.structured.rebuilding import rebuild
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.transferring import transferred
from vlp_plugins.structured.writing import save_structured

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
