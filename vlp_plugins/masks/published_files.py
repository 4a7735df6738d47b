"""Published mask files: PyTorch files with one 0/1 tensor per parameter, `<path>_pruning_mask`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import pack
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight, WeightMap, structure_of
from vlp_plugins.runtime.artifacts import load_pickled
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.files import atomic_file

SUFFIX = "_pruning_mask"


def import_published(path: str | os.PathLike[str], weights: WeightMap, adapter: Adapter) -> Masks:
    """Reads a published file into masks for the weights of a model.

    The file is a state dict, bare or under `"model"`, whose keys name parameters as the original
    code base or as this model does; code in it is never run. What the published code leaves whole
    (biases, excluded layers) has masks of ones there and is passed over. A copied weight without
    a mask of its own gets no entry; it inherits when the masks are applied.

    Args:
        path: the file.
        weights: the model's prunable weights.
        adapter: knows the original names.

    Raises:
        MaskError: if the file cannot be read safely, a weight has no mask or one of another shape,
            tied names disagree, or something is masked that is not pruned here.
    """
    path = Path(path)
    found = {
        key.removeprefix("module.").removesuffix(SUFFIX): value
        for key, value in _read_state(path).items()
        if isinstance(key, str) and key.endswith(SUFFIX)
    }
    if not found:
        raise MaskError(f"{path} has no key that ends in {SUFFIX}; it is no published mask file")
    packed: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for weight in weights.values():
        keys = [key for key in _keys(weight, adapter) if key in found]
        used.update(keys)
        if keys:
            packed[weight.name] = _agreed(path, weight, {key: found[key] for key in keys})
        elif weight.copy_of not in weights:
            raise MaskError(
                f"{path} has no mask for {weight.name!r} (looked for "
                f"{_keys(weight, adapter)[0]}{SUFFIX}); is it of another model?"
            )
    _reject_leftovers(path, {key: value for key, value in found.items() if key not in used})
    manifest = Manifest.for_weights(weights, method="published", note=f"imported from {path.name}")
    return Masks(packed, _only(manifest, packed))


def export_published(
    masks: Masks,
    path: str | os.PathLike[str],
    weights: WeightMap,
    adapter: Adapter,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Writes masks as a published file: one key per alias of every weight, in original names.

    Args:
        masks: masks that fit the weights.
        path: the file to write.
        weights: of the model that the masks are for.
        adapter: knows the original names; a parameter without one keeps its own.
        dtype: of the 0/1 tensors; floating, because published code computes with them.
        overwrite: replace an existing file.

    Raises:
        MaskError: if the masks do not fit the weights.
        OutputError: if the file exists and is not to be overwritten, or cannot be written.
    """
    matched = masks.match(weights)
    with atomic_file(path, overwrite=overwrite) as temporary:
        state: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            mask = masks[matched[name]].to(dtype)
            for alias in weight.aliases:
                # Tied names hold the same tensor, which the file stores once.
                state[(adapter.original_name(alias) or alias) + SUFFIX] = mask
        torch.save(state, temporary)


def _read_state(path: Path) -> Mapping[object, object]:
    if not path.is_file():
        raise MaskError(f"{path} is no file; give the path of a published mask file")
    try:
        content = load_pickled(path, MaskError)
    except MaskError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise MaskError(
                f"{path} was refused: it holds {unsafe[1]}, which could run code when read, "
                "besides tensors; nothing was executed: get a file with the bare state dict"
            ) from error
        raise MaskError(
            f"{path} is no PyTorch file of plain tensors, or it is damaged or truncated; nothing "
            "in it was executed: copy it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise MaskError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _keys(weight: Weight, adapter: Adapter) -> list[str]:
    """Every name that a file may give to a weight: the original's first."""
    names: dict[str, None] = {}
    for alias in weight.aliases:
        if original := adapter.original_name(alias):
            names[original] = None
    return list(names | dict.fromkeys(weight.aliases))


def _agreed(path: Path, weight: Weight, found: Mapping[str, object]) -> torch.Tensor:
    """The packed mask on which all names of a weight agree."""
    packed: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        mask = _as_bool(path, key, value)
        if tuple(mask.shape) != weight.shape:
            raise MaskError(
                f"{path}: {key}{SUFFIX} is {list(mask.shape)}, but {weight.name!r} is "
                f"{list(weight.shape)}; is it of another model?"
            )
        packed[key] = pack(mask)
    (first, bits), *others = packed.items()
    for key, other in others:
        if not torch.equal(bits, other):
            raise MaskError(
                f"{path}: {first} and {key} are one weight here ({weight.name!r}), but their "
                "masks differ; the model the file was made for did not tie them"
            )
    return bits


def _as_bool(path: Path, key: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise MaskError(f"{path}: {key}{SUFFIX} is a {type(value).__name__}, not a tensor")
    mask = value != 0
    if not torch.equal(mask.to(value.dtype), value):
        raise MaskError(f"{path}: {key}{SUFFIX} has values other than 0 and 1; it is no mask")
    return mask


def _reject_leftovers(path: Path, leftovers: Mapping[str, object]) -> None:
    """Masks of what is not pruned here must be ones throughout, as published files have them."""
    for key, value in leftovers.items():
        if not bool(_as_bool(path, key, value).all()):
            what = "biases are never pruned" if key.endswith("bias") else "is it another model's?"
            raise MaskError(
                f"{path}: {key}{SUFFIX} removes elements of something that is not pruned in this "
                f"model; {what}"
            )


def _only(manifest: Manifest, names: Mapping[str, object]) -> Manifest:
    """The manifest restricted to some weights."""
    records = {name: record for name, record in manifest.weights.items() if name in names}
    structure = structure_of({name: record["shape"] for name, record in records.items()})
    return replace(manifest, weights=records, structure=structure)
