"""Writes a model folder whole or not at all, with what is needed to load it again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from vlp_plugins.models.places import filled_state
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import stored_tensors, tensor_bytes
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.files import check_space
from vlp_plugins.runtime.mapped import places, release, untouched
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.runtime.offload import is_offloaded

REBUILT = "vlp_rebuilt"
"""Attribute of a model that is true once its layers are not those that its configuration makes."""

ORIGIN_FILE = "vlp_pruned.json"
"""In the folder of a model that masks were applied to: which, and to what."""

_CHUNK = 2**24

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
def check_can_save(model: nn.Module, target: Path | None = None) -> None:
    """Asks before the work whether `write_model` could write a model.

    Args:
        model: to be saved.
        target: a folder in a place with room for it; None: that is not asked.

    Raises:
        UnsupportedError: if the model has no `save_pretrained`, or was rebuilt.
        OutputError: if the disk is too small.
    """
    check_not_rebuilt(model)
    if target is not None:
        check_space(target, sum(each.nbytes for each in model.parameters()))
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
    """Saves a model of transformers or of ours with `save_pretrained`; ties are kept.

    Tokenizer and processor files of the model's source are copied. The folder is part of something
    atomic.

    Raises:
        UnsupportedError: if the model cannot save itself.
    """
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


@dataclass(frozen=True)
class Shards:
    """The safetensors files that all values of a model are views of.

    Attributes:
        files: of the model.
        places: by path of a parameter or buffer its file, and the first byte in there.
    """

    files: tuple[Path, ...]
    places: Mapping[str, tuple[Path, int]]

    @classmethod
    def of(cls, model: nn.Module, source: str | None) -> Shards | None:
        """Those of the folder that a model was loaded from; None if it holds values of its own."""
        home = _folder_of(source)
        if home is None:
            return None
        files = {os.path.realpath(path): path for path in home.glob("*.safetensors")}
        tensors, found = _saved_tensors(model), {}
        stored = {path: stored_tensors(path) for path in files.values()}
        for (name, tensor), place in zip(tensors.items(), places(tensors.values()), strict=True):
            file = None if place is None else files.get(place.file)
            if place is None or file is None or not tensor.is_contiguous():
                return None
            if stored[file].get(place.begin) != (tensor.dtype, tensor.nbytes):
                return None
            found[name] = file, place.begin
        return cls(tuple(dict.fromkeys(file for file, _ in found.values())), found)

    def write(self, model: nn.Module, folder: Path, values: Mapping[str, torch.Tensor]) -> None:
        """Writes the files of a model again, one tensor after the other.

        Args:
            model: that they are of; what was written into it is not left out.
            folder: gets files of the same names, their index, the configuration and the rest.
            values: by path, in place of those of the model; each is asked for once.
        """
        parts: dict[Path, dict[int, str]] = {path: {} for path in self.files}
        own = _saved_tensors(model)
        clean = dict(zip(own, untouched(own.values()), strict=True))
        for name, (path, begin) in self.places.items():
            if name in values or (not clean[name] and begin not in parts[path]):
                parts[path][begin] = name
        for path, changed in parts.items():
            with path.open("rb") as file, (folder / path.name).open("wb") as copy:
                for begin, name in sorted(changed.items()):
                    _copy(file, copy, begin - file.tell())
                    new = values[name] if name in values else own[name]
                    copy.write(tensor_bytes(new.to(own[name].dtype)))
                    file.seek(own[name].nbytes, os.SEEK_CUR)
                    release((own[name],))
                _copy(file, copy, None)
            shutil.copymode(path, folder / path.name)
        home = self.files[0].parent
        for path in self._left_out(home):
            shutil.copy2(path, folder / path.name)
        for pattern in ("config.json", "generation_config.json", "*.safetensors.index.json"):
            for path in home.glob(pattern):
                shutil.copy2(path, folder / path.name)
        copy_companions(str(home), folder)

    def _left_out(self, home: Path) -> list[Path]:
        """Files that the index names, too, but whose tensors the model's class does not have."""
        own, named = {path.name for path in self.files}, set[str]()
        for index in home.glob("*.safetensors.index.json"):
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # it was not loaded by
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                named |= files if files & own else set()
        return [path for path in home.glob("*.safetensors") if path.name in named - own]


def _saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that belong into a checkpoint, by every path that reaches them."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".removeprefix(".")] = buffer
    return found


def _folder_of(source: str | None) -> Path | None:
    """The folder on this machine that a path or hub id names."""
    if not source:
        return None
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    try:
        file = cached_file(source, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if file is None else Path(file).parent


def _copy(file: BinaryIO, copy: BinaryIO, length: int | None) -> None:
    """Copies so many bytes from where a file is, or all that follow."""
    while length is None or length > 0:
        part = file.read(_CHUNK if length is None else min(_CHUNK, length))
        if not part:
            return
        copy.write(part)
        length = None if length is None else length - len(part)


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
