"""Masks and a model: which mask belongs to which weight, and the new values of kept elements.

New values are compact: float32, one-dimensional, the kept elements alone in row-major order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import recall_adapter
from vlp_plugins.models.saving import (
    ORIGIN_FILE,
    Shards,
    check_can_save,
    restored,
    write_model,
)
from vlp_plugins.models.weights import Weight, WeightMap, surplus_layer
from vlp_plugins.runtime.artifacts import write_json
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.files import atomic_folder
from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.runtime.sharding import OnDemand

if TYPE_CHECKING:
    from vlp_plugins.masks.masks import Masks

_log = logging.getLogger(__name__)


def compact(name: str, dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The kept elements of a new weight, float32 `[kept]` on the CPU in row-major order.

    Raises:
        MaskError: if the shapes of weight and mask differ.
    """
    if dense.shape != mask.shape:
        raise MaskError(
            f"the new values of {name!r} are {list(dense.shape)}, but its mask is "
            f"{list(mask.shape)}; give one value per element, removed ones included"
        )
    return dense.detach()[mask.to(dense.device)].to("cpu", torch.float32)


def check_values(values: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Raises `MaskError` unless there is one finite float32 value for every kept element.

    The message continues a sentence about the masks or their file.
    """
    for name in (*manifest.weights, *values):
        if name not in values:
            raise MaskError(f"the new values of {name!r} are missing")
        if name not in manifest.weights:
            raise MaskError(f"there are new values of {name!r}, but no mask")
        found, kept = values[name], manifest.weights[name]["kept"]
        if found.dtype != torch.float32 or tuple(found.shape) != (kept,):
            raise MaskError(
                f"the new values of {name!r} are {found.dtype} {list(found.shape)} instead of "
                f"torch.float32 [{kept}], one for every kept element"
            )
        if bad := int(found.numel() - torch.isfinite(found).sum()):
            raise MaskError(f"{bad} of {kept} new values of {name!r} are NaN or infinite")
        release((found,))


def check_range(name: str, values: torch.Tensor, parameter: torch.Tensor) -> None:
    """Raises `MaskError` if a value is beyond what the parameter's dtype can hold (float16)."""
    most = torch.finfo(parameter.dtype).max
    if most < torch.finfo(torch.float32).max and values.numel():
        greatest = float(values.abs().max())
        release((values,))
        if greatest > most:
            raise MaskError(
                f"a new value of {name!r} is {greatest:.4g} in size, more than {parameter.dtype} "
                f"holds ({most:.4g}); load the model in bfloat16 or float32"
            )


def holds(weight: Weight, mask: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `write_kept` would change nothing; see there. A collective if it is sharded."""
    dense = weight.values
    same = torch.equal(dense[mask.to(dense.device)], values.to(dense.device, dense.dtype))
    release((dense, values))
    return same


@dataclass(frozen=True, slots=True)
class Violation:
    """A weight that has `revived` non-zero elements among the `removed` that its mask removes."""

    weight: str
    path: str
    revived: int
    removed: int


def match(manifest: Manifest, weights: WeightMap) -> dict[str, str]:
    """See `Masks.match`."""
    if manifest.adapter != weights.adapter_name:
        raise MaskError(
            f"these masks were made with adapter {manifest.adapter!r}, but the model is described "
            f"by adapter {weights.adapter_name!r}, whose names mean other weights; use masks made "
            f"for a model of this family, or apply them with adapter {manifest.adapter!r}"
        )
    if manifest.structure == weights.structure:
        return {name: name for name in weights}
    matched = {name: _mask_for(manifest, weight) for name, weight in weights.items()}
    _reject_leftovers(manifest, weights, {*matched.values()})
    return matched


@takes_model
def fit(
    masks: Masks, model: nn.Module, adapter: Adapter | None
) -> tuple[WeightMap, dict[str, str]]:
    """The weights of a model, and for each the name of its mask.

    Raises:
        MaskError: if the masks do not fit or a weight has no values.
    """
    manifest = masks.manifest
    adapter = adapter or recall_adapter(model, manifest.adapter, manifest.adapter_settings)
    weights = WeightMap.of(model, adapter)
    matched = match(manifest, weights)
    for weight in weights.values():
        if weight.absent:
            raise MaskError(f"{weight.aliases[0]} is on the meta device; load its values first")
    return weights, matched


def check_mask(name: str, mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises `MaskError` unless a mask is bool and of the shape of its weight."""
    if mask.dtype != torch.bool:
        raise MaskError(f"the mask of {name!r} is {mask.dtype}; masks are bool, True = kept")
    _check_shape(name, tuple(mask.shape), shape)


def _check_shape(name: str, mask: tuple[int, ...], weight: tuple[int, ...]) -> None:
    if mask != weight:
        raise MaskError(
            f"the mask of {name!r} is {list(mask)}, but the weight is {list(weight)}; "
            "use masks made for a model of this structure"
        )


def _reject_leftovers(manifest: Manifest, weights: WeightMap, used: set[str]) -> None:
    """Raises `MaskError` if the model lacks some of the layers that a kind of mask is for."""
    if found := surplus_layer(manifest.weights, dict.fromkeys([*sorted(used), *weights])):
        name, other = found
        raise MaskError(
            f"these masks have {name!r} {list(manifest.shape(name))}, which the model lacks "
            f"although it has {other!r}, the same in another layer; use masks "
            "made for a model of this structure"
        )


def _mask_for(manifest: Manifest, weight: Weight) -> str:
    name = weight.name if weight.name in manifest.weights else weight.copy_of
    if name is None or name not in manifest.weights:
        copy = f", nor for {name!r}, which it is a copy of" if name else ""
        raise MaskError(
            f"these masks (adapter {manifest.adapter!r}) have none for {weight.name!r} "
            f"{list(weight.shape)}, which the model has at {weight.aliases[0]}{copy}; "
            "use masks made for a model of this structure"
        )
    _check_shape(name, manifest.shape(name), weight.shape)
    return name


def apply_masks(masks: Masks, model: nn.Module, adapter: Adapter | None, *, values: bool) -> None:
    """See `Masks.apply`."""
    weights, matched = _fit_to_write(masks, model, adapter, values=values)
    for name, weight in weights.items():
        with weight.changing() as parameter:
            masks.pruned(matched[name], values=values).write(parameter)


def applied(
    masks: Masks, model: nn.Module, adapter: Adapter | None, *, values: bool
) -> Mapping[str, torch.Tensor]:
    """Pruned parameters by path, each made on access from the model, which stays as it is."""
    weights, matched = _fit_to_write(masks, model, adapter, values=values)
    parts: dict[str, list[str]] = {}
    for name, weight in weights.items():
        parts.setdefault(weight.aliases[0], []).append(name)

    def pruned(path: str) -> torch.Tensor:
        whole = model.get_parameter(path).detach().clone()
        for name in parts[path]:
            masks.pruned(matched[name], values=values).write(weights[name].view_of(whole))
        return whole

    return OnDemand(parts, pruned)


def write_pruned(
    masks: Masks,
    model: nn.Module,
    adapter: Adapter | None,
    folder: Path,
    *,
    source: str | None,
    values: bool = True,
    keep: bool = True,
) -> None:
    """Writes the folder of a pruned model; the model itself stays as it is.

    Where its values are views of the safetensors files of its folder, these are written again one
    tensor after the other, and nothing of the model's size is held.

    Args:
        masks: of the model.
        model: dense.
        adapter: see `Masks.apply`.
        folder: exists; may be part of something atomic.
        source: where the model came from.
        values: see `Masks.apply`.
        keep: False leaves a model that has values of its own pruned, which saves a copy of them.

    Raises:
        MaskError: if the masks do not fit.
        UnsupportedError: if the model cannot be saved.
    """
    check_can_save(model)
    if (shards := Shards.of(model, source)) is not None:
        shards.write(model, folder, applied(masks, model, adapter, values=values))
        return
    with restored(fit(masks, model, adapter)[0]) if keep else nullcontext():
        apply_masks(masks, model, adapter, values=values)
        write_model(model, folder, source=source)


@takes_model
def save_pruned(
    masks: Masks,
    model: nn.Module,
    adapter: Adapter | None,
    target: Path,
    *,
    source: str | None,
    values: bool = True,
    keep: bool = True,
    overwrite: bool = False,
    origin: Mapping[str, str] | None = None,
) -> None:
    """`write_pruned` into a new folder, whole or not at all, with `ORIGIN_FILE`.

    Raises:
        OutputError: if the folder exists and is not to be, or cannot be, replaced, or the disk is
            too small.
        VlpError: see `write_pruned`.
    """
    check_can_save(model, target)
    about = {
        **(origin or {}),
        "method": masks.manifest.method,
        "sparsity": masks.sparsity,
        "new_weights": masks.new_values is not None and values,
    }
    with atomic_folder(target, mark=ORIGIN_FILE, overwrite=overwrite) as folder:
        write_pruned(masks, model, adapter, folder, source=source, values=values, keep=keep)
        write_json(folder / ORIGIN_FILE, "pruned model", about)


def _fit_to_write(
    masks: Masks, model: nn.Module, adapter: Adapter | None, *, values: bool
) -> tuple[WeightMap, dict[str, str]]:
    """See `fit`; new values are checked, too, and a warning says what they overwrite."""
    weights, matched = fit(masks, model, adapter)
    if values and masks.new_values is not None:
        for name, weight in weights.items():
            check_range(name, masks.new_values[matched[name]], weight.parameter)
        warn_of_overwriting(masks, masks.new_values, weights, matched)
    return weights, matched


def violations(masks: Masks, model: nn.Module, adapter: Adapter | None) -> list[Violation]:
    """See `Masks.verify`."""
    weights, matched = fit(masks, model, adapter)
    found = []
    for name, weight in weights.items():
        mask = masks[matched[name]].to(weight.device)
        values = weight.values
        if values.element_size() == 1:  # of 8-bit floats nothing can be computed
            values = values.float()
        revived = int(torch.count_nonzero(values.masked_fill(mask, 0)))
        if revived:
            removed = int(mask.numel() - mask.sum())
            found.append(Violation(weight.name, weight.aliases[0], revived, removed))
        release((weight.parameter,))
    return found


def check_applied(masks: Masks, model: nn.Module, adapter: Adapter | None, remedy: str) -> None:
    """Raises `MaskError` with the first weight that is not zero where its mask removes."""
    if found := masks.verify(model, adapter):
        first = found[0]
        raise MaskError(
            f"{len(found)} weights are not zero where the masks remove, first {first.weight!r} "
            f"({first.path}): {first.revived} of {first.removed} elements; {remedy}"
        )


def warn_of_overwriting(
    masks: Masks,
    values: Mapping[str, torch.Tensor],
    weights: WeightMap,
    matched: Mapping[str, str],
) -> None:
    """Warns if new values replace weights of the same structure that they were not made from."""
    manifest = masks.manifest
    if manifest.structure != weights.structure or masks.made_from(weights):
        return
    overwritten = (
        name
        for name, weight in weights.items()
        if not holds(weight, masks[matched[name]], values[matched[name]])
    )
    if (first := next(overwritten, None)) is None:
        return
    _log.warning(
        "the new weights of these masks (%s) were computed from other weights than the model's "
        "(content hash %s, the model's is %s): what the model learned since, by fine-tuning for "
        "instance, is overwritten, first in %r; apply(model, values=False) or `vlp masks apply "
        "--keep-weights` zeroes what is removed and leaves the rest alone",
        manifest.method,
        manifest.weights_hash,
        weights.content_hash(),
        first,
    )
