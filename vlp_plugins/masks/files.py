"""Mask files: one safetensors file per mask set; `vlp_plugins.artifacts` says how it is built.

Every weight is a uint8 tensor under its canonical name, one bit per element in row-major order,
the most significant bit first. The header is the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vlp_plugins import artifacts
from vlp_plugins.atomic import check_new
from vlp_plugins.errors import MaskError
from vlp_plugins.masks.bits import count_ones, flaw
from vlp_plugins.masks.manifest import SCHEMA, Manifest

FORMAT = artifacts.Format("mask", "vlp_masks", SCHEMA, MaskError, "make or copy it again")


def write(
    path: str | os.PathLike[str],
    packed: Mapping[str, torch.Tensor],
    manifest: Manifest,
    *,
    overwrite: bool = False,
) -> None:
    """Writes packed masks and their manifest, whole or not at all.

    Raises:
        OutputError: if the file exists and is not to be overwritten, or cannot be written.
    """
    check_new(path, overwrite=overwrite)
    artifacts.write(path, FORMAT, packed, asdict(manifest), overwrite=overwrite)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Reads what `write` wrote and checks that bits and manifest agree.

    Returns:
        uint8 1-D bits by canonical name, and the manifest.

    Raises:
        MaskError: if the file is missing, damaged, foreign or of a newer version.
    """
    form = replace(FORMAT, remedy=f"{FORMAT.remedy}{_hint(Path(path))}")
    packed, header = artifacts.read(path, form)
    try:
        manifest = Manifest.from_header(header)
        _check(packed, manifest)
    except MaskError as error:
        raise MaskError(f"mask file {path} {error}; {form.remedy}") from error.__cause__
    return packed, manifest


def _check(packed: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Raises `MaskError` at the first weight whose bits are not what the manifest says."""
    for name in (*manifest.weights, *packed):
        if name not in packed:
            raise MaskError(f"is damaged: the mask of {name!r} is missing")
        if name not in manifest.weights:
            raise MaskError(f"is damaged: {name!r} is not in its manifest")
        bits, record = packed[name], manifest.weights[name]
        if found := flaw(bits, manifest.shape(name)):
            raise MaskError(f"is damaged: the mask of {name!r} {found}")
        kept = count_ones(bits)
        if kept != record["kept"]:
            raise MaskError(
                f"is damaged: {name!r} keeps {kept} elements, its manifest says {record['kept']}"
            )


def _hint(path: Path) -> str:
    if path.suffix in (".pth", ".pt", ".bin"):
        return "; `vlp masks import` reads published .pth files"
    return ""
