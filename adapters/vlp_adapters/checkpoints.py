"""Checkpoint files and folders: read without running code in them, recognised cheaply, written."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlp_plugins.models.adapter import OriginalPart
from vlp_plugins.models.architecture import bounded
from vlp_plugins.runtime.artifacts import load_pickled
from vlp_plugins.runtime.errors import UnsupportedError, VlpError, first_line
from vlp_plugins.runtime.files import atomic_file

_PICKLED = frozenset({".pth", ".pt", ".bin", ".th"})
_STATE_KEYS = ("model", "state_dict", "teacher")
"""Where training files keep the state: BLIP and X-VLM; open_clip; DINO, whose teacher is used."""


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the tensors of a `.safetensors` or PyTorch file; code in a file is never run.

    A PyTorch file may hold the state itself, or have it under `model`, `state_dict` or `teacher`.
    The prefix `module.` of distributed training is taken off.

    Raises:
        UnsupportedError: if the file is missing, damaged, or holds anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UnsupportedError(f"{path} is not a file; give a checkpoint")
    reject_torchscript(path)
    try:
        if path.suffix == ".safetensors":
            return _bare(load_file(path))
        content = _open(path, mmap=False)
    except pickle.UnpicklingError as error:
        raise UnsupportedError(
            f"{path} was not read: it holds objects other than tensors, which could run code, or "
            "it is no PyTorch file; save the bare state_dict and try again"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UnsupportedError(f"{path} is damaged or no checkpoint: {error}") from error
    state = _state_in(content)
    if not state:
        places = ", ".join(map(repr, _STATE_KEYS))
        raise UnsupportedError(f"{path} holds no state_dict, neither bare nor under {places}")
    if wrong := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UnsupportedError(f"{path} holds no state_dict: {few(wrong)} is not a tensor")
    return _bare(state)


def options_of(
    path: str | os.PathLike[str], known: Collection[str], given: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """What shapes do not tell of a checkpoint, such as the number of heads.

    It is said by keywords of the loader, else in a file next to the checkpoint: for `model.pth` it
    is `model.json`, an object with such keywords: `{"vision_heads": 3, "text_heads": 2}`.

    Args:
        path: the checkpoint.
        known: keywords that its loader takes.
        given: keywords that it was called with.
        config: that it was called with, which says all of this; None without one.

    Returns:
        Keywords, without those that are None.

    Raises:
        UnsupportedError: if a keyword is none that the loader takes, or comes with a configuration,
            or the file is no such object.
    """
    if unknown := sorted(given.keys() - set(known)):
        raise UnsupportedError(
            f"{unknown[0]!r} is no option of load_original; it takes {', '.join(known)}"
        )
    given = {name: value for name, value in given.items() if value is not None}
    if config is None:
        return {n: v for n, v in _options_beside(path, known).items() if v is not None} | given
    if given:
        raise UnsupportedError(
            f"{', '.join(given)}: the configuration that is given says this; set it there, or give "
            "the options without a configuration"
        )
    return {}


def _options_beside(path: str | os.PathLike[str], known: Collection[str]) -> dict[str, Any]:
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        options = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{beside} is damaged: {first_line(error)}") from error
    if not isinstance(options, dict):
        raise UnsupportedError(f"{beside} is no JSON object with keywords ({', '.join(known)})")
    if unknown := sorted(options.keys() - set(known)):
        raise UnsupportedError(
            f"{beside} has {few(unknown)}, which the loader of {Path(path).name} does not take; it "
            f"takes {', '.join(known)}"
        )
    return options


def joined(
    state: Mapping[str, Tensor], place_of: Callable[[str], OriginalPart]
) -> dict[str, Tensor]:
    """Tensors by original names, on the CPU; parts of one tensor are put below each other.

    Args:
        state: tensors by our names.
        place_of: see `Adapter.original_part`.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        place = place_of(name)
        parts.setdefault(place.name, {})[place.part] = value.cpu()
    return {
        name: rows[0] if len(rows) == 1 else torch.cat([rows[part] for part in sorted(rows)])
        for name, rows in parts.items()
    }


def write_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], key: str | None = "model"
) -> None:
    """Writes tensors as `{key: state}` or bare, or as `.safetensors` if the path ends so.

    An existing file is replaced once the new one is whole.

    Args:
        state: tensors by original name.
        path: the file.
        key: under which the original's loader looks; None for the bare state.
    """
    # A clone: tied tensors share memory, which safetensors refuses and the original does not need.
    state = {name: tensor.clone() for name, tensor in state.items()}
    with atomic_file(path, overwrite=True) as temporary:
        if temporary.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save(state if key is None else {key: state}, temporary)


