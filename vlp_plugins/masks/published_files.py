"""Published mask files: PyTorch files with one 0/1 tensor per parameter, `<path>_pruning_mask`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.packed import pack
from vlp_plugins.models.adapter import Adapter, OriginalPart
from vlp_plugins.models.weights import Weight, WeightMap, structure_of
from vlp_plugins.runtime.artifacts import load_pickled
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.files import atomic_file

SUFFIX = "_pruning_mask"


def import_published(path: str | os.PathLike[str], weights: WeightMap, adapter: Adapter) -> Masks:
    """Reads a published file into masks for the weights of a model.

    The file is a state dict, bare or under `"model"`, whose keys name parameters as the original
    code base or as this model does; code in it is never run. A mask of what the original keeps in
    one tensor (query, key and value) is split. What the published code leaves whole (biases,
    excluded layers) has masks of ones there and is passed over. A copied weight without a mask of
    its own gets no entry; it inherits when the masks are applied.

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
        raise MaskError(f"{path} has no key that ends in {SUFFIX}; it is not a published mask file")
    places = {weight.name: _places(weight, adapter) for weight in weights.values()}
    parts = _parts(path, found, {place for some in places.values() for place in some})
    packed: dict[str, torch.Tensor] = {}
    used: set[OriginalPart] = set()
    for weight in weights.values():
        keys = [place for place in places[weight.name] if place in parts]
        used.update(keys)
        if keys:
            packed[weight.name] = _agreed(path, weight, {key: parts[key] for key in keys})
        elif weight.copy_of not in weights:
            raise MaskError(
                f"{path} has no mask for {weight.name!r} (looked for "
                f"{_shown(places[weight.name][0])}); is it of another model?"
            )
    _reject_leftovers(path, {key: value for key, value in parts.items() if key not in used})
    manifest = Manifest.for_weights(weights, method="published", note=f"imported from {path.name}")
    return Masks(packed, _only(manifest, packed))


def export_published(
    masks: Masks,
    path: str | os.PathLike[str],
    weights: WeightMap,
    adapter: Adapter,
    *,
    overwrite: bool = False,
) -> None:
    """Writes masks as a published file: one key per alias of every weight, in original names.

    Where the original keeps several weights in one tensor, their masks are joined; a part of it
    that is not pruned is kept whole. Where the adapter knows no original names, parameters keep
    their own. The 0/1 tensors have a floating dtype, because published code computes with them.

    Raises:
        MaskError: if the masks do not fit the weights, or the original has some of the weights
            and lacks another.
        OutputError: if the file exists and is not to be overwritten, or cannot be written.
    """
    matched = masks.match(weights)
    places = _original_places(weights, adapter)
    with atomic_file(path, overwrite=overwrite) as temporary:
        state: dict[str, torch.Tensor] = {}
        for name in weights:
            mask = masks[matched[name]].float()
            for place in places[name]:
                key = place.name + SUFFIX
                if place.of == 1:  # tied names hold the same tensor, which the file stores once
                    state[key] = mask
                    continue
                if key not in state:
                    state[key] = mask.new_ones(place.of * len(mask), *mask.shape[1:])
                state[key].chunk(place.of)[place.part].copy_(mask)
        torch.save(state, temporary)


