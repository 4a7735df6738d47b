"""A folder with a structurally pruned model: configuration, record of the cut, values.

`config.json` describes the uncut model, `vlp_structure.json` what was kept of it, and one
safetensors file has the values. Its name is not that of transformers, so that it is never loaded
into the uncut model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.architecture import fill, meta_model, unfilled_model
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import MODULE, ModuleAdapter
from vlp_plugins.models.saving import copy_companions, write_configuration
from vlp_plugins.runtime.artifacts import Format, made_by, read_artifact, versions, write_artifact
from vlp_plugins.runtime.errors import StructureError, UnsupportedError, first_line, shown
from vlp_plugins.runtime.files import atomic_folder, write_text
from vlp_plugins.runtime.model_state import neutral_state, takes_model
from vlp_plugins.runtime.untrusted import read_as
from vlp_plugins.structured.cuts import fitting, prepare, shrink
from vlp_plugins.structured.record import Record

SCHEMA = 1
STRUCTURE_FILE = "vlp_structure.json"
WEIGHTS_FILE = "vlp_structured.safetensors"
WEIGHTS = Format(
    "weights of a structurally pruned model",
    "vlp_structured",
    SCHEMA,
    StructureError,
    "copy the whole folder again, or prune and save again",
)


@dataclass(frozen=True, slots=True)
class Structure:
    """What `vlp_structure.json` says.

    Attributes:
        record: what was kept, in coordinates of the model of the configuration.
        history: how it came about; anything that JSON can keep.
    """

    model: str
    adapter: str
    settings: dict[str, Any]
    record: Record
    history: Any = None

    def digest(self, folder: Path) -> str:
        """Hash of all that gives the values their meaning: this, and `config.json`.

        The file of values carries it, because a record or a configuration of other heads may fit
        the same shapes.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        means = [self.model, self.adapter, self.settings, self.record.to_json(), config]
        return hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()


def is_structured(folder: str | os.PathLike[str]) -> bool:
    """True for a folder that `save_structured` wrote."""
    return (Path(folder) / STRUCTURE_FILE).is_file()


def read_record(folder: str | os.PathLike[str]) -> Record:
    """What was kept of the model in a folder; see `read_structure`."""
    return read_structure(folder).record


