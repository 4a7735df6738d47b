"""A folder with a model whose sizes its configuration cannot say.

`config.json` describes the uncut model, `vlp_structure.json` what was kept of it, and one
safetensors file has the values. Its name is not that of transformers, so that nobody loads it
into the uncut model.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlp_plugins.runtime.artifacts import Format, made_by, versions
from vlp_plugins.runtime.errors import StructureError, first_line
from vlp_plugins.runtime.files import write_text
from vlp_plugins.structured.record import Record

SCHEMA = 1
STRUCTURE_FILE = "vlp_structure.json"
WEIGHTS_FILE = "vlp_structured.safetensors"
WEIGHTS = Format(
    "weights of a structurally pruned model",
    "vlp_structured",
    SCHEMA,
    StructureError,
    "copy the whole folder again, or prune and save anew",
)


@dataclass(frozen=True, slots=True)
class Structure:
    """What `vlp_structure.json` says.

    Attributes:
        model: name of the class.
        adapter: name of the adapter.
        settings: of the adapter.
        record: what was kept, in coordinates of the model of the configuration.
        history: how it came about; anything that JSON can keep.
    """

    model: str
    adapter: str
    settings: dict[str, Any]
    record: Record
    history: Any = None

    def digest(self, folder: Path) -> str:
        """Hash of what says what the values mean: model, adapter, record, and `config.json`.

        The values' file carries it, because a record or a configuration of other heads may fit the
        same shapes.
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
            f"{folder} has no {STRUCTURE_FILE}: it is no folder of save_structured; load other "
            "models with load_model"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
        if not isinstance(schema, int) or schema < 1:
            raise ValueError(f"schema {schema!r}")
        if schema <= SCHEMA:
            texts = (data["model"], data["adapter"])
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"model and adapter should be names, are {texts}")
            record = Record(Record.from_json(data["record"]), data["adapter"])
            return Structure(*texts, dict(data["settings"]), record, data["history"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise StructureError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {WEIGHTS.remedy}"
        ) from error
    raise StructureError(
        f"{path} has format {schema}, newer than the {SCHEMA} that this version reads; it was made "
        f"by {data.get('made_by')}: upgrade vlp-plugins"
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, persistent or not, each once under its first name."""
    return {name: p.detach() for name, p in [*model.named_parameters(), *model.named_buffers()]}


def write_structure(folder: Path, structure: Structure) -> None:
    """Writes `vlp_structure.json` into a folder that is not seen yet."""
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
    write_text(folder / STRUCTURE_FILE, json.dumps(content) + "\n")
