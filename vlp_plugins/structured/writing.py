"""Writes a structurally pruned model as a folder from which it can be made anew."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.saving import copy_companions
from vlp_plugins.runtime.artifacts import write_artifact
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.files import WEIGHTS, WEIGHTS_FILE, Structure, state_of, write_structure
from vlp_plugins.structured.rebuilding import check_leads_to
from vlp_plugins.structured.recalled import adapter_of
from vlp_plugins.structured.record import Record


@takes_model
def save_structured(
    model: nn.Module,
    folder: str | os.PathLike[str],
    record: Record,
    *,
    adapter: Adapter | None = None,
    source: str | None = None,
    history: Any = None,
) -> None:
    """Writes a cut model so that `rebuild` makes it anew. The folder appears whole or not at all.

    Args:
        model: of transformers or of ours, cut by `record`.
        folder: a new one.
        record: all that was kept, in coordinates of the model of its configuration: of several
            steps their `Record.compose`.
        adapter: of the model; None asks all.
        source: where the uncut model came from; its tokenizer and processor files are copied.
        history: how the record came about, for the reader; anything that JSON can keep.

    Raises:
        StructureError: if the record does not lead from the configuration to this model.
        UnsupportedError: if the model has no configuration, or one that makes another class.
        UnclaimedModelError: without an adapter, if none claims the model.
        OutputError: if the folder exists or cannot be written.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise UnsupportedError(
            f"{type(model).__name__} has no configuration of transformers to make it anew from; "
            "save the record (Record.to_json) and the state in your own code"
        )
    adapter = adapter or adapter_of(model)
    structure = Structure(
        type(model).__name__, adapter.name, adapter.settings(), Record(record), history
    )
    with atomic_folder(folder) as temporary:
        dense = deepcopy(config)
        dense.architectures = [structure.model]
        dense.save_pretrained(temporary)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(temporary)
        check_leads_to(temporary, structure, model)
        write_structure(temporary, structure)
        header = {"structure": structure.digest(temporary)}
        write_artifact(temporary / WEIGHTS_FILE, WEIGHTS, state_of(model), header)
        copy_companions(source, temporary)
