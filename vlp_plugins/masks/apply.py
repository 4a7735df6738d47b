"""Masks and a model: which mask belongs to which weight, writing them, verifying them.

They are compact: float32, one-dimensional, the kept elements alone in row-major order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.weights import Weight, WeightMap, surplus_layer
from vlp_plugins.runtime.errors import MaskError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.runtime.sharding import here, is_sharded, part_of, whole, zero_outside


def compact(name: str, dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values of the kept elements.

    Args:
        name: of the weight, for the message.
        dense: the new weight, of the mask's shape; floating, any device.
        mask: bool, True = kept.

    Returns:
        float32 `[kept]` on the CPU, in row-major order.

    Raises:
        MaskError: if the shapes differ.
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


def check_range(name: str, values: torch.Tensor, parameter: nn.Parameter) -> None:
    """Raises `MaskError` if a value is beyond what the parameter's dtype can hold (float16)."""
    most = torch.finfo(parameter.dtype).max
    if most < torch.finfo(torch.float32).max and values.numel():
        greatest = float(values.abs().max())
        if greatest > most:
            raise MaskError(
                f"a new value of {name!r} is {greatest:.4g} in size, more than {parameter.dtype} "
                f"holds ({most:.4g}); load the model in bfloat16 or float32"
            )


def write_kept(parameter: nn.Parameter, mask: torch.Tensor, values: torch.Tensor) -> None:
    """Writes compact values into the kept elements of a parameter, in place, in its dtype.

    Args:
        parameter: any strides, any device; sharded or not.
        mask: bool, of its shape and on its device.
        values: float32 `[kept]`, on any device.
    """
    values = values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if not is_sharded((parameter,)):
            parameter.masked_scatter_(mask, values)
            return
        dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        spread = part_of(dense.masked_scatter_(mask, values), parameter)
        mine = here(parameter)
        mine.copy_(torch.where(part_of(mask, parameter), spread, mine))


def holds(parameter: nn.Parameter, mask: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `write_kept` would change nothing; see there. A collective if it is sharded."""
    dense = whole(parameter)
    return torch.equal(dense[mask.to(dense.device)], values.to(dense.device, dense.dtype))


def bytes_of_values(values: Mapping[str, torch.Tensor]) -> int:
    """Bytes that they take, in memory and in a file."""
    return sum(each.numel() * each.element_size() for each in values.values())


def same_values(
    one: Mapping[str, torch.Tensor] | None, two: Mapping[str, torch.Tensor] | None
) -> bool:
    """Whether two sets of new values (of the same masks) are equal; None means no new values."""
    if one is None or two is None:
        return one is two
    return all(torch.equal(values, two[name]) for name, values in one.items())


@dataclass(frozen=True, slots=True)
class Violation:
    """A weight that has `revived` non-zero elements among the `removed` that its mask removes."""

    weight: str
    path: str
    revived: int
    removed: int


def match(manifest: Manifest, weights: WeightMap) -> dict[str, str]:
    """For every weight of a model the name of its mask; see `Masks.match`."""
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
    manifest: Manifest, model: nn.Module, adapter: Adapter | None
) -> tuple[WeightMap, dict[str, str]]:
    """The weights of a model, and for each the name of its mask.

    Raises:
        MaskError: if the masks do not fit or a weight has no values.
    """
    weights = WeightMap.of(model, adapter or _default_adapter(manifest, model))
    matched = match(manifest, weights)
    for weight in weights.values():
        if weight.parameter.is_meta:
            raise MaskError(f"{weight.aliases[0]} is on the meta device; load its values first")
    return weights, matched


def check_comparable(one: Manifest, two: Manifest) -> None:
    """Makes sure that two manifests are of one family and one structure.

    Raises:
        MaskError: with the first difference.
    """
    if one.adapter != two.adapter:
        raise MaskError(
            f"the first masks are of a model of adapter {one.adapter!r}, the second of one of "
            f"adapter {two.adapter!r}, whose names mean other weights; compare masks of one family"
        )
    if found := difference(one, two):
        raise MaskError(f"masks of different structures cannot be compared: {found}")


def difference(one: Manifest, two: Manifest) -> str | None:
    """The first name or shape in which two manifests differ; the order does not matter."""
    for name in (*one.weights, *two.weights):
        if name not in one.weights or name not in two.weights:
            return f"only the {'second' if name in two.weights else 'first'} has {name!r}"
        if one.shape(name) != two.shape(name):
            return (
                f"{name!r} is {list(one.shape(name))} in the first and "
                f"{list(two.shape(name))} in the second"
            )
    return None


def wrong_shape(name: str, mask: tuple[int, ...], weight: tuple[int, ...]) -> MaskError:
    """The error for a mask that has another shape than its weight."""
    return MaskError(
        f"the mask of {name!r} is {list(mask)}, but the weight is {list(weight)}; "
        "use masks made for a model of this structure"
    )


def _default_adapter(manifest: Manifest, model: nn.Module) -> Adapter:
    # Here, because plug-ins are above masks, which know of them only what this default needs.
    from vlp_plugins.models.discovery import recall_adapter

    return recall_adapter(model, manifest.adapter, manifest.adapter_settings)


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
    if manifest.shape(name) != weight.shape:
        raise wrong_shape(name, manifest.shape(name), weight.shape)
    return name


_log = logging.getLogger(__name__)


def apply_masks(
    masks: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] | None,
    manifest: Manifest,
    model: nn.Module,
    adapter: Adapter | None,
) -> None:
    """Zeroes what is removed and writes new values into what is kept; see `Masks.apply`.

    Raises:
        MaskError: if something does not fit; the model is unchanged then.
    """
    weights, matched = fit(manifest, model, adapter)
    if values is not None:
        for name, weight in weights.items():
            check_range(name, values[matched[name]], weight.parameter)
        overwritten = (
            name
            for name, weight in weights.items()
            if not holds(weight.parameter, masks[matched[name]], values[matched[name]])
        )
        if _are_others(manifest, weights) and (first := next(overwritten, None)):
            _warn(manifest, weights, first)
    for name, weight in weights.items():
        mask = masks[matched[name]].to(weight.parameter.device)
        zero_outside(weight.parameter, mask)
        if values is not None:
            write_kept(weight.parameter, mask, values[matched[name]])


def violations(
    masks: Mapping[str, torch.Tensor],
    manifest: Manifest,
    model: nn.Module,
    adapter: Adapter | None,
) -> list[Violation]:
    """The weights that are not zero where their mask removes; see `Masks.verify`."""
    weights, matched = fit(manifest, model, adapter)
    found = []
    for name, weight in weights.items():
        mask = masks[matched[name]].to(weight.parameter.device)
        revived = int(torch.count_nonzero(whole(weight.parameter).masked_fill(mask, 0)))
        if revived:
            removed = int(mask.numel() - mask.sum())
            found.append(Violation(weight.name, weight.aliases[0], revived, removed))
    return found


def _are_others(manifest: Manifest, weights: WeightMap) -> bool:
    """True if a model of the same structure has other weights than the masks were made from."""
    return manifest.structure == weights.structure and not is_source(manifest, weights)


def is_source(manifest: Manifest, weights: WeightMap) -> bool:
    """Whether masks were made from these weights; where nobody recorded it, if they might be."""
    if manifest.structure != weights.structure:
        return False
    return manifest.weights_hash is None or manifest.weights_hash == weights.content_hash()


def _warn(manifest: Manifest, weights: WeightMap, first: str) -> None:
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
