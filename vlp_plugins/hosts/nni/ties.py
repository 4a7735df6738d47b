"""Shared Parameters of a model: found before NNI touches it, and restored afterwards.

`SharingWrapper` keeps the ties of what our pruners prune. Another compressor on the same model
(`from_compressor`) may still break those of its own layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlp_plugins.runtime.errors import TieError


def ties_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of every Parameter that has several."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    return [tuple(paths) for paths in found.values() if len(paths) > 1]


def restore_ties(model: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Makes the Parameters of every group one object again.

    Raises:
        TieError: if they have different values by now.
    """
    for first, *others in ties:
        parameter = model.get_parameter(first)
        for path in others:
            other = model.get_parameter(path)
            if other is parameter:
                continue
            if other.shape != parameter.shape or not torch.equal(other, parameter):
                raise TieError(
                    f"{first} and {path} were one weight and have different values now: another "
                    "compressor has wrapped them before, which unties them; make the pruner of "
                    "vlp_plugins first and the other one from it"
                )
            module, _, name = path.rpartition(".")
            setattr(model.get_submodule(module), name, parameter)
