"""The file that statistics and checkpoints are kept in; `vlp_plugins.artifacts` says how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlp_plugins.runtime.artifacts import Format, is_of, read_artifact, write_artifact
from vlp_plugins.runtime.errors import StatisticsError
from vlp_plugins.statistics.base import Key, Site

SCHEMA = 1
"""Version of the format; a change that old code cannot read adds 1."""


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    """Writes a file whole or not at all.

    Statistics replace any file that is there; a checkpoint, to which a run gives its place,
    replaces checkpoints only.

    Args:
        path: the file.
        kind: what it holds, `statistics` or `checkpoint`.
        tensors: on CPU, by name.
        header: what JSON can say.

    Raises:
        OutputError: if it cannot be written.
    """
    state = kind == "checkpoint"
    write_artifact(path, _format(kind), tensors, header, overwrite=True, state=state)


def is_of(path: Path, kind: str) -> bool:
    """True for a regular file, and no link to one, that holds `kind`, whether damaged or not."""
    return is_of(path, _format(kind))


def read(
    path: str | os.PathLike[str], kind: str, remedy: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `write` wrote.

    Args:
        path: the file.
        kind: what it should hold.
        remedy: what the user should do if it is missing or damaged.

    Returns:
        Tensors by name, and the header.

    Raises:
        StatisticsError: if it is missing, damaged, truncated, of another kind or too new.
    """
    return read_artifact(path, _format(kind, remedy))


def pack_sums(sums: dict[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Accumulators by a text that `unpack_sums` reads."""
    return {f"{statistic}|{site}": tensor for (statistic, site), tensor in sums.items()}


def unpack_sums(tensors: dict[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Inverse of `pack_sums`, in sorted order.

    Raises:
        ValueError: if a name or tensor is none that `pack_sums` gives.
    """
    sums = {}
    for name in sorted(tensors):
        statistic, site = name.split("|", 1)
        tensor = tensors[name]
        if tensor.dtype != torch.float64 or tensor.ndim != 2 or len(tensor) != 2:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        sums[statistic, Site.parse(site)] = tensor
    return sums


def _format(kind: str, remedy: str = "") -> Format:
    return Format(kind, f"vlp_{kind}", SCHEMA, StatisticsError, remedy)
