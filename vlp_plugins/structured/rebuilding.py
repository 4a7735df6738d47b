"""Makes a structurally pruned model anew: configuration, record, values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.architecture import meta_model, unfilled_model
from vlp_plugins.runtime.artifacts import read_artifact
from vlp_plugins.runtime.errors import StructureError, UnsupportedError
from vlp_plugins.runtime.model_state import neutral_state
from vlp_plugins.structured.cutting import prepare, shrink
from vlp_plugins.structured.files import (
    STRUCTURE_FILE,
    WEIGHTS,
    WEIGHTS_FILE,
    Structure,
    read_structure,
    state_of,
)
from vlp_plugins.structured.indices import fitting
from vlp_plugins.structured.recalled import candidates, recalled


@neutral_state()
def rebuild(folder: str | os.PathLike[str]) -> tuple[nn.Module, Adapter]:
    """Loads what `save_structured` wrote, on the CPU and in evaluation mode.

    Nothing in the folder is executed, and no host is needed. Ties are those of the uncut model.

    Raises:
        StructureError: if a file is missing, damaged, newer than this version, or of another model,
            or if configuration or record were changed.
        UnsupportedError: if the configuration is damaged or of an unknown model.
        UnknownNameError: if its adapter is not installed.
    """
    folder = Path(folder)
    structure = read_structure(folder)
    model = unfilled_model(str(folder), candidates(structure.adapter))
    adapter = _cut(model, structure)
    tensors, header = read_artifact(folder / WEIGHTS_FILE, WEIGHTS)
    _fill(model, tensors, folder / WEIGHTS_FILE)
    if header.get("structure") != structure.digest(folder):
        raise StructureError(
            f"{folder / WEIGHTS_FILE} was written with another {STRUCTURE_FILE} or config.json "
            f"than lie beside it; {WEIGHTS.remedy}"
        )
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        owner: Any = model
        owner.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    return model.eval(), adapter


def check_leads_to(folder: Path, structure: Structure, model: nn.Module) -> None:
    """Checks that configuration and record make a model of the shapes of this one.

    Raises:
        StructureError: if they do not.
        UnsupportedError: if the configuration makes no such model.
    """
    made = meta_model(str(folder), candidates(structure.adapter))
    _cut(made, structure)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(made).items()}
    _check_shapes(shapes, state_of(model), "the model", _optional(made))


def _cut(model: nn.Module, structure: Structure) -> Adapter:
    """Gives an uncut model the sizes of the cut one; its values mean nothing yet."""
    if type(model).__name__ != structure.model:
        raise UnsupportedError(
            f"the configuration makes a {type(model).__name__}, but the pruned model is a "
            f"{structure.model}; only classes of transformers and of installed adapters can be "
            "made anew"
        )
    adapter = recalled(model, structure.adapter, structure.settings)
    prepare(model, adapter)
    for block, kept in fitting(model, adapter, structure.record):
        shrink(model, block, kept, rescale=False)
    return adapter


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Puts values in place of those that were never set; tied parameters stay one object."""
    own = state_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    _check_shapes(shapes, tensors, str(path), _optional(model))
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].data = tensor
        elif name in own:
            module, _, buffer = name.rpartition(".")
            model.get_submodule(module)._buffers[buffer] = tensor


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    what: str,
    optional: set[str],
) -> None:
    lacking = sorted(wanted.keys() - found.keys() - optional)
    surplus = sorted(found.keys() - wanted.keys())
    for verb, names in (("lacks", lacking), ("has, unknown to its configuration,", surplus)):
        if names:
            raise StructureError(
                f"{what} {verb} {len(names)} tensors, first {names[0]}; it is not what "
                "configuration and record describe"
            )
    for name, shape in wanted.items():
        if name in found and tuple(found[name].shape) != shape:
            raise StructureError(
                f"{what}: {name} is {list(found[name].shape)}, but configuration and record make "
                f"it {list(shape)}; of several cuts, the record is that of all: Record.compose"
            )


def _optional(model: nn.Module) -> set[str]:
    """Buffers that the configuration alone decides: other versions may have others."""
    return {name for name, _ in model.named_buffers()} - set(model.state_dict())
