"""Writes a model folder whole or not at all, with what is needed to load it again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.atomic import atomic_folder
from vlp_plugins.errors import UnsupportedError

_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
)


def save_model(model: nn.Module, target: Path, *, source: str | None = None) -> None:
    """Saves with `save_pretrained`; ties are kept.

    Args:
        model: a transformers model or one of ours.
        target: a new folder.
        source: where the model came from; its tokenizer and processor files are copied.

    Raises:
        UnsupportedError: if the model cannot save itself.
        OutputError: if the folder exists or cannot be written.
    """
    with atomic_folder(target) as folder:
        write_model(model, folder, source=source)


def write_model(model: nn.Module, folder: Path, *, source: str | None = None) -> None:
    """`save_model` into a folder that is itself part of something atomic."""
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no save_pretrained; apply the masks in your own code: "
            "Masks.load(file).apply(model)"
        )
    save(folder)
    if source is not None and Path(source).is_dir():
        for pattern in _COMPANIONS:
            for path in Path(source).glob(pattern):
                shutil.copy2(path, folder / path.name)
