"""Loads a compact sparse checkpoint into a plain model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.architecture import unfilled_model
from vlp_plugins.models.discovery import recall_adapter, registry
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import bare, neutral_state
from vlp_plugins.sparse.files import SPARSE_FILE, Stored, read
from vlp_plugins.sparse.saving import check_whole, state_of


def is_sparse(folder: str | os.PathLike[str]) -> bool:
    """True for a folder that `save_sparse` wrote."""
    return (Path(folder) / SPARSE_FILE).is_file()


@neutral_state()
def load_sparse(
    folder: str | os.PathLike[str], *, into: nn.Module | None = None
) -> tuple[nn.Module, Adapter]:
    """Loads what `save_sparse` wrote.

    Args:
        folder: with the file and, without `into`, the configuration.
        into: a model of that structure to write the values into, in its dtype and on its device;
            it keeps its ties. None makes the model anew, on the CPU, in the dtypes of the file and
            in evaluation mode.

    Returns:
        The model, whose weights are plain dense ones, and the adapter it was saved with.

    Raises:
        UnsupportedError: if the file is missing, damaged, foreign or of a newer version, or of
            another model, which is unchanged then; or if the configuration does not make the model.
        UnclaimedModelError: if no installed adapter claims the model.
    """
    folder = Path(folder)
    stored = read(folder / SPARSE_FILE)
    if into is None:
        model = made_anew(folder, stored)
    else:
        model = bare(into)
        check_whole(model, "load into it before it is sharded, and after `to_empty`")
        _check_fits(model, stored, folder)
    adapter = recall_adapter(model, stored.header["adapter"], stored.header["settings"])
    if into is not None:
        _write_into(model, stored)
    return (model.eval() if into is None else into), adapter


def sparse_model(folder: str | os.PathLike[str]) -> nn.Module:
    """`load_sparse` without an adapter, for those who choose one themselves."""
    return made_anew(Path(folder), read(Path(folder) / SPARSE_FILE)).eval()


def made_anew(folder: Path, stored: Stored) -> nn.Module:
    """The model that the configuration describes, with the values of the file.

    Raises:
        UnsupportedError: if it is another model, or there is no configuration.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedError(
            f"{folder} has no config.json to make a {stored.header['model']} of; make the model "
            "yourself and give it: load_sparse(folder, into=model)"
        )
    model = unfilled_model(str(folder), _adapters())
    _check_fits(model, stored, folder)
    _fill(model, stored)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        owner: Any = model
        owner.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    return model


def _adapters() -> Iterable[Adapter]:
    known = registry()
    return [known.adapter(name) for name in known.adapter_names()]


def _check_fits(model: nn.Module, stored: Stored, folder: Path) -> None:
    """Raises `UnsupportedError` unless the model has exactly the tensors of the file."""
    wanted = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
    found = stored.shapes_of_all()
    kind = type(model).__name__
    other = f"it is of another model than this {kind}, or its ties are others"
    for verb, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has, which the model lacks,", found.keys() - wanted.keys()),
    ):
        if names:
            raise UnsupportedError(
                f"{folder / SPARSE_FILE} {verb} {len(names)} tensors, first {min(names)} "
                f"({stored.header['model']}); {other}"
            )
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise UnsupportedError(
                f"{folder / SPARSE_FILE}: {name} is {list(found[name])}, but {list(shape)} in the "
                f"{kind}; {other}"
            )


def _fill(model: nn.Module, stored: Stored) -> None:
    """Puts the tensors in place of those that were never set; tied parameters stay one object."""
    parameters = dict(model.named_parameters())
    for name in stored.shapes_of_all():
        if name in parameters:
            parameters[name].data = stored.dense(name)
        else:
            module, _, buffer = name.rpartition(".")
            model.get_submodule(module)._buffers[buffer] = stored.dense(name)


@torch.no_grad()
def _write_into(model: nn.Module, stored: Stored) -> None:
    for name, tensor in state_of(model).items():
        tensor.copy_(stored.dense(name))