def _read_state(path: Path) -> Mapping[object, object]:
    if not path.is_file():
        raise MaskError(f"{path} is not a file; give the path of a published mask file")
    try:
        content = load_pickled(path, MaskError)
    except MaskError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise MaskError(
                f"{path} was refused: it holds {unsafe[1]}, which could run code when read, "
                "in addition to tensors; nothing was executed: get a file with the bare state dict"
            ) from error
        raise MaskError(
            f"{path} is not a PyTorch file of plain tensors, or it is damaged or truncated; "
            "nothing in it was executed: copy it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise MaskError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _places(weight: Weight, adapter: Adapter) -> list[OriginalPart]:
    """Every place that a file may have for a weight: the original's first."""
    places = dict.fromkeys(
        place for alias in weight.aliases if (place := adapter.original_part(alias))
    )
    # Files that this package wrote before it joined what the original keeps in one tensor.
    names = [name for alias in weight.aliases if (name := adapter.original_name(alias))]
    return list(places | dict.fromkeys(map(OriginalPart, [*names, *weight.aliases])))


def _original_places(weights: WeightMap, adapter: Adapter) -> dict[str, list[OriginalPart]]:
    """Where the original keeps each weight; the weight's own paths if it has none of them."""
    places = {
        name: [place for alias in weight.aliases if (place := adapter.original_part(alias))]
        for name, weight in weights.items()
    }
    if lacking := [name for name, found in places.items() if not found]:
        if len(lacking) < len(places):
            raise MaskError(
                f"the original {adapter.name} code has no parameter for {len(lacking)} of "
                f"{len(places)} weights, first {weights[lacking[0]].aliases[0]}: it could not read "
                "their masks; export masks of a model that it has, the pre-training model"
            )
        return {name: [*map(OriginalPart, weight.aliases)] for name, weight in weights.items()}
    return places


def _parts(
    path: Path, found: Mapping[str, object], places: Collection[OriginalPart]
) -> dict[OriginalPart, object]:
    """What a file has, divided where the original keeps several weights in one tensor."""
    numbers = {place.name: place.of for place in places if place.of > 1}
    parts: dict[OriginalPart, object] = {}
    for name, value in found.items():
        of = numbers.get(name, 1)
        if of == 1:
            parts[OriginalPart(name)] = value
            continue
        mask = _as_bool(path, OriginalPart(name), value)
        if mask.ndim == 0 or len(mask) % of:
            raise MaskError(
                f"{path}: {_shown(OriginalPart(name))} is {list(mask.shape)}, not masks of {of} "
                "weights below each other; is it of another model?"
            )
        parts |= {OriginalPart(name, n, of): rows for n, rows in enumerate(mask.chunk(of))}
    return parts


def _agreed(path: Path, weight: Weight, found: Mapping[OriginalPart, object]) -> torch.Tensor:
    """The packed mask on which all names of a weight agree."""
    packed: dict[OriginalPart, torch.Tensor] = {}
    for key, value in found.items():
        mask = _as_bool(path, key, value)
        if tuple(mask.shape) != weight.shape:
            raise MaskError(
                f"{path}: {_shown(key)} is {list(mask.shape)}, but {weight.name!r} is "
                f"{list(weight.shape)}; is it of another model?"
            )
        packed[key] = pack(mask)
    (first, bits), *others = packed.items()
    for key, other in others:
        if not torch.equal(bits, other):
            raise MaskError(
                f"{path}: {first.name} and {key.name} are one weight here ({weight.name!r}), but "
                "their masks differ; the model the file was made for did not tie them"
            )
    return bits


def _as_bool(path: Path, key: OriginalPart, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise MaskError(f"{path}: {_shown(key)} is a {type(value).__name__}, not a tensor")
    mask = value != 0
    if not torch.equal(mask.to(value.dtype), value):
        raise MaskError(f"{path}: {_shown(key)} has values other than 0 and 1; it is not a mask")
    return mask


def _reject_leftovers(path: Path, leftovers: Mapping[OriginalPart, object]) -> None:
    """Masks of what is not pruned here must be ones throughout, as published files have them."""
    for key, value in leftovers.items():
        if not bool(_as_bool(path, key, value).all()):
            is_bias = key.name.endswith("bias")
            what = "biases are never pruned" if is_bias else "is it another model's?"
            raise MaskError(
                f"{path}: {_shown(key)} removes elements of something that is not pruned in this "
                f"model; {what}"
            )


def _shown(place: OriginalPart) -> str:
    """The key of a file, and which part of its tensor is meant."""
    whole = place.name + SUFFIX
    return whole if place.of == 1 else f"{whole} (part {place.part + 1} of {place.of})"


def _only(manifest: Manifest, names: Mapping[str, object]) -> Manifest:
    """The manifest restricted to some weights."""
    records = {name: record for name, record in manifest.weights.items() if name in names}
    structure = structure_of({name: record["shape"] for name, record in records.items()})
    return replace(manifest, weights=records, structure=structure)