def read_structure(folder: str | os.PathLike[str]) -> Structure:
    """Reads `vlp_structure.json`.

    Raises:
        StructureError: if it is missing, damaged, or newer than this version.
    """
    path = Path(folder) / STRUCTURE_FILE
    if not path.is_file():
        raise StructureError(
            f"{folder} has no {STRUCTURE_FILE}: it is not a folder of save_structured; load other "
            "models with load_model"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = read_as(int, data["schema"], "schema")
        if schema < 1:
            raise ValueError(f"schema {schema}")
        if schema <= SCHEMA:
            texts = data["model"], data["adapter"]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"model and adapter should be names, are {shown(texts)}")
            model, adapter = texts
            settings = read_as(dict[str, Any], data["settings"], "settings")
            record = Record(Record.from_json(data["record"]), adapter)
            return Structure(model, adapter, settings, record, data["history"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise StructureError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {WEIGHTS.remedy}"
        ) from error
    raise StructureError(
        f"{path} has format {schema}, newer than the {SCHEMA} that this version reads; it was made "
        f"by {data.get('made_by')!s:.80}: upgrade vlp-plugins"
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, persistent or not, each once under its first name."""
    return {name: p.detach() for name, p in [*model.named_parameters(), *model.named_buffers()]}


def _candidates(name: str) -> list[Adapter]:
    """The adapter of that name; for that of any module, all, as any may know the model's class."""
    known = registry()
    names = known.adapter_names() if name == MODULE else [name]
    return [known.adapter(each) for each in names]


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
    model = unfilled_model(str(folder), _candidates(structure.adapter))
    adapter = _cut(model, structure)
    tensors, header = read_artifact(folder / WEIGHTS_FILE, WEIGHTS)
    _check_shapes(model, tensors, str(folder / WEIGHTS_FILE))
    fill(model, tensors.items())
    if header.get("structure") != structure.digest(folder):
        raise StructureError(
            f"{folder / WEIGHTS_FILE} was written with another {STRUCTURE_FILE} or config.json "
            f"than lie next to it; {WEIGHTS.remedy}"
        )
    return model.eval(), adapter


def _cut(model: nn.Module, structure: Structure) -> Adapter:
    """Gives an uncut model the sizes of the cut one; its values mean nothing yet."""
    if type(model).__name__ != structure.model:
        raise UnsupportedError(
            f"the configuration makes a {type(model).__name__}, but the pruned model is a "
            f"{structure.model}; only classes of transformers and of installed adapters can be "
            "made again"
        )
    adapter = _adapter_for(model, structure)
    prepare(model, adapter)
    for block, kept in fitting(model, adapter, structure.record):
        shrink(model, block, kept, rescale=False)
    return adapter


def _adapter_for(model: nn.Module, structure: Structure) -> Adapter:
    if structure.adapter != MODULE:
        return registry().adapter(structure.adapter)
    try:
        return ModuleAdapter(model, **structure.settings)
    except TypeError as error:
        raise UnsupportedError(
            f"no ModuleAdapter has these settings ({error}); {WEIGHTS.remedy}"
        ) from error


def _check_shapes(made: nn.Module, found: Mapping[str, Tensor], what: str) -> None:
    """Checks that these are the tensors of a model made from configuration and record."""
    wanted = {name: tuple(tensor.shape) for name, tensor in state_of(made).items()}
    # Buffers that the configuration alone decides: other versions of the model may have others.
    optional = {name for name, _ in made.named_buffers()} - set(made.state_dict())
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


@takes_model
def save_structured(
    model: nn.Module,
    folder: str | os.PathLike[str],
    record: Record,
    *,
    adapter: Adapter | None = None,
    source: str | None = None,
    history: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a cut model so that `rebuild` can load it. The folder appears whole or not at all.

    Args:
        model: of transformers or of ours, cut by `record`.
        folder: a new one, or an earlier one of this function.
        record: all that was kept, in coordinates of the model of its configuration: of several
            steps their `Record.compose`.
        adapter: of the model; None takes the one that claims it.
        source: where the uncut model came from, whose tokenizer and processor files are copied;
            None: where it was loaded from, as far as the model says.
        history: how the record came about, for the reader; anything that JSON can keep.
        overwrite: replace a folder that this function wrote; no other is ever replaced.

    Raises:
        StructureError: if the record does not lead from the configuration to this model.
        UnsupportedError: if the model has no configuration, or one that makes another class.
        UnclaimedModelError: without an adapter, if none claims the model.
        OutputError: if the folder exists and is not to be replaced, or cannot be written.
    """
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise UnsupportedError(
            f"{type(model).__name__} has no configuration of transformers to rebuild it from; "
            "save the record (Record.to_json) and the state in your own code"
        )
    adapter = adapter or registry().adapter_for(model)
    structure = Structure(
        type(model).__name__, adapter.name, adapter.settings(), Record(record), history
    )
    with atomic_folder(folder, mark=STRUCTURE_FILE, overwrite=overwrite) as temporary:
        write_configuration(model, temporary)
        made = meta_model(str(temporary), _candidates(structure.adapter))
        _cut(made, structure)
        _check_shapes(made, state_of(model), "the model")
        content = {
            "schema": SCHEMA,
            "made_by": made_by(),
            "versions": versions(),
            "model": structure.model,
            "adapter": structure.adapter,
            "settings": structure.settings,
            "record": structure.record.to_json(),
            "history": structure.history,
        }
        write_text(temporary / STRUCTURE_FILE, json.dumps(content) + "\n")
        header = {"structure": structure.digest(temporary)}
        write_artifact(temporary / WEIGHTS_FILE, WEIGHTS, state_of(model), header)
        copy_companions(source or getattr(model, "name_or_path", None) or None, temporary)
