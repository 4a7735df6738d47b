"""Mask files: one safetensors file per mask set.

Every weight is a uint8 tensor under its canonical name, one bit per element in row-major order,
the most significant bit first. The header holds the manifest as JSON under one key. safetensors
holds nothing but numbers and text: reading a file of unknown origin executes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vlp_plugins.atomic import check_new, write_bytes
from vlp_plugins.errors import MaskError
from vlp_plugins.masks.bits import count_ones, flaw
from vlp_plugins.masks.manifest import Manifest

METADATA_KEY = "vlp_masks"


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
    # Two names may hold one tensor (equal masks); safetensors refuses that.
    tensors = {name: bits.clone() for name, bits in packed.items()}
    data = save(tensors, metadata={METADATA_KEY: manifest.to_json()})
    write_bytes(path, data, overwrite=overwrite)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Reads what `write` wrote and checks that bits and manifest agree.

    Returns:
        uint8 1-D bits by canonical name, and the manifest.

    Raises:
        MaskError: if the file is missing, damaged, foreign or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskError(f"{path} is no file; give the path of a mask file")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = _manifest(file.metadata() or {})
            # Cloned, because the tensors of an open file are a view of its pages on the disk.
            packed = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        _check(packed, manifest)
    except MaskError as error:
        raise MaskError(f"mask file {path} {error}") from error.__cause__
    except (SafetensorError, OSError) as error:
        raise MaskError(
            f"{path} is no mask file, or it is damaged or truncated ({error}); make or copy it "
            f"again{_hint(path)}"
        ) from error
    return packed, manifest


def _manifest(metadata: Mapping[str, str]) -> Manifest:
    if METADATA_KEY not in metadata:
        raise MaskError("holds no masks (perhaps a checkpoint?); give a file that Masks.save wrote")
    return Manifest.from_json(metadata[METADATA_KEY])


def _check(packed: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Raises `MaskError` at the first weight whose bits are not what the manifest says."""
    for name in (*manifest.weights, *packed):
        if name not in packed:
            raise MaskError(f"is damaged: the mask of {name!r} is missing; make or copy it again")
        if name not in manifest.weights:
            raise MaskError(f"is damaged: {name!r} is not in its manifest; make or copy it again")
        bits, record = packed[name], manifest.weights[name]
        if found := flaw(bits, manifest.shape(name)):
            raise MaskError(f"is damaged: the mask of {name!r} {found}; make or copy it again")
        kept = count_ones(bits)
        if kept != record["kept"]:
            raise MaskError(
                f"is damaged: {name!r} keeps {kept} elements, its manifest says "
                f"{record['kept']}; make or copy it again"
            )


def _hint(path: Path) -> str:
    if path.suffix in (".pth", ".pt", ".bin"):
        return "; `vlp masks import` reads published .pth files"
    return ""