def fill_ties(
    path: str | os.PathLike[str],
    state: dict[str, Tensor],
    ties: Mapping[str, str],
    family: str,
    original: Callable[[str], str],
) -> None:
    """Adds the missing names of shared tensors in place; the arguments are those of `check_fit`.

    Raises:
        UnsupportedError: if two names of one tensor have other values.
    """
    for copy, source in ties.items():
        given = [state[name] for name in (source, copy) if name in state]
        if len({tensor.shape for tensor in given}) > 1:
            continue  # `check_fit` names the sizes
        if given and not torch.equal(given[0], given[-1]):
            raise UnsupportedError(
                f"{path}: {original(copy)} differs from {original(source)}, but they are one "
                f"parameter in {family}: it is another model, where they were trained apart"
            )
        if given:
            state[copy] = state[source] = given[0]


def check_fit(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    family: str,
    original: Callable[[str], str],
) -> None:
    """Checks that what was read from `path` is the state of a model of `family`.

    Args:
        path: for messages.
        state: what was read, by our names.
        expected: the state of a model of the configuration.
        family: how errors call the model, as in "BLIP pre-training".
        original: our name of a parameter to that in the file.

    Raises:
        UnsupportedError: naming what is missing, unknown or of another shape.
    """
    # As sets, because several of ours may be one in the file.
    lacking = sorted({original(name) for name in expected.keys() - state.keys()})
    surplus = sorted({original(name) for name in state.keys() - expected.keys()})
    for verb, names in (("lacks", lacking), ("has, unknown to the model,", surplus)):
        if names:
            raise UnsupportedError(
                f"{path} {verb} {len(names)} parameter(s) ({few(names)}); it is not a checkpoint "
                f"of this {family} model"
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UnsupportedError(
                f"{path}: {original(name)} is {list(tensor.shape)}, the configuration asks for "
                f"{list(expected[name].shape)}; give the configuration of this checkpoint"
            )


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors of a checkpoint file, without the values; empty for any other file.

    Raises:
        UnsupportedError: if its tensors would take much more memory than it has bytes.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        if path.suffix not in _PICKLED or not path.is_file() or is_torchscript(path):
            return set()
        content = _open(path)
    except (UnsupportedError, MemoryError):
        raise
    # The unpickler fails in many ways on files that are not ours; whoever owns the file reports.
    except Exception:
        return set()
    return {str(name).removeprefix("module.") for name in _state_in(content)}


def is_torchscript(path: Path) -> bool:
    """True for a TorchScript archive, which holds a program."""
    if path.suffix not in _PICKLED or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:  # whoever reads it says so
        return False


def reject_torchscript(path: Path) -> None:
    """Checks that a file is not a TorchScript archive: a program, whose tensors need it to be run.

    Raises:
        UnsupportedError: if it is one; says how to convert it.
    """
    if is_torchscript(path):
        raise UnsupportedError(
            f"{path} is a TorchScript archive (OpenAI publishes CLIP as such): a program, which is "
            "not run here; if you trust it, convert it once: torch.save(torch.jit.load("
            f"{path.name!r}, map_location='cpu').state_dict(), {path.with_suffix('.pth').name!r})"
        )


def load_saved(path: Path, classes: Mapping[str, str], family: str) -> nn.Module | None:
    """Loads what `save_pretrained` wrote of a class of ours, in evaluation mode.

    Args:
        path: a folder, or anything else.
        classes: by the model type that `config.json` names `module.Class` in this package.
        family: how errors call the model.

    Returns:
        None if the path is no folder of such a class.

    Raises:
        UnsupportedError: if it is damaged or lacks parameters.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in classes:
        return None
    module, _, name = classes[kind].rpartition(".")
    model_class: Any = getattr(import_module(f"vlp_adapters.{module}"), name)
    try:
        with bounded(path):
            model, report = model_class.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False
            )
    except (VlpError, MemoryError):
        raise
    except Exception as error:  # configurations and files raise what their parsers raise
        raise UnsupportedError(
            f"cannot load the {family} model in {path}: {first_line(error)}"
        ) from error
    # transformers draws what a file lacks anew and only warns.
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedError(
            f"the {family} model in {path} lacks {len(missing)} parameter(s), first {missing[0]}; "
            "save it again with save_pretrained"
        )
    loaded: nn.Module = model.eval()
    return loaded


def few(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _state_in(content: object) -> Mapping[Any, Any]:
    """The state that a file holds, bare or under the key of a training file; empty if none."""
    if not isinstance(content, Mapping):
        return {}
    state = next((content[key] for key in _STATE_KEYS if key in content), content)
    return state if isinstance(state, Mapping) else {}


def _bare(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _open(path: Path, *, mmap: bool = True) -> object:
    """What a PyTorch file holds, with the arguments of argparse that training scripts add to it."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # holds values, runs nothing
        try:
            return load_pickled(path, UnsupportedError, mmap=mmap)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            if not mmap:
                raise
            return load_pickled(path, UnsupportedError)
