"""Mask files: one safetensors file per mask set, built as `runtime.artifacts` says.

Every weight is a uint8 tensor under its canonical name, one bit per element in row-major order,
the most significant bit first. The header is the manifest. New values of the kept elements, if
there are any, are float32 tensors under `values:` and the name; such files have format 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlp_plugins.masks.apply import check_values
from vlp_plugins.masks.manifest import SCHEMA_WITH_VALUES, Manifest
from vlp_plugins.masks.packed import count_ones, flaw
from vlp_plugins.runtime.artifacts import Format, read_artifact, write_artifact
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.files import check_new

if TYPE_CHECKING:
    from vlp_plugins.masks.masks import Masks

FORMAT = Format("mask", "vlp_masks", SCHEMA_WITH_VALUES, MaskError, "make or copy it again")
_VALUES = "values:"


def write(path: str | os.PathLike[str], masks: Masks, *, overwrite: bool) -> None:
    """See `Masks.save`."""
    check_new(path, overwrite=overwrite)
    # Files without new values stay readable by versions that know none.
    form = replace(FORMAT, schema=masks.manifest.schema)
    values = {f"{_VALUES}{name}": tensor for name, tensor in (masks.new_values or {}).items()}
    header = asdict(masks.manifest)
    write_artifact(path, form, {**masks.packed, **values}, header, overwrite=overwrite)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], Manifest, dict[str, torch.Tensor] | None]:
    """Reads what `write` wrote and checks that bits, manifest and values agree.

    Returns:
        uint8 1-D bits by canonical name, the manifest, and the new values if there are any.

    Raises:
        MaskError: if the file is missing, damaged, foreign or of a newer version.
    """
    form = FORMAT
    if Path(path).suffix in (".pth", ".pt", ".bin"):
        hint = "; `vlp masks import` reads published .pth files"
        form = replace(FORMAT, remedy=FORMAT.remedy + hint)
    tensors, header = read_artifact(path, form)
    try:
        manifest = Manifest.from_header(header)
        packed, values = _parted(tensors, manifest)
        _check(packed, values, manifest)
    except MaskError as error:
        raise MaskError(f"mask file {path} {error}; {form.remedy}") from error.__cause__
    return packed, manifest, values


def _parted(
    tensors: Mapping[str, torch.Tensor], manifest: Manifest
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Bits and new values by canonical name; files of format 1 have none."""
    if manifest.schema < SCHEMA_WITH_VALUES:
        return dict(tensors), None
    bits, values = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(_VALUES) and name not in manifest.weights:
            values[name.removeprefix(_VALUES)] = tensor
        else:
            bits[name] = tensor
    return bits, values


def _check(
    packed: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] | None,
    manifest: Manifest,
) -> None:
    """Raises `MaskError` at the first weight whose bits or values are not as the manifest says."""
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
    if values is None:
        return
    try:
        check_values(values, manifest)
    except MaskError as error:
        raise MaskError(f"is damaged: {error}") from error
