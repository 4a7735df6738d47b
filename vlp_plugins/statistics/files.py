"""The file that statistics and checkpoints are kept in: safetensors, a JSON header, a checksum.

safetensors holds nothing but numbers and text: reading a file of unknown origin executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import vlp_plugins
from vlp_plugins.atomic import write_bytes
from vlp_plugins.errors import StatisticsError

SCHEMA = 1
"""Version of the format; a change that old code cannot read adds 1."""


def write(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    """Writes a file whole or not at all; a file that is there is replaced.

    Args:
        path: the file.
        kind: what it holds, `statistics` or `checkpoint`.
        tensors: on CPU, by name.
        header: what JSON can say.

    Raises:
        OutputError: if it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    made = {
        **header,
        "schema": SCHEMA,
        "made_by": f"vlp_plugins {vlp_plugins.__version__}",
        "versions": _versions(),
        "checksum": _checksum(tensors),
    }
    data = save(tensors, metadata={_key(kind): json.dumps(made)})
    write_bytes(path, data, overwrite=True)


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
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(f"{path} is no file; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_key(kind))
            if text is None:
                raise StatisticsError(f"{path} is no {kind} file of vlp-plugins; {remedy}")
            header = json.loads(text)
            if header["schema"] > SCHEMA:
                raise StatisticsError(
                    f"{path} has format {header['schema']}, newer than the {SCHEMA} that this "
                    f"version reads; it was made by {header.get('made_by')}: upgrade vlp-plugins"
                )
            # Cloned, because the tensors of an open file are a view of its pages on the disk.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if header["checksum"] != _checksum(tensors):
            raise ValueError("the checksum differs")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StatisticsError(
            f"{path} is damaged, truncated or no {kind} file "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return tensors, header


def _key(kind: str) -> str:
    return f"vlp_{kind}"


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}|{tensors[name].dtype}|{list(tensors[name].shape)}|".encode())
        data = tensors[name].reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("vlp-plugins", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
