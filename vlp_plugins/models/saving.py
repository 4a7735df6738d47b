"""Writes a model folder whole or not at all, with what is needed to load it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.models.places import filled_state
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import write_json
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.runtime.offload import is_offloaded

REBUILT = "vlp_rebuilt"
"""Attribute of a model that is true once its layers are not those that its configuration makes."""

ORIGIN_FILE = "vlp_pruned.json"
"""In the folder of a model that masks were applied to: which, and to what."""

_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "video_preprocessor_config.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
)


@takes_model
def save_model(
    model: nn.Module,
    target: Path,
    *,
    source: str | None = None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model of transformers or of ours with `save_pretrained`; ties are kept.

    Tokenizer and processor files of the model's source are copied. `origin` says in `ORIGIN_FILE`
    what was done to it; only folders with that file are overwritten.

    Raises:
        UnsupportedError: if the model cannot save itself.
        OutputError: if the folder exists or cannot be written.
    """
    check_can_save(model)
    with atomic_folder(target, mark=ORIGIN_FILE, overwrite=overwrite) as folder:
        write_model(model, folder, source=source)
        if origin is not None:
            write_json(folder / ORIGIN_FILE, "pruned model", origin)


@takes_model
def check_can_save(model: nn.Module) -> None:
    """Raises `UnsupportedError` if the model has no `save_pretrained`, or was rebuilt."""
    check_not_rebuilt(model)
    if not hasattr(model, "save_pretrained"):
        raise UnsupportedError(
            f"{type(model).__name__} has no save_pretrained; apply the masks in your own code: "
            "Masks.load(file).apply(model)"
        )


@takes_model
def check_not_rebuilt(model: nn.Module) -> None:
    """Raises `UnsupportedError` for a model with heads or units cut out, or projections split.

    `save_pretrained` writes a folder of it that cannot be loaded, or is loaded with random weights.
    """
    if getattr(model, REBUILT, False):
        raise UnsupportedError(
            f"this {type(model).__name__} has heads or units cut out, or projections split, which "
            "its configuration cannot say; save it with "
            "vlp_plugins.structured.save_structured(model, folder, record)"
        )


@takes_model
def write_model(model: nn.Module, folder: Path, *, source: str | None = None) -> None:
    """`save_model` into a folder that is itself part of something atomic."""
    check_can_save(model)
    save: Any = model.save_pretrained
    if is_offloaded(model):  # transformers would look for some of it in the wrong hook
        save(folder, state_dict=filled_state(model))
    else:
        save(folder)
    config = folder / "config.json"
    for weights in folder.glob("*.safetensors"):  # safetensors makes them private
        shutil.copymode(config, weights)
    copy_companions(source, folder)


@takes_model
def write_configuration(model: nn.Module, folder: Path, **changed: Any) -> None:
    """Writes the configuration that makes the model's class, some entries changed."""
    config: Any = deepcopy(model.config)
    for name, value in {"architectures": [type(model).__name__], **changed}.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def copy_companions(source: str | None, folder: Path) -> None:
    """Copies the tokenizer and processor files of a model on this machine into a folder."""
    if source is None or not (origin := Path(source)).exists():
        return  # a hub id: its processor is found by that id
    home = origin if origin.is_dir() else origin.parent
    for path in (path for pattern in _COMPANIONS for path in home.glob(pattern)):
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    for path in home.glob("*_tokenizer/tokenizer*"):  # a second one, as InstructBLIP has
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy2(path, folder / path.parent.name / path.name)


@contextmanager
def restored(weights: WeightMap) -> Iterator[None]:
    """Gives prunable weights back the values that they had before the block; see `Weight.kept`."""
    restores = [weight.kept() for weight in weights.values()]
    try:
        yield
    finally:
        for restore in restores:
            restore()
